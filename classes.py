"""
Pictures with classes, and what these are called: the data of zero-shot classification (paper, sec. 3.2).

The names come from labels/NAME.txt (one of the 20 data sets of Table 11), from a file of the same kind, or
from the data set's own label_cn.txt. The pictures lie in one of three ways, told by what is there:

    test.txt                   a line a picture: path<TAB>class number, from 0; where a picture may show
                               several classes (VOC-2007) their numbers with spaces between
    test/000/ test/001/ ...    the official layout: a folder a class, numbered from 0
    test/apple_pie/ ...        a folder a class, by its English or Chinese name; test/ may be left out

Every class must have pictures and every folder a class, else the figure would be another than the paper's.
"""

import os
from typing import NamedTuple

import torch

from pairs import DataError

LABELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "labels")
TEMPLATES = os.path.join(LABELS, "templates.txt")
METRICS = ("accuracy", "mean-per-class", "roc-auc", "map-11")


class Classes(NamedTuple):
    english: list[str]  # [C], what a folder of theirs may be called
    chinese: list[str]  # [C], what stands in the sentences
    metric: str = "accuracy"  # one of METRICS
    templates: tuple[str, ...] = ()  # for this data set, before the general ones


# ------------------------------------------------------------------------------------------------------------
# names and sentences


def read_classes(name_or_path: str) -> Classes:
    """labels/NAME.txt, or a file like it: `# note`, `metric: NAME`, `template: TEXT with {}` (none or more),
    and a class a line, `English<TAB>Chinese`. DataError with the line for anything else."""
    path = name_or_path
    if not os.path.isfile(path):
        path = os.path.join(LABELS, f"{name_or_path}.txt")
    if not os.path.isfile(path) or os.path.samefile(path, TEMPLATES):
        known = ", ".join(name.removesuffix(".txt") for name in visible(LABELS) if name != "templates.txt")
        raise DataError(f"{name_or_path}: no such file and no data set of labels/; there are {known}")
    metric, templates, english, chinese = "", [], [], []
    for number, line in text_lines(path):
        key, _, value = line.partition(": ")
        if "\t" in line:
            names = [name.strip() for name in line.split("\t")]
            if len(names) != 2 or "" in names:
                raise DataError(f"{path} line {number}: expected English<TAB>Chinese, got {line!r}")
            for name, taken in zip(names, (english, chinese)):
                if name in taken:
                    raise DataError(f"{path} line {number}: {name} again; no model could tell the two")
                taken.append(name)
        elif key == "metric" and value in METRICS:
            metric = value
        elif key == "template" and "{}" in value:
            templates.append(value)
        else:
            raise DataError(f"{path} line {number}: {line!r}; expected English<TAB>Chinese, `template: ` "
                            f"with {{}}, or `metric: ` and one of {', '.join(METRICS)}")
    if not metric or not english:
        raise DataError(f"{path}: no {'line `metric: NAME`' if english else 'class'} in it")
    if metric == "roc-auc" and len(english) != 2:
        raise DataError(f"{path}: roc-auc is of two classes, there are {len(english)}")
    return Classes(english, chinese, metric, tuple(templates))


def read_label_cn(folder: str) -> Classes:
    """The official layout's label_cn.txt: a Chinese name a line, line n for folder test/{n-1:03d}."""
    path = os.path.join(folder, "label_cn.txt")
    if not os.path.isfile(path):
        raise DataError(f"{path}: not there; expected one class name a line, line n for folder "
                        "test/{n-1:03d}, or --labels with a data set of labels/ or a file")
    with open(path, encoding="utf-8-sig") as file:
        names = [line.strip() for line in file.read().rstrip().split("\n")]
    if "" in names:
        raise DataError(f"{path} line {names.index('') + 1}: empty; expected a class name on every line")
    return Classes(names, names)


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
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip() and not line.startswith("#"):
                    yield number, line.strip(" \r\n")  # a tab at the end stays: no class
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None


# ------------------------------------------------------------------------------------------------------------
# pictures


def open_classes(folder: str, labels: str = "") -> tuple[Classes, list[str], torch.Tensor]:
    """A data set's classes, by `labels` (a name of labels/, a file) or else by its label_cn.txt -> (classes,
    picture paths [N], class numbers [N], or for map-11 which classes they show [N, C] of 0 and 1)."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; expected label_cn.txt and test/000, test/001 ...")
    classes = read_classes(labels) if labels else read_label_cn(folder)
    own = os.path.join(folder, "label_cn.txt")
    if labels and os.path.isfile(own) and len(read_label_cn(folder).chinese) != len(classes.chinese):
        raise DataError(f"{own}: {len(read_label_cn(folder).chinese)} classes, labels {labels} has "
                        f"{len(classes.chinese)}; their numbers would mean something else")
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


def read_list(path: str, folder: str, classes: Classes) -> tuple[list[str], list[list[int]]]:
    """-> picture paths [N] and the numbers of the classes that they show."""
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
    number_of = {plain(name): c for names in classes[:2] for c, name in enumerate(names)}
    codes = [name.split()[0] for name in classes.english]  # country-211: "AD Andorra" lies in AD
    if len(set(codes)) == count:
        number_of |= {plain(code): c for c, code in enumerate(codes)}
    paths, shown, folder_of = [], [], {}
    for name in folders:
        place = os.path.join(test, name)
        number = number_of.get(plain(name), int(name) if name.isdecimal() else count)
        if number >= count or not os.path.isdir(place):
            raise DataError(f"{place}: no class of that name; expected folders 000 to {count - 1:03d}, or "
                            f"the classes' English names such as {classes.english[0]}")
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
