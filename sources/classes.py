"""
Pictures with classes, and the names of the classes: the data of zero-shot classification (paper, sec. 3.2).

The names come from labels/NAME.txt (one of the 20 data sets of Table 11) or another file of that kind, from
a plain list such as the data set's own label_cn.txt, or from folders with Chinese names. In a plain list line
1 names class 0; names of labels/ are put into the order of the data set's own label.txt (English) or
label_cn.txt. Pictures lie in one of three ways:

    test.txt                   path<TAB>class number from 0 for each picture; for VOC-2007 several with spaces
    test/000/ test/001/ ...    the official layout: a folder for each class, numbered from 0
    test/apple_pie/ ...        a folder for each class, named in English or Chinese; test/ may be left out

Every class must have pictures and every folder a class, or the result could not be compared with the paper's.
"""

import os
import re
from typing import NamedTuple

import torch

from sources.layouts import picture_path
from sources.named import at_hand, bare_name, is_published
from sources.pairs import DataError, utf8

LABELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "labels")
TEMPLATES = os.path.join(LABELS, "templates.txt")
TWO_ORDERS = ("may mean two classes, because ELEVATER numbers them differently; expected {} with an English "
              "class name on each line, line 1 for number 0, or folders named after the classes")
NAMES = ("ours", "usual", "theirs")
METRICS = ("accuracy", "mean-per-class", "roc-auc", "map-11")


class Classes(NamedTuple):
    english: list[list[str]]  # [C], spellings by which a folder or a line of label.txt may call the class
    chinese: list[str]  # [C], the name that stands in the sentences
    usual: list[str]  # [C], the same, or the name that people write where the tokenizer lacks part of it
    metric: str = "accuracy"  # one of METRICS
    templates: tuple[str, ...] = ()  # of this data set, to be used before the general ones
    alone: bool = False  # True if the general templates, which are made for objects, do not fit
    numbered: bool = True  # False if a number n in the data set need not mean class n

    def usually_named(self, wanted: bool) -> "Classes":
        return self._replace(chinese=self.usual) if wanted else self


# ------------------------------------------------------------------------------------------------------------
# names and sentences


def read_classes(name_or_path: str) -> Classes:
    """From a plain list of names, labels/NAME.txt or a file like it, of lines `English<TAB>Chinese` (maybe
    `<TAB>usual name`; other English spellings after a bar: `AD|Andorra`), `# note`, `metric: NAME`,
    `template: TEXT with {}`, `templates: alone`, `order: not as in ELEVATER`. DataError for other lines."""
    path = name_or_path if os.path.isfile(name_or_path) else os.path.join(LABELS, f"{name_or_path}.txt")
    if not os.path.isfile(path) or os.path.samefile(path, TEMPLATES):
        known = ", ".join(name.removesuffix(".txt") for name in visible(LABELS) if name != "templates.txt")
        raise DataError(f"{name_or_path}: neither a file with a class name on each line nor one of {known}")
    if not any(re.search("^(metric|templates?|order): |\t", line.strip()) for _, line in text_lines(path)):
        names = read_names(path)
        return Classes([[] for _ in names], names, names)
    metric, templates, english, chinese, usual, marks, taken = "", (), [], [], [], set(), set()
    for number, line in text_lines(path):
        key, _, value = line.partition(": ")
        names = [name.strip() for name in line.split("\t")]
        if len(names) in (2, 3) and "" not in names:
            english.append(names[0].split("|"))
            chinese.append(names[1])
            usual.append(names[-1])
            for bare, name in {bare_name(name): name for name in (*english[-1], *names[1:])}.items():
                if bare in taken:
                    raise DataError(f"{path} line {number}: {name} again; two classes need different names")
                taken.add(bare)
        elif key == "metric" and value in METRICS:
            metric = value
        elif key == "template" and "{}" in value:
            templates += (value,)
        elif line in ("templates: alone", "order: not as in ELEVATER"):
            marks.add(key)
        else:
            raise DataError(f"{path} line {number}: {line!r}; expected English<TAB>Chinese, `template: ` "
                            f"with {{}}, `templates: alone`, `order: not as in ELEVATER`, or `metric: ` and "
                            f"one of {', '.join(METRICS)}")
    if not metric or not english:
        raise DataError(f"{path}: no {'line such as `metric: accuracy`' if english else 'class'} in it")
    if "templates" in marks and not templates:
        raise DataError(f"{path}: `templates: alone`, but no line `template: ` with {{}} in it")
    if metric == "roc-auc" and len(english) != 2:
        raise DataError(f"{path}: roc-auc needs two classes, but there are {len(english)}")
    return Classes(english, chinese, usual, metric, templates, "templates" in marks, "order" not in marks)


def read_names(path: str) -> list[str]:
    """The lines of label.txt, label_cn.txt or another plain list, a class name each."""
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if "" in names:
        raise DataError(f"{path} line {names.index('') + 1}: empty; expected a class name on every line")
    return names


def in_its_own_order(classes: Classes, folder: str, labels: str) -> Classes:
    """The classes in the order of the folder's label.txt, or else of its label_cn.txt; unchanged if it has
    neither, or they are a plain list. DataError for the first line that does not name one of them."""
    files = (os.path.join(folder, name) for name in ("label.txt", "label_cn.txt"))
    path = next(filter(os.path.isfile, files), "")
    if not path or not any(classes.english):
        return classes
    names, number_of = read_names(path), numbers_of(classes)
    order = [number_of.get(bare_name(name)) for name in names]
    row = next((row for row, c in enumerate(order) if c is None or c in order[:row]), len(names))
    absent = [english[0] for c, english in enumerate(classes.english) if c not in order]
    if row < len(names) or absent:
        few, got = ", ".join(absent[:3]) or "all have one", [*names, "the end"][row]
        raise DataError(f"{path} line {row + 1}: expected one more of labels {labels} ({few}), got {got!r}; "
                        "give English names in label.txt, or leave out --labels for those of label_cn.txt")
    english, chinese, usual = ([names[c] for c in order] for names in classes[:3])
    return classes._replace(english=english, chinese=chinese, usual=usual, numbered=True)


def numbers_of(classes: Classes) -> dict[str, int]:
    """Class numbers by every name of the class, English, Chinese or usual, as it is and as a bare name."""
    names = zip(classes.english, classes.chinese, classes.usual)
    spelled = {name: c for c, (english, *chinese) in enumerate(names) for name in (*english, *chinese)}
    return {bare_name(name): c for name, c in spelled.items()} | spelled


def templates_for(classes: Classes, path: str = "") -> list[str]:
    """The templates of the file at `path`, or else those of the data set and then the general ones."""
    if path:
        return read_templates(path)
    general = [] if classes.alone else read_templates(TEMPLATES)
    return list(dict.fromkeys([*classes.templates, *general]))


def read_templates(path: str) -> list[str]:
    """A template from each line, with {} where the class name goes. Lines that start with # are notes."""
    templates = [line for _, line in text_lines(path)] if os.path.isfile(path) else []
    if not templates or not all("{}" in template for template in templates):
        raise DataError(f"{path}: expected a file of lines with {{}} for the class, such as 一张{{}}的图片, got "
                        + (", ".join(line for line in templates if "{}" not in line) or "none"))
    return templates


def text_lines(path: str):
    """Yield (line number from 1, stripped line) for each line that is neither empty nor a note."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip(" ")  # A tab at the end stays: the class number after it is missing.


def read_text(path: str) -> str:
    with open(path, "rb") as file:
        return utf8(file.read(), path).replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------------------
# pictures


def open_classes(folder: str, labels: str = "", names: str = "ours"):
    """The classes of a data set, named by `labels` (a file, or one of labels/), its label_cn.txt or folders
    -> (classes, picture paths [N], class numbers [N]; for map-11 a 1 for each class shown [N, C]). `names`,
    where `labels` has several: ours, usual, or theirs, those of label_cn.txt if it is there."""
    if is_published(folder) and not labels:  # the measure and the templates are ours, the names its own
        labels, names = folder.lower(), "theirs" if names == "ours" else names
    folder = at_hand(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; expected one with a folder of pictures for each class")
    own, list_path, test = (os.path.join(folder, name) for name in ("label_cn.txt", "test.txt", "test"))
    root = test if os.path.isdir(test) else folder
    if os.path.isfile(list_path) and not labels and not os.path.isfile(own):
        raise DataError(f"{own}: not there; expected the names of the numbers in {list_path}, line 1 for 0")
    classes = read_classes(labels or own) if labels or os.path.isfile(own) else named_by_folders(root, own)
    if names == "theirs" and labels and os.path.isfile(own):
        theirs = read_names(own)
        classes = classes._replace(english=[[] for _ in theirs], chinese=theirs, usual=theirs, numbered=True)
    elif labels:
        classes = in_its_own_order(classes, folder, labels)
    if os.path.isfile(list_path):
        paths, shown = read_list(list_path, folder, classes)
    elif classes.metric == "map-11":
        raise DataError(f"{list_path}: not there; expected lines path<TAB>class numbers with spaces between, "
                        "because a picture may show several classes")
    else:
        paths, shown = read_folders(folder, root, classes)
    shows = torch.zeros(len(paths), len(classes.chinese), dtype=torch.long)  # [N, C]
    for row, numbers in enumerate(shown):
        shows[row, numbers] = 1
    if empty := (shows.sum(dim=0) == 0).nonzero().flatten().tolist():
        called = [[classes.chinese[c], *classes.english[c], *[f"{c:03d}"] * classes.numbered] for c in empty]
        few = ", ".join(map(" or ".join, called[:5])) + (" ..." if len(empty) > 5 else "")
        raise DataError(f"{root}: no pictures of {len(empty)} of {len(classes.chinese)} classes, looked for "
                        f"{few}; add them, or leave these classes out (the same name twice is two)")
    classes = classes.usually_named(names == "usual")
    return classes, paths, shows if classes.metric == "map-11" else shows.argmax(dim=1)


def named_by_folders(root: str, own: str) -> Classes:
    """The classes by their folders' Chinese names, sorted. DataError for another name, or fewer than two."""
    names = [name for name in visible(root) if os.path.isdir(os.path.join(root, name))]
    other = [name for name in names if not re.search("[\u3400-\u9fff]", name)]
    if other or len(names) < 2:
        what = "no Chinese name, which the model needs" if other else f"{len(names)} folders in it"
        raise DataError(f"{os.path.join(root, *other[:1])}: {what}; put the pictures of each class into a "
                        f"folder with its Chinese name, such as 水果, or write the names into {own}, line 1 "
                        "for folder 000, or give --labels, a file or one of labels/")
    return Classes([[] for _ in names], names, names, numbered=False)


def read_list(path: str, folder: str, classes: Classes) -> tuple[list[str], list[list[int]]]:
    """test.txt -> picture paths [N] and the numbers of the classes that each shows."""
    if not classes.numbered:
        raise DataError(f"{path}: its numbers {TWO_ORDERS.format(os.path.join(folder, 'label.txt'))}")
    paths, shown, last, several = [], [], len(classes.chinese) - 1, classes.metric == "map-11"
    for number, line in text_lines(path):
        name, tab, numbers = line.partition("\t")
        numbers = numbers.split()
        fit = all(n.isdecimal() and int(n) <= last for n in numbers)
        if not tab or not fit or not (several or len(numbers) == 1):
            raise DataError(f"{path} line {number}: expected path<TAB>number from 0 to {last}"
                            f"{' or several' if several else ''}, got {line!r}")
        paths.append(picture_path(folder, name, f"{path} line {number}"))
        shown.append(list(map(int, numbers)))
    return paths, shown


def read_folders(folder: str, root: str, classes: Classes) -> tuple[list[str], list[list[int]]]:
    """Folders in `root` -> picture paths [N], folder by folder, and a list with the class number of each."""
    count, number_of = len(classes.chinese), numbers_of(classes)
    paths, shown = [], []
    for name in visible(root):
        place = os.path.join(root, name)
        if root == folder and not os.path.isdir(place):
            continue  # such as label.txt
        number = number_of.get(name, number_of.get(bare_name(name), int(name) if name.isdecimal() else count))
        if number >= count or not os.path.isdir(place):
            raise DataError(f"{place}: no class has that name; expected folders 000 to {count - 1:03d}, or "
                            f"names such as {(classes.english[0] or classes.chinese)[0]}")
        if not classes.numbered and name not in number_of and bare_name(name) not in number_of:
            raise DataError(f"{place}: its number {TWO_ORDERS.format(os.path.join(folder, 'label.txt'))}")
        paths += [os.path.join(place, picture) for picture in visible(place)]
        shown += [[number]] * (len(paths) - len(shown))
    return paths, shown


def visible(folder: str) -> list[str]:
    """Sorted names in a folder, without those that desktops leave there."""
    return sorted(name for name in os.listdir(folder)
                  if name[0] != "." and name not in ("Thumbs.db", "desktop.ini"))


def by_class(names: list[str], labels: torch.Tensor, hits: torch.Tensor) -> list[dict]:
    """Each class that has pictures, the worst first: its name, their number, and the percentage of `hits` [N]
    (bool) among them. labels [N]: the classes of the pictures."""
    rows = [{"class": names[c], "images": int((labels == c).sum()),
             "accuracy": 100 * hits[labels == c].float().mean().item()} for c in labels.unique().tolist()]
    return sorted(rows, key=lambda row: row["accuracy"])


def class_lines(rows: list[dict]) -> list[str]:
    """Rows of `by_class` as lines of text: all of them, or the 10 worst if there are more than 20."""
    shown = rows if len(rows) <= 20 else rows[:10]
    lines = ["{accuracy:6.1f} % of {images:,} images of {class}".format(**row) for row in shown]
    return [f"by class, the worst first ({len(shown)} of {len(rows)}):", *lines] if rows else []
