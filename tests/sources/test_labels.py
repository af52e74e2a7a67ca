"""
labels/: a file for each of the 20 data sets of the paper's Table 11, and the general templates.

A file is lines of five kinds, in this order: `#` comments, `metric: NAME`, `order: not as in ELEVATER` or
`templates: alone` where they are true, `template: TEXT with {}` (none or more, for this data set before the
general ones, or alone), and a class a line, `English name<TAB>Chinese name`, where the English one may have
further spellings after a bar. Where the tokenizer lacks a character of the usual Chinese name, the second
column has an alias, and a third one the usual name.
"""

import re

import pytest
from conftest import ROOT

from data import tokenize
from sources.classes import bare_name, read_classes

FOLDER = ROOT / "labels"
TABLE_11 = {  # but for Caltech-101: the table says 101, ELEVATER has 102 with BACKGROUND_Google
    "caltech-101": (102, "mean-per-class"), "cifar-10": (10, "accuracy"), "cifar-100": (100, "accuracy"),
    "country-211": (211, "accuracy"), "dtd": (47, "accuracy"), "eurosat": (10, "accuracy"),
    "fer-2013": (7, "accuracy"), "fgvc-aircraft": (100, "mean-per-class"), "food-101": (101, "accuracy"),
    "gtsrb": (43, "accuracy"), "hateful-memes": (2, "roc-auc"), "kitti-distance": (4, "accuracy"),
    "mnist": (10, "accuracy"), "oxford-flowers-102": (102, "mean-per-class"),
    "oxford-iiit-pets": (37, "mean-per-class"), "patch-camelyon": (2, "accuracy"),
    "rendered-sst2": (2, "accuracy"), "resisc-45": (45, "accuracy"), "stanford-cars": (196, "accuracy"),
    "voc-2007": (20, "map-11"),
}
PLACES = [  # data set, index from 0, English name
    ("caltech-101", 0, "BACKGROUND Google"), ("caltech-101", 5, "accordion"), ("cifar-10", 3, "cat"),
    ("cifar-100", 0, "apple"), ("cifar-100", 99, "worm"), ("country-211", 0, "AD"),
    ("country-211", 210, "ZW"), ("dtd", 0, "banded"), ("eurosat", 9, "SeaLake"),
    ("fer-2013", 6, "neutral"), ("fgvc-aircraft", 0, "707-320"), ("food-101", 0, "apple pie"),
    ("gtsrb", 14, "stop"), ("oxford-flowers-102", 0, "pink primrose"),
    ("oxford-flowers-102", 72, "water lily"), ("oxford-iiit-pets", 0, "Abyssinian"), ("resisc-45", 0, "airplane"),
    ("stanford-cars", 0, "AM General Hummer SUV 2000"),
    ("stanford-cars", 195, "smart fortwo Convertible 2012"),
    ("voc-2007", 0, "aeroplane"),
]
# Whose templates stand alone: the general ones are for objects, and would ask for "a toy angry"
ALONE = {"country-211", "dtd", "eurosat", "fer-2013", "fgvc-aircraft", "gtsrb", "kitti-distance", "mnist",
         "patch-camelyon", "rendered-sst2", "resisc-45"}
# Which ELEVATER numbers otherwise than we do (its vision_benchmark/datasets/prompts.py)
OTHER_ORDER = {"caltech-101", "cifar-100", "fer-2013", "fgvc-aircraft", "food-101", "stanford-cars"}
TRADITIONAL = set(  # characters that simplified Chinese does not write
    "車馬魚鳥龍龜貓豬雞鴨鵝鷹貝蝦蟲蟻飛機鐘錶學國圖畫書筆紙東門開關間問聞長場處員園圓圍團塊壓壞壯聲"
    "夢夾奧奪奮婦媽嬰孫寧實寫寶將專尋對導屬島嶼嶺帥師帳帶幣幾庫廚廠廣廢張彈強彎後從復徑愛慶應戰戶拋揮"
    "掃採換損搖撲擊擋據擺攝斷於時暈曆書會東條來極樂樓標樹橋橫檔檢櫃歐歡歲歷殘殺殼氣漢湯溫滅滿漁潔濕濟"
    "灣為無煙熱燈燒營爐爭爾牆牽狀獅獨獵獸現環產畢異療瘋發盤監盡眾矚碼磚礎礦祿禮種稱穀穩窩窮競築籃籠"
    "簡糧級紅紋純細終組結絕給絲經綠維網線緊編緣縣縮總織繩繪繼續羅義習聖聖聯聰聽肅腦腳臉臨與興舊艙艦艷"
    "藝節莊華萬葉蓋蔥蕭蘋蘭處號蠟術衛衝補裝裡製複襪見規視覺親觀計訂討訓記設許評詞試話該詳語說誰調談請"
    "論講證識譯議護讀變讓豐貞負財貨責貴買費貼賀資賓賞賣質賽贈趕跡踐輕輛輪輯輸轉辦農邊遊運過達違遠適選遺"
    "還郵鄉醫醬釀針釣鈕鈴鉛銀銅銳鋁鋪鋼錄錢錯鍋鍵鎖鎮鏡鐵鑽閃閉閱闊陣陰陸陽隊階際隨險雙雜雞離難雲電"
    "霧靈靜頁頂項順預頭領頸頻題顏願類顧風飯飲餅館馴駕駝駱騎騾驗驚骯髒鬆鬧鮮鯊鯨鰭鱷鳳鳴鴿鷗鹹麗麥麵黃"
    "點黨齊齒")
CHINESE = re.compile("[\u3400-\u9fff]")


def read(name: str):
    """A file of labels -> its comments, metric, templates, and pairs (English names, Chinese name)."""
    comments, metrics, templates, classes = [], [], [], []
    stages = []
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        assert line == line.strip() and line
        if line.startswith("#"):
            comments.append(line)
            stages.append(0)
        elif line.startswith("metric: "):
            metrics.append(line.removeprefix("metric: "))
            stages.append(1)
        elif line in ("order: not as in ELEVATER", "templates: alone"):
            stages.append(1)
        elif line.startswith("template: "):
            templates.append(line.removeprefix("template: "))
            stages.append(2)
        else:
            english, chinese, *usual = line.split("\t")
            assert english == english.strip() and chinese == chinese.strip() and len(usual) <= 1
            classes.append((english.split("|"), chinese))
            stages.append(3)
    assert stages == sorted(stages) and comments and len(metrics) == 1
    return comments, metrics[0], templates, classes


def general_templates() -> list[str]:
    lines = (FOLDER / "templates.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    return lines[1:]


def test_there_is_a_file_for_every_data_set_of_table_11():
    assert {path.stem for path in FOLDER.iterdir()} == {*TABLE_11, "imagenet-1k", "templates"}


@pytest.mark.parametrize("name", TABLE_11)
def test_count_and_metric_are_those_of_table_11(name):
    _, metric, _, classes = read(name)
    assert (len(classes), metric) == TABLE_11[name]


@pytest.mark.parametrize("name", TABLE_11)
def test_no_two_classes_share_a_name(name):
    """Nor any of their spellings, in either language, whatever the case, the spaces and the marks."""
    spellings = [{bare_name(spelling) for spelling in (*english, chinese)} for english, chinese in read(name)[3]]
    assert len(set.union(*spellings)) == sum(map(len, spellings))


@pytest.mark.parametrize("name", TABLE_11)
def test_templates_alone_and_orders_that_are_not_elevaters_are_said(name):
    classes = read_classes(name)
    assert classes.alone == (name in ALONE) and classes.numbered == (name not in OTHER_ORDER)
    assert len(classes.templates) >= 3 or not classes.alone


@pytest.mark.parametrize("name", TABLE_11)
def test_names_are_chinese_and_latin_letters_only_where_a_comment_says_so(name):
    comments, _, _, classes = read(name)
    latin_allowed = "Latin letters" in " ".join(comments)
    for english, chinese in classes:
        assert CHINESE.search(chinese), english
        assert latin_allowed or not re.search("[A-Za-z]", chinese), chinese


@pytest.mark.parametrize("name", [*TABLE_11, "templates"])
def test_everything_is_simplified_and_known_to_the_tokenizer(name):
    """A character that vocab.txt lacks becomes [UNK], and two such names the same sentence."""
    known = set((ROOT / "assets" / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    if name == "templates":
        texts = general_templates()
    else:
        _, _, templates, classes = read(name)
        texts = templates + [chinese for _, chinese in classes]
    characters = {c for text in texts for c in text if CHINESE.match(c)}
    assert not characters & TRADITIONAL
    assert characters <= known


def test_a_name_that_the_tokenizer_lacks_has_an_alias():
    flowers = read_classes("oxford-flowers-102")
    columbine = next(c for c, english in enumerate(flowers.english) if english == ["columbine"])
    assert (flowers.chinese[columbine], flowers.usual[columbine]) == ("漏斗菜", "耧斗菜")
    assert tokenize(["漏斗菜", "耧斗菜"], 5).tolist() == [[101, 4026, 3159, 5831, 102], [101, 100, 3159, 5831, 102]]


@pytest.mark.parametrize("name", TABLE_11)
def test_usual_names_are_there_where_a_character_is_unknown_and_some_are_not(name):
    """A name of [UNK] alone says nothing, so it stands in a comment at most; no two classes look alike."""
    classes = read_classes(name)
    aliases, usual = tokenize(classes.chinese), tokenize(classes.usual)  # [C, 52], with 100 for [UNK]
    assert not (aliases == 100).any()
    differ = [alias != name for alias, name in zip(classes.chinese, classes.usual)]
    assert (usual == 100).any(dim=1).tolist() == differ
    assert (usual > 102).any(dim=1).all() and not set("".join(classes.usual)) & TRADITIONAL
    assert len(usual.unique(dim=0)) == len(aliases.unique(dim=0)) == len(usual)


@pytest.mark.parametrize("name", TABLE_11)
def test_every_template_has_one_place_for_the_name(name):
    templates = read(name)[2]
    assert all(template.count("{}") == 1 and template == template.strip() for template in templates)
    assert len(set(templates)) == len(templates)


def test_general_templates_begin_with_the_plain_one_and_differ():
    templates = general_templates()
    assert 80 <= len(templates) <= 100 and len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 and template == template.strip() for template in templates)
    assert templates[:2] == ["一张{}的图片", "{}"]


@pytest.mark.parametrize("name, index, english", PLACES)
def test_order_is_the_data_sets_own(name, index, english):
    assert read(name)[3][index][0][0] == english


@pytest.mark.parametrize("name", ["caltech-101", "cifar-10", "cifar-100", "country-211", "dtd", "eurosat",
                                  "fgvc-aircraft", "food-101", "resisc-45", "voc-2007"])
def test_alphabetical_orders_are_sorted(name):
    english = [names[0] for names, _ in read(name)[3]]
    assert english == sorted(english)


def test_pets_are_sorted_whatever_the_case_and_countries_have_their_codes():
    pets = [english[0].lower() for english, _ in read("oxford-iiit-pets")[3]]
    assert pets == sorted(pets)
    codes = [english[0] for english, _ in read("country-211")[3]]
    assert all(re.fullmatch("[A-Z]{2}", code) for code in codes) and len(set(codes)) == 211


def test_a_cars_year_is_first_and_a_sign_has_its_shape():
    """2012款奥迪A5 reads right in every template, and a sign is told by what one sees from afar."""
    for (english, *_), chinese in read("stanford-cars")[3]:
        assert chinese.startswith(f"{english[-4:]}款") and chinese.count("款") == 1
    looks = re.compile("(红边白底|白底灰色斜线|蓝色|白边黄底|红色|红底白色横杠).*(圆形|三角形|菱形|八角形).*“.+”标志")
    signs = [chinese for _, chinese in read("gtsrb")[3]]
    assert all(looks.fullmatch(sign) for sign in signs) and not any("“" in line for line in read("gtsrb")[2])
    for word, shape in (("triangle", "三角形"), ("diamond", "菱形"), ("blue", "蓝色")):
        assert [word in english[0] for english, _ in read("gtsrb")[3]] == [shape in sign for sign in signs]


def test_every_aircraft_ends_in_its_kind():
    """A word on some names only could raise or lower their scores."""
    kinds = ("客机", "公务机", "运输机", "战斗机", "教练机", "双翼机", "小型飞机")
    assert all(chinese.endswith(kinds) for _, chinese in read("fgvc-aircraft")[3])
