"""
labels/imagenet-1k.txt: a class a line, `WordNet id|English name<TAB>Chinese name`, and after a further tab
the usual name where the tokenizer lacks a character of it. test_labels.py looks at the other data sets.
"""

import hashlib
import re

import pytest
from conftest import ROOT
from test_labels import TRADITIONAL

from data import tokenize
from sources.classes import bare_name

UNKNOWN = 100  # the id of [UNK]
LINES = (ROOT / "labels" / "imagenet-1k.txt").read_text(encoding="utf-8").splitlines()
CLASSES = [line.split("\t") for line in LINES if "\t" in line]
# The SHA-256 of imagenet_synsets.txt in timm 1.0.31: the 1,000 ids in the data set's order, one a line
IDS = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"


@pytest.mark.parametrize("number, line", [
    (0, "n01440764|tench\t丁桂鱼\t丁鱥"), (1, "n01443537|goldfish\t金鱼"), (134, "n02012849|crane bird\t鹤"),
    (207, "n02099601|golden retriever\t金毛寻回犬"), (232, "n02106166|Border collie\t边境牧羊犬"),
    (263, "n02113023|Pembroke\t彭布罗克柯基犬"), (264, "n02113186|Cardigan Welsh corgi\t卡迪根柯基犬"),
    (287, "n02127052|lynx\t山猫"), (388, "n02510455|giant panda\t大熊猫"),
    (474, "n02963159|cardigan\t针织开衫"), (517, "n03126707|crane machine\t起重机"),
    (546, "n03272010|electric guitar\t电吉他"), (664, "n03782006|monitor\t显示器"),
    (836, "n04355933|sunglass\t墨镜"), (837, "n04356056|sunglasses\t太阳镜"), (909, "n04596742|wok\t炒锅"),
    (926, "n07590611|hot pot\t火锅"), (980, "n09472597|volcano\t火山"), (999, "n15075141|toilet tissue\t卫生纸"),
])
def test_numbers_and_names_known_by_heart(number, line):
    assert "\t".join(CLASSES[number]) == line


def test_ids_are_those_of_the_data_set_in_its_order():
    ids = [names.split("|")[0] for names, *_ in CLASSES]
    assert len(ids) == 1000 and ids == sorted(set(ids))
    assert hashlib.sha256("".join(f"{each}\n" for each in ids).encode()).hexdigest() == IDS


def test_head_is_notes_and_the_metric():
    head = LINES[:-1000]
    assert head.pop() == "metric: accuracy" and all(line.startswith("# ") for line in head)
    assert not any("\t" in line for line in head) and max(map(len, head)) <= 110


def test_no_two_classes_share_a_name():
    names = [name for english, *chinese in CLASSES for name in (*english.split("|"), *chinese)]
    assert len({bare_name(name) for name in names}) == len(names)


def test_names_are_simplified_chinese_without_brackets():
    names = [name for _, *chinese in CLASSES for name in chinese]
    latin = {name for name in names if not re.fullmatch("[\u3400-\u9fff]+", name)}
    assert latin == {"CD播放机", "iPod音乐播放器", "T恤", "福特T型车"}  # as captions write them
    assert not TRADITIONAL & set("".join(names))


def test_tokenizer_knows_every_name_and_lacks_part_of_every_usual_one_but_not_all():
    """Two usual names of [UNK] alone would be the same sentence."""
    assert {len(columns) for columns in CLASSES} == {2, 3}
    assert UNKNOWN not in tokenize([chinese for _, chinese, *_ in CLASSES])
    usual = [columns[2] for columns in CLASSES if len(columns) == 3]
    assert (tokenize(usual) == UNKNOWN).any(dim=1).all() and (tokenize(usual) > 102).any(dim=1).all()
    assert len(tokenize([columns[-1] for columns in CLASSES]).unique(dim=0)) == 1000
