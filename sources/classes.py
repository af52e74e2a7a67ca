"""
Pictures with classes, and what these are called: the data of zero-shot classification (paper, sec. 3.2).

The names come from labels/NAME.txt (one of the 20 data sets of Table 11), from a file of the same kind, or
from the data set's own label_cn.txt. What a number means is said by the data set's own label.txt (English) or
label_cn.txt, a class a line, line 1 for number 0: names of labels/ are put into that order. The pictures lie
in one of three ways, told by what is there:

    test.txt                   a line a picture: path<TAB>class number, from 0; where a picture may show
                               several classes (VOC-2007) their numbers with spaces between
    test/000/ test/001/ ...    the official layout: a folder a class, numbered from 0
    test/apple_pie/ ...        a folder a class, by its English or Chinese name; test/ may be left out

Every class must have pictures and every folder a class, else the figure would be another than the paper's.
"""

import json
import os
from typing import NamedTuple

import torch

from sources.pairs import DataError

LABELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "labels")
TEMPLATES = os.path.join(LABELS, "templates.txt")
TWO_ORDERS = ("may mean two classes, for the data set and ELEVATER number them differently; expected {}, an "
              "English class name a line, line 1 for number 0, or folders that are called by the names")
METRICS = ("accuracy", "mean-per-class", "roc-auc", "map-11")


class Classes(NamedTuple):
    english: list[list[str]]  # [C], every spelling by which a folder or a line of label.txt may call them
    chinese: list[str]  # [C], what stands in the sentences
    metric: str = "accuracy"  # one of METRICS
    templates: tuple[str, ...] = ()  # for this data set, before the general ones
    alone: bool = False  # the general templates are not for it: they are for objects
    numbered: bool = True  # whether number n is certainly class n here; not where ELEVATER has another order


# ------------------------------------------------------------------------------------------------------------
# names and sentences


def read_classes(name_or_path: str) -> Classes:
    """labels/NAME.txt, or a file like it: `# note`, `metric: NAME`, `template: TEXT with {}` (none or more),
    `templates: alone` and `order: not as in ELEVATER` where they are true, and a class a line,
    `English<TAB>Chinese`, the English one with other spellings after a bar: `AD|Andorra`. DataError with the
    line for anything else."""
    path = name_or_path
    if not os.path.isfile(path):
        path = os.path.join(LABELS, f"{name_or_path}.txt")
    if not os.path.isfile(path) or os.path.samefile(path, TEMPLATES):
        known = ", ".join(name.removesuffix(".txt") for name in visible(LABELS) if name != "templates.txt")
        raise DataError(f"{name_or_path}: no such file and no data set of labels/; there are {known}")
    metric, templates, english, chinese, marks, taken = "", [], [], [], set(), set()
    for number, line in text_lines(path):
        key, _, value = line.partition(": ")
        if "\t" in line:
            names = [name.strip() for name in line.split("\t")]
            if len(names) != 2 or "" in names:
                raise DataError(f"{path} line {number}: expected English<TAB>Chinese, got {line!r}")
            spellings = names[0].split("|")
            for key, name in {plain(name): name for name in (*spellings, names[1])}.items():
                if key in taken:
                    raise DataError(f"{path} line {number}: {name} again; nothing could tell the two")
                taken.add(key)
            english.append(spellings)
            chinese.append(names[1])
        elif key == "metric" and value in METRICS:
            metric = value
        elif key == "template" and "{}" in value:
            templates.append(value)
        elif line in ("templates: alone", "order: not as in ELEVATER"):
            marks.add(key)
        else:
            raise DataError(f"{path} line {number}: {line!r}; expected English<TAB>Chinese, `template: ` "
                            f"with {{}}, `templates: alone`, `order: not as in ELEVATER`, or `metric: ` and "
                            f"one of {', '.join(METRICS)}")
    if not metric or not english:
        raise DataError(f"{path}: no {'line `metric: NAME`' if english else 'class'} in it")
    if "templates" in marks and not templates:
        raise DataError(f"{path}: `templates: alone`, but no line `template: ` with {{}} in it")
    if metric == "roc-auc" and len(english) != 2:
        raise DataError(f"{path}: roc-auc is of two classes, there are {len(english)}")
    return Classes(english, chinese, metric, tuple(templates), "templates" in marks, "order" not in marks)


def read_label_cn(folder: str) -> Classes:
    """The official layout's label_cn.txt: a Chinese name a line, line n for folder test/{n-1:03d}."""
    path = os.path.join(folder, "label_cn.txt")
    if not os.path.isfile(path):
        raise DataError(f"{path}: not there; expected one class name a line, line n for folder "
                        "test/{n-1:03d}, or --labels with a data set of labels/ or a file")
    names = read_names(path)
    return Classes([[name] for name in names], names)


def read_names(path: str) -> list[str]:
    """label.txt or label_cn.txt: a class name on every line."""
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if "" in names:
        raise DataError(f"{path} line {names.index('') + 1}: empty; expected a class name on every line")
    return names


def in_its_own_order(classes: Classes, folder: str, labels: str) -> Classes:
    """The classes as the folder's own label.txt numbers them, or else its label_cn.txt; as they are where it
    has neither. They are matched by name, so DataError for the first line that names none of them."""
    files = (os.path.join(folder, name) for name in ("label.txt", "label_cn.txt"))
    path = next(filter(os.path.isfile, files), "")
    if not path:
        return classes
    names, number_of = read_names(path), numbers_of(classes)
    order = [number_of.get(plain(name)) for name in names]
    absent = [english[0] for c, english in enumerate(classes.english) if c not in order]
    wanted = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "") or "no further line"
    for line, (name, c) in enumerate(zip(names, order), 1):
        if c is None or c in order[: line - 1]:
            raise DataError(f"{path} line {line}: {name!r} is {'no' if c is None else 'again a'} class of "
                            f"labels {labels}; expected {wanted}: correct it, in label.txt with the English "
                            "names of the labels, or leave out --labels to take label_cn.txt as it is")
    if absent:
        raise DataError(f"{path} line {len(names) + 1}: not there; labels {labels} has {len(absent)} more "
                        f"classes, {wanted}")
    return classes._replace(english=[classes.english[c] for c in order],
                            chinese=[classes.chinese[c] for c in order], numbered=True)


def numbers_of(classes: Classes) -> dict[str, int]:
    """Every name of every class, in either language, as `plain` makes it -> its number."""
    return {plain(name): c for c, (english, chinese) in enumerate(zip(classes.english, classes.chinese))
            for name in (*english, chinese)}


def read_templates(path: str) -> list[str]:
    """A template a line, each with {} where the class name goes; lines that start with # are notes."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; expected a template a line, with {{}} for the class name")
    templates = [line for _, line in text_lines(path)]
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{path}: the template {template!r} has no {{}} for the class name")
    if not templates:
        raise DataError(f"{path}: no template in it; expected at least one line with {{}}")
    return templates


def text_lines(path: str):
    """Yields (line number from 1, stripped line) for each line that is neither empty nor a note."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip(" ")  # a tab at the end stays: no class


def read_text(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None


# ------------------------------------------------------------------------------------------------------------
# pictures


def open_classes(folder: str, labels: str = "") -> tuple[Classes, list[str], torch.Tensor]:
    """A data set's classes, by `labels` (a name of labels/, a file) or else by its label_cn.txt -> (classes,
    picture paths [N], class numbers [N], or for map-11 which classes they show [N, C] of 0 and 1)."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; expected label_cn.txt and test/000, test/001 ...")
    classes = in_its_own_order(read_classes(labels), folder, labels) if labels else read_label_cn(folder)
    list_path = os.path.join(folder, "test.txt")
    if os.path.isfile(list_path):
        paths, shown = read_list(list_path, folder, classes)
    elif classes.metric == "map-11":
        raise DataError(f"{list_path}: not there; where a picture shows several classes, a list says which: "
                        "a line a picture, path<TAB>class numbers with spaces between")
    else:
        paths, shown = read_folders(folder, classes)
    labels = torch.zeros(len(paths), len(classes.chinese), dtype=torch.long)
    for row, numbers in enumerate(shown):
        labels[row, numbers] = 1
    empty = (labels.sum(dim=0) == 0).nonzero().flatten().tolist()
    if empty:
        few = ", ".join(f"{c:03d} {classes.chinese[c]}" for c in empty[:5])
        raise DataError(f"{folder}: no pictures of {len(empty)} of {len(classes.chinese)} classes ({few}"
                        f"{' ...' if len(empty) > 5 else ''}); add them, or shorten the labels")
    return classes, paths, labels if classes.metric == "map-11" else labels.argmax(dim=1)


def elevaters_pictures(folder: str, count: int) -> list[int]:
    """The rows of `open_classes` as ELEVATER orders the pictures: the official layout's index.json, a list of
    them, which some of its data sets have; the others are in that order already."""
    path = os.path.join(folder, "index.json")
    if not os.path.isfile(path):
        return list(range(count))
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON ({error})") from None
    if not isinstance(rows, list) or sorted(map(str, rows)) != sorted(map(str, range(count))):
        raise DataError(f"{path}: expected a list of the pictures' numbers, 0 to {count - 1}, each once")
    return rows


def read_list(path: str, folder: str, classes: Classes) -> tuple[list[str], list[list[int]]]:
    """-> picture paths [N] and the numbers of the classes that they show."""
    if not classes.numbered:
        raise DataError(f"{path}: its numbers {TWO_ORDERS.format(os.path.join(folder, 'label.txt'))}")
    paths, shown = [], []
    for number, line in text_lines(path):
        name, tab, numbers = line.partition("\t")
        numbers = numbers.split()
        if not tab or not all(n.isdecimal() and int(n) < len(classes.chinese) for n in numbers):
            raise DataError(f"{path} line {number}: expected path<TAB>numbers from 0 to "
                            f"{len(classes.chinese) - 1}, got {line!r}")
        if classes.metric != "map-11" and len(numbers) != 1:
            raise DataError(f"{path} line {number}: {len(numbers)} classes; {classes.metric} takes one")
        if not os.path.isfile(os.path.join(folder, name)):
            raise DataError(f"{path} line {number}: there is no picture {name} in {folder}")
        paths.append(os.path.join(folder, name))
        shown.append(list(map(int, numbers)))
    if not paths:
        raise DataError(f"{path}: no pictures in it")
    return paths, shown


def read_folders(folder: str, classes: Classes) -> tuple[list[str], list[list[int]]]:
    """-> picture paths [N], folder by folder, and their class as a list of one number."""
    test, count = os.path.join(folder, "test"), len(classes.chinese)
    if os.path.isdir(test):
        folders = visible(test)
    else:
        test = folder
        folders = [name for name in visible(folder) if os.path.isdir(os.path.join(folder, name))]
    number_of = numbers_of(classes)
    paths, shown, folder_of = [], [], {}
    for name in folders:
        place = os.path.join(test, name)
        number = number_of.get(plain(name), int(name) if name.isdecimal() else count)
        if number >= count or not os.path.isdir(place):
            raise DataError(f"{place}: no class of that name; expected folders 000 to {count - 1:03d}, or "
                            f"the classes' English names such as {classes.english[0][0]}")
        if plain(name) not in number_of and not classes.numbered:
            raise DataError(f"{place}: its number {TWO_ORDERS.format(os.path.join(folder, 'label.txt'))}")
        if number in folder_of:
            raise DataError(f"{place}: class {number:03d} {classes.chinese[number]}, which the folder "
                            f"{folder_of[number]} is already; one folder a class, numbered from 000")
        folder_of[number] = name
        for picture in visible(place):
            paths.append(os.path.join(place, picture))
            shown.append([number])
    if not paths:
        raise DataError(
            f"{test}: no pictures; expected folders 000 to {count - 1:03d} with pictures in them")
    return paths, shown


def plain(name: str) -> str:
    """A name as folders spell it, whatever their capitals, spaces and underscores: Apple_pie -> applepie."""
    return "".join(c for c in name.lower() if c.isalnum()) or name


def visible(folder: str) -> list[str]:
    """Sorted names in a folder, without what desktops leave there."""
    leftovers = ("Thumbs.db", "desktop.ini")
    return sorted(name for name in os.listdir(folder) if name[0] != "." and name not in leftovers)
