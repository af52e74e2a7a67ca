"""Class names and pictures of every layout; whatever does not fit together is one line that says what."""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from stand_ins import picture, write_classes, write_folders

from sources import classes
from sources.pairs import DataError, open_image

NAMES = """# three things
metric: {metric}
template: 画着{{}}
apple pie\t苹果派
Red Fox\t赤狐
boat\t船
"""


def write_labels(path, metric: str = "accuracy") -> str:
    path.write_text(NAMES.format(metric=metric), encoding="utf-8")
    return str(path)


def says(function, *parts: str):
    with pytest.raises(DataError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_classes_of_the_official_layout(tmp_path):
    found, paths, labels = classes.open_classes(write_classes(tmp_path / "set"))
    assert found.chinese == ["猫", "船", "花"] and found.metric == "accuracy"
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for path, label, n in zip(paths, labels.tolist(), (0, 1) * 3):
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(picture(10 * label + n)))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "labels").iterdir()))
def test_our_labels_are_read(name):
    if name == "templates":
        return says(lambda: classes.read_classes(name), "cifar-10")
    found = classes.read_classes(name)
    assert len(found.english) == len(found.chinese) >= 2 and found.metric in classes.METRICS
    assert set(classes.numbers_of(found).values()) == set(range(len(found.chinese)))


@pytest.mark.parametrize("folders", [
    ("test/000", "test/001", "test/002"), ("0", "1", "2"), ("test/boat", "test/apple_pie", "test/red fox"),
    ("Apple Pie", "Red-Fox", "Boat"), ("苹果派", "赤狐", "船")])
def test_folders_by_number_and_by_name(tmp_path, folders):
    data = write_folders(tmp_path / "set", *folders)
    found, paths, labels = classes.open_classes(data, write_labels(tmp_path / "three.txt"))
    assert found.chinese == ["苹果派", "赤狐", "船"] and found.templates == ("画着{}",)
    for path, label in zip(paths, labels.tolist()):
        place = classes.bare_name(os.path.basename(os.path.dirname(path)))
        names = (*found.english[label], found.chinese[label])
        assert place in (f"{label:03d}", str(label), *map(classes.bare_name, names))
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


USUAL = "metric: accuracy\ncolumbine\t漏斗菜\t耧斗菜\nrose\t玫瑰\nbuttercup|crowfoot\t黄花\t毛茛\n"


def test_usual_names_take_the_place_of_aliases(tmp_path):
    """A file with a third column, in the order of the folder's label.txt. Folders may have any of the names."""
    (tmp_path / "flowers.txt").write_text(USUAL, encoding="utf-8")
    labels = str(tmp_path / "flowers.txt")
    found = classes.read_classes(labels)
    assert found.chinese == ["漏斗菜", "玫瑰", "黄花"] and found.usual == ["耧斗菜", "玫瑰", "毛茛"]
    assert found.usually_named(False) == found
    assert found.usually_named(True) == found._replace(chinese=["耧斗菜", "玫瑰", "毛茛"])
    for number, names in enumerate((("毛茛", "漏斗菜", "rose"), ("crowfoot", "耧斗菜", "玫瑰"))):
        data = write_folders(tmp_path / f"set{number}", *names, count=1)
        for own, order in (("", [0, 1, 2]), ("Buttercup\n耧斗菜\nrose\n", [2, 0, 1])):
            if own:
                (tmp_path / f"set{number}" / "label.txt").write_text(own, encoding="utf-8")
            for usual in (False, True):
                opened, paths, numbers = classes.open_classes(data, labels, "usual" if usual else "ours")
                stand = found.usual if usual else found.chinese
                assert opened.chinese == [stand[c] for c in order] and opened.usual == [found.usual[c] for c in order]
                shown = {os.path.basename(os.path.dirname(path)): c for path, c in zip(paths, numbers.tolist())}
                assert shown == {names[0]: order.index(2), names[1]: order.index(0), names[2]: order.index(1)}


def test_countries_lie_in_folders_of_their_codes(tmp_path):
    two = tmp_path / "two.txt"
    two.write_text("metric: accuracy\nAD|Andorra\t安道尔\nZW|Zimbabwe\t津巴布韦\n", encoding="utf-8")
    _, _, labels = classes.open_classes(write_folders(tmp_path / "set", "ZW", "Andorra"), str(two))
    assert labels.tolist() == [0, 0, 1, 1]


def test_folders_that_do_not_fit_the_labels(tmp_path):
    labels = write_labels(tmp_path / "three.txt")

    def refused(number: int, folders: tuple, *parts: str):
        data = write_folders(tmp_path / f"set{number}", *folders)
        says(lambda: classes.open_classes(data, labels), *parts)

    refused(0, ("test/000", "test/001", "test/003"), os.path.join("test", "003"), "000 to 002")
    refused(1, ("test/apple pie", "test/fox", "test/boat"), os.path.join("test", "fox"), "apple pie")
    refused(2, ("test/000", "test/001"), "test: no pictures of 1 of 3 classes, looked for 船 or boat or 002; ")
    refused(3, ("test/1", "test/2", "test/3"), os.path.join("test", "3"), "000 to 002")  # from 1
    refused(4, ("test/0", "test/000", "test/1"), "1 of 3 classes", "船 or boat or 002")
    write_folders(tmp_path / "set5", "test/000", "test/001")
    write_folders(tmp_path / "set5", "test/002", count=0)
    says(lambda: classes.open_classes(str(tmp_path / "set5"), labels), "船 or boat or 002")
    (tmp_path / "set7").mkdir()
    says(lambda: classes.open_classes(str(tmp_path / "set7"), labels), "no pictures")
    says(lambda: classes.open_classes(str(tmp_path / "nowhere"), labels), "nowhere")


@pytest.mark.parametrize("below", ("", "test/"))
@pytest.mark.parametrize("names", (("水果", "蔬菜"), ("iPhone手机", "U盘", "𠮷野家饭")))
def test_folders_with_chinese_names_need_no_labels(tmp_path, below, names):
    data = write_folders(tmp_path / "goods", *(below + name for name in names))
    (tmp_path / "goods" / "readme.md").write_text("?", encoding="utf-8")
    found, paths, labels = classes.open_classes(data)
    assert sorted(found.chinese) == sorted(names) and found.metric == "accuracy"
    for path, label in zip(paths, labels.tolist()):
        assert os.path.basename(os.path.dirname(path)) == found.chinese[label]
    assert len(paths) == 2 * len(names)


@pytest.mark.parametrize("folders, words", [
    (("000", "001"), "goods/000: no Chinese name"), (("水果", "apple_pie"), "goods/apple_pie: no Chinese name"),
    (("test/001",), "goods/test/001: no Chinese name"), ((), "goods: 0 folders in it"),
    (("水果",), "goods: 1 folders in it")])
def test_folders_without_chinese_names_need_labels(tmp_path, folders, words):
    """The message says where names may stand: on the folders, in label_cn.txt, or in --labels."""
    (tmp_path / "goods").mkdir()
    write_folders(tmp_path / "goods", *folders)
    own = tmp_path / "goods" / "label_cn.txt"
    says(lambda: classes.open_classes(str(tmp_path / "goods")), f"{tmp_path}/{words}", "水果",
         f"{own}, line 1 for folder 000", "--labels")


def test_a_class_without_pictures_is_called_by_its_name(tmp_path):
    data = write_folders(tmp_path / "goods", "水果", "蔬菜")
    write_folders(tmp_path / "goods", "花", count=0)
    says(lambda: classes.open_classes(data), "goods: no pictures of 1 of 3 classes, looked for 花; add")
    (tmp_path / "goods" / "label_cn.txt").write_text("水果\n香蕉\n蔬菜\n花", encoding="utf-8")
    says(lambda: classes.open_classes(data), "2 of 4 classes, looked for 香蕉 or 001, 花 or 003; add")
    (tmp_path / "goods" / "label_cn.txt").write_text("水果\n蔬菜", encoding="utf-8")
    says(lambda: classes.open_classes(data), "花: no class has that name; expected folders 000 to 001, or names such as 水果")


@pytest.mark.parametrize("other", ({}, {"label.txt": "cat\nboat\nflower\n"}, {"label_cn.txt": "一\n二\n三\n"}))
def test_a_plain_list_is_the_same_as_labels_and_as_label_cn(tmp_path, other):
    text = "\ufeff猫\r\n船\t\r\nLED 灯\r\n\r\n"
    data = write_folders(tmp_path / "set", "test/000", "test/001", "test/002")
    (tmp_path / "set" / "label_cn.txt").write_text(text, encoding="utf-8")
    expected = classes.open_classes(data)
    assert expected[0].chinese == ["猫", "船", "LED 灯"]
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    for name, content in other.items():
        (tmp_path / "set" / name).write_text(content, encoding="utf-8")
    for labels in (str(tmp_path / "names.txt"), *[str(tmp_path / "set" / "label_cn.txt")] * ("label_cn.txt" not in other)):
        found = classes.open_classes(data, labels)
        assert found[:2] == expected[:2] and torch.equal(found[2], expected[2])


@pytest.mark.parametrize("files", [
    {"label.txt": "Boat\nred_fox\napple pie\n", "label_cn.txt": "小船\n狐狸\n馅饼\n"},  # the official layout
    {"label.txt": "\ufeffboat\r\nRed Fox\r\nApple Pie"}, {"label_cn.txt": "船\n赤狐\n苹果派\n"},
    {"label_cn.txt": "boat\n赤狐\nApple pie\n"}])
@pytest.mark.parametrize("listed", (False, True))
def test_numbers_mean_what_the_folders_own_file_says(tmp_path, files, listed):
    """labels/ has other orders than ELEVATER's folders: 000 is a boat here, and in the labels an apple pie."""
    data = write_folders(tmp_path / "set", "test/000", "test/001", "test/002", count=1)
    for name, text in files.items():
        (tmp_path / "set" / name).write_text(text, encoding="utf-8")
    if listed:
        lines = "".join(f"test/{c:03d}/0.png\t{c}\n" for c in range(3))
        (tmp_path / "set" / "test.txt").write_text(lines, encoding="utf-8")
    found, paths, labels = classes.open_classes(data, write_labels(tmp_path / "three.txt"))
    shown = {os.path.basename(os.path.dirname(path)): found.chinese[label]
             for path, label in zip(paths, labels.tolist())}
    assert shown == {"000": "船", "001": "赤狐", "002": "苹果派"}
    assert found.chinese == ["船", "赤狐", "苹果派"] and found.english[0] == ["boat"]


@pytest.mark.parametrize("name, text, parts", [
    ("label.txt", "boat\nfox\napple pie\n", ("label.txt line 2", "got 'fox'", "(Red Fox)")),
    ("label.txt", "boat\nboat\nred fox\n", ("label.txt line 2", "got 'boat'", "(apple pie)")),
    ("label.txt", "boat\nred fox\n", ("label.txt line 3", "got 'the end'", "(apple pie)")),
    ("label.txt", "boat\nred fox\napple pie\ncat\n", ("label.txt line 4", "got 'cat'", "all have one")),
    ("label.txt", "boat\n\napple pie\n", ("label.txt line 2", "empty")),
    ("label_cn.txt", "船\n狐狸\n苹果派\n", ("label_cn.txt line 2", "狐狸", "leave out --labels")),
    ("label_cn.txt", "猫\n狗\n", ("label_cn.txt line 1", "猫", "three.txt"))])
def test_an_own_file_of_other_classes_is_refused(tmp_path, name, text, parts):
    data = write_folders(tmp_path / "set", "test/000", "test/001", "test/002")
    (tmp_path / "set" / name).write_text(text, encoding="utf-8")
    says(lambda: classes.open_classes(data, write_labels(tmp_path / "three.txt")), *parts)


def test_an_own_file_that_is_not_in_utf_8(tmp_path):
    data = write_folders(tmp_path / "set", "test/000")
    (tmp_path / "set" / "label_cn.txt").write_bytes("苹果派\n".encode("gb18030"))
    path = tmp_path / "set" / "label_cn.txt"
    for labels in ("", str(path)):
        says(lambda: classes.open_classes(data, labels), f"{path}: not UTF-8", "iconv -f GBK -t UTF-8")


@pytest.mark.parametrize("name, order, places", [
    ("caltech-101", lambda names: sorted(names, key=str.lower), {0: "手风琴", 4: "杂乱背景", 38: "占满画面的人脸特写"}),
    ("fer-2013", sorted, {1: "厌恶", 4: "平静", 6: "惊讶"}),
    ("fgvc-aircraft", lambda names: sorted(names, key=str.lower), {34: "安-12运输机", 99: "雅克-42客机"}),
    ("cifar-100", lambda names: sorted(names, key=lambda name: name != "chimpanzee"), {0: "黑猩猩", 1: "苹果"})])
def test_folders_as_elevater_numbers_them(tmp_path, name, order, places):
    """With its label.txt they open, without it they would be silently of other classes; by name they need
    none. The last spelling of a class is ELEVATER's where that is another."""
    labels = classes.read_classes(name)
    names = order([english[0] for english in labels.english])
    spelt = {english[0]: english[-1] for english in labels.english}
    data = write_folders(tmp_path / "set", *(f"test/{c:03d}" for c in range(len(names))), count=1)
    says(lambda: classes.open_classes(data, name), os.path.join("test", "000"), "label.txt", "ELEVATER")
    (tmp_path / "set" / "test.txt").write_text("test/000/0.png\t0\n", encoding="utf-8")
    says(lambda: classes.open_classes(data, name), "test.txt", "label.txt", "ELEVATER")
    (tmp_path / "set" / "test.txt").unlink()
    (tmp_path / "set" / "label.txt").write_text("\n".join(spelt[name] for name in names), encoding="utf-8")
    found, _, numbers = classes.open_classes(data, name)
    assert numbers.tolist() == list(range(len(names))) and found.numbered
    assert {place: found.chinese[place] for place in places} == places
    named = write_folders(tmp_path / "named", *(name.replace("/", "-") for name in names), count=1)
    found, paths, numbers = classes.open_classes(named, name)
    assert [classes.bare_name(found.english[c][0]) for c in numbers.tolist()] == [
        classes.bare_name(os.path.basename(os.path.dirname(path))) for path in paths]


def test_a_list_of_pictures_with_one_class_or_several(tmp_path):
    data, labels = write_folders(tmp_path / "set", "JPEGImages", count=4), tmp_path / "three.txt"
    lines = ["JPEGImages/0.png\t2", "JPEGImages/2.png\t0 1", "# a note", "JPEGImages/1.png\t"]
    (tmp_path / "set" / "test.txt").write_text("\n".join(lines), encoding="utf-8")
    _, paths, shown = classes.open_classes(data, write_labels(labels, "map-11"))
    assert [os.path.basename(path) for path in paths] == ["0.png", "2.png", "1.png"]
    assert shown.tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    says(lambda: classes.open_classes(data, write_labels(labels)), "test.txt line 2", "<TAB>number from 0 to 2, got")
    lines = [f"JPEGImages/{n}.png\t{c}" for n, c in enumerate((2, 0, 1))]
    (tmp_path / "set" / "test.txt").write_text("\n".join(lines), encoding="utf-8")
    assert classes.open_classes(data, str(labels))[2].tolist() == [2, 0, 1]
    for line, part in (("JPEGImages/0.png\t3", "0 to 2"), ("JPEGImages/0.png 1", "path<TAB>"),
                       ("JPEGImages/9.png\t1", "9.png")):
        (tmp_path / "set" / "test.txt").write_text(line, encoding="utf-8")
        says(lambda: classes.open_classes(data, str(labels)), "test.txt", part)
    (tmp_path / "set" / "test.txt").write_bytes("JPEGImages/水果.png\t1".encode("gbk"))
    says(lambda: classes.open_classes(data, str(labels)), "test.txt: not UTF-8", "iconv")
    (tmp_path / "set" / "test.txt").write_text("", encoding="utf-8")
    says(lambda: classes.open_classes(data, str(labels)), "no pictures of 3 of 3")


def test_several_classes_a_picture_need_a_list(tmp_path):
    data = write_folders(tmp_path / "set", "test/000", "test/001", "test/002")
    labels = write_labels(tmp_path / "three.txt", "map-11")
    says(lambda: classes.open_classes(data, labels), "test.txt", "path<TAB>")


@pytest.mark.parametrize("text, parts", [
    ("metric: accuracy\ncat 猫\n", ("line 2", "cat 猫")), ("metric: luck\ncat\t猫\n", ("line 1", "map-11")),
    ("template: 猫\n", ("line 1", "template")), ("cat\t猫\n", ("metric",)), ("metric: accuracy\n", ("class",)),
    ("metric: accuracy\ncat\t猫\ndog\t猫\n", ("line 3", "猫 again")),
    ("metric: accuracy\ncat\t\t猫", ("line 2",)), ("metric: accuracy\ntemplates: none\n", ("line 2", "alone")),
    ("metric: accuracy\ntemplates: alone\ncat\t猫\n", ("templates: alone", "{}")),
    ("metric: accuracy\ncat|puss\t猫\nPuss\t狗\n", ("line 3", "Puss again")),
    ("metric: accuracy\ncat\t猫\t猫咪\ndog\t猫咪\n", ("line 3", "猫咪 again")),
    ("metric: accuracy\ncat\t猫\t\n", ("line 2",)), ("metric: accuracy\na\tb\tc\td\n", ("line 2",)),
    ("metric: roc-auc\na\t猫\nb\t狗\nc\t船\n", ("two classes", "3"))])
def test_label_files_that_are_wrong(tmp_path, text, parts):
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    says(lambda: classes.read_classes(str(tmp_path / "labels.txt")), "labels.txt", *parts)


def test_labels_of_an_unknown_name_or_not_in_utf_8(tmp_path):
    says(lambda: classes.read_classes("cifar10"), "cifar10", "cifar-100")
    (tmp_path / "labels.txt").write_bytes("metric: accuracy\nboat\t船\n".encode("gb18030"))
    says(lambda: classes.read_classes(str(tmp_path / "labels.txt")), "UTF-8")


def test_classes_that_are_wrong(tmp_path):
    def refused(*parts: str):
        says(lambda: classes.open_classes(folder), *parts)

    folder = str(tmp_path / "nothing")
    refused("no such folder")
    folder = write_classes(tmp_path / "set")
    os.makedirs(tmp_path / "set" / "test" / "003")
    refused(os.path.join("test", "003"), "000 to 002")
    os.rename(tmp_path / "set" / "test" / "003", tmp_path / "set" / "test" / "cat")
    refused(os.path.join("test", "cat"), "000 to 002")
    folder = write_classes(tmp_path / "empty", count=0)
    refused("empty", "no pictures")
    folder = str(tmp_path / "labels only")
    os.makedirs(folder)
    (tmp_path / "labels only" / "label_cn.txt").write_text("猫\n", encoding="utf-8")
    refused("labels only", "no pictures")


def test_how_each_class_fares():
    labels = torch.tensor([2, 0, 0, 2, 2, 0])
    hits = torch.tensor([True, True, False, True, True, True])
    rows = classes.by_class(["猫", "船", "花"], labels, hits)  # no picture of a boat
    assert [(row["class"], row["images"]) for row in rows] == [("猫", 3), ("花", 3)]
    assert [row["accuracy"] for row in rows] == pytest.approx([200 / 3, 100])
    assert classes.class_lines(rows) == [
        "by class, the worst first (2 of 2):", "  66.7 % of 3 images of 猫", " 100.0 % of 3 images of 花"]
    assert classes.class_lines([]) == []


def test_templates_need_a_place_for_the_name(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\ufeff# a note\n一张{}的照片\n\n  {}  \n", encoding="utf-8")
    assert classes.read_templates(str(path)) == ["一张{}的照片", "{}"]
    path.write_bytes("一张{}的照片\n".encode("gbk"))
    says(lambda: classes.read_templates(str(path)), f"{path}: not UTF-8", "iconv -f GBK -t UTF-8")
    path.write_text("{}\n一张照片\n", encoding="utf-8")
    with pytest.raises(DataError, match="一张照片"):
        classes.read_templates(str(path))


def test_templates_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="nothing.txt"):
        classes.read_templates(str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("# a note\n", encoding="utf-8")
    with pytest.raises(DataError, match="empty.txt"):
        classes.read_templates(str(tmp_path / "empty.txt"))


def test_our_templates_are_valid():
    templates = classes.read_templates(classes.TEMPLATES)
    assert len(templates) >= 2 and len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 for template in templates)
