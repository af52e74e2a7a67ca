"""The drawn worlds: the same for everybody, splits apart, captions that say what is drawn."""

import dataclasses
import functools
import random
import re

import numpy as np
import pytest
import torch
from conftest import array

import data
from sources import layouts, scenes
from sources.pairs import DataError, Pairs
from training import report

WORLDS = ("en", "zh")


@functools.cache
def drawn_from(world: str, split: str, count: int) -> list[tuple[scenes.Scene, str]]:
    """(scene, full caption) of the first `count`, without the pictures."""
    it = (scenes.scene(world, split, index) for index in range(count))
    return [(scene, scenes.describe(scene, rng)) for scene, rng in it]


@functools.cache
def valid_pairs() -> Pairs:
    return layouts.open_pairs("scenes-zh", "valid")


def test_worked_example():
    """One red cat on the grass, put in words and drawn."""
    kind = [kind.en for kind in scenes.KINDS].index("cat")
    colour = [english for english, _, _ in scenes.COLOURS].index("red")
    cat = scenes.Scene("en", 0, (scenes.Group(kind, colour, 1, "", ""),))
    captions = {scenes.describe(cat, random.Random(seed)) for seed in range(50)}
    assert captions == {"a red cat on the grass", "on the grass there is a red cat",
                        "a picture of a red cat on the grass"}
    picture = scenes.draw(cat, random.Random(0))
    assert picture.getpixel((0, 0)) == (190, 228, 250)  # the upper half of the place
    assert picture.getpixel((0, 63)) == (120, 200, 90)  # the lower half
    assert (array(picture) == (222, 40, 40)).all(axis=-1).any()  # the cat


# ------------------------------------------------------------------------------------------------------------
# a pure function


@pytest.mark.parametrize("world", WORLDS)
def test_a_pair_is_a_function_of_its_arguments(world):
    random.seed(1)
    image, caption = scenes.pair(world, "train", 7)
    random.seed(2)
    again, same = scenes.pair(world, "train", 7)
    assert image.tobytes() == again.tobytes() and caption == same
    assert image.mode == "RGB" and image.size == (scenes.SIZE, scenes.SIZE)
    others = [(world, "train", 8), (world, "valid", 7), (world, "train", 7, 1)]
    others.append(({"en": "zh", "zh": "en"}[world], "train", 7))
    assert all(scenes.pair(*other)[0].tobytes() != image.tobytes() for other in others)


def test_the_data_set_hands_out_these_pairs():
    pairs, train = valid_pairs(), layouts.open_pairs("scenes-zh", "train")
    for i in (0, 1, 999):
        image, caption = pairs.pair(i)
        assert pairs.positives[i].tolist() == [i, i] and pairs.texts[i] == caption
        assert pairs.image(i).tobytes() == image.tobytes()
    assert len(train) == 1_000_000 and train.pair(7)[1] == scenes.pair("zh", "train", 7)[1]
    assert len(pairs) == len(pairs.texts) == pairs.image_count == 1000


def test_a_set_of_few_scenes_keeps_its_pictures():
    """scenes-zh-5 is the first five of scenes-zh; a picture is drawn once. Of a million none is kept."""
    few, many = (layouts.open_pairs(name, "train") for name in ("scenes-zh-5", "scenes-zh"))
    assert len(few) == few.image_count == len(few.texts) == 5 and len(few.positives) == 5
    for i in range(5):
        assert few.pair(i)[1] == many.pair(i)[1] and few.image(i).tobytes() == many.image(i).tobytes()
        assert few.pair(i)[0] is few.image(i) and many.image(i) is not many.image(i)
    assert few.caption_fingerprint() != layouts.open_pairs("scenes-zh-6", "train").caption_fingerprint()
    assert layouts.open_pairs("scenes-zh-5", "valid").texts == valid_pairs().texts
    for wrong in ("scenes-zh-0", "scenes-zh-x", "scenes-fr"):
        with pytest.raises(DataError, match=f"{wrong}: no such folder"):
            layouts.open_pairs(wrong, "train")


def test_colours_are_asked_of_things():
    """A template for every Chinese kind, with its classifier."""
    assert len(scenes.coloured()) == len(scenes.kind_names("zh"))
    assert {"一只{}的猫", "一盏{}的灯笼", "一座{}的宝塔"} < set(scenes.coloured())


def test_zero_shot_examples_cycle_over_the_classes():
    for world in WORLDS:
        names = scenes.kind_names(world)
        assert len(set(names)) == len(names) >= 15
        examples = [scenes.class_example(world, index) for index in range(2 * len(names))]
        assert [kind for _, kind, _ in examples] == [*range(len(names))] * 2
        assert {colour for *_, colour in examples} <= set(range(len(scenes.colour_names(world))))
        again = scenes.class_example(world, 3)[0]
        assert examples[3][0].tobytes() == again.tobytes() != examples[3 + len(names)][0].tobytes()


# ------------------------------------------------------------------------------------------------------------
# the splits


@pytest.mark.parametrize("world", WORLDS)
def test_the_splits_share_no_scene_and_no_caption(world):
    train, valid = drawn_from(world, "train", 3000), drawn_from(world, "valid", 1000)
    for i in (0, 1):  # scenes, captions
        assert not {row[i] for row in train} & {row[i] for row in valid}


def test_validation_has_no_scene_twice_and_no_caption_of_training():
    pairs = valid_pairs()
    found = {scenes.scene("zh", "valid", number)[0] for number in pairs.numbers}
    assert len(found) == 1000
    assert not found & {scene for scene, _ in drawn_from("zh", "train", 3000)}
    assert not set(pairs.texts) & {caption for _, caption in drawn_from("zh", "train", 3000)}


def test_captions_hardly_repeat():
    assert len({caption for _, caption in drawn_from("zh", "train", 20_000)}) >= 19_000


# ------------------------------------------------------------------------------------------------------------
# the captions


def groups_of(world: str) -> list[scenes.Group]:
    """Every kind, colour, number and size that the world draws."""
    return [
        scenes.Group(kind, colour, count, size, "")
        for kind in range(len(scenes.KINDS))
        if world in scenes.KINDS[kind].worlds
        for colour in range(len(scenes.COLOURS))
        for count in (1, 2, 3)
        for size in scenes.SIZES
    ]


def test_chinese_nouns_have_number_classifier_colour_and_name():
    rng = random.Random(0)
    for group in groups_of("zh"):
        kind = scenes.KINDS[group.kind]
        noun = scenes.noun_zh(group, rng.choice(kind.zh), rng)
        assert "零一两三"[group.count] + kind.classifier in noun
        assert scenes.COLOURS[group.colour][1] in noun and any(name in noun for name in kind.zh)
        assert {"small": "小", "big": "大", "": ""}[group.size] in noun


def test_chinese_nouns_as_a_reader_would_write_them():
    """No bare 橙, 粉 or 紫, none of the others before two syllables (白气球), no 黄色塔, no two 的 in a noun,
    no number after it, no 小号."""
    rng = random.Random(0)
    for group in groups_of("zh") * 20:
        kind = scenes.KINDS[group.kind]
        noun = scenes.noun_zh(group, rng.choice(kind.zh), rng)
        shape = re.fullmatch("[一两三].(小小的|很小的|大大的|很大的)?(.)(色的[小大]?|色)?(.+)", noun)
        size, colour, joint, name = shape.groups(default="")
        assert noun[1] == kind.classifier and name in kind.zh, noun
        if not joint:
            assert len(name) == 1 and colour not in "橙粉紫" and colour + name not in ("红树", "黄鱼", "蓝塔"), noun
        if joint == "色":
            assert len(name) > 1, noun
        assert noun.count("的") <= 1, noun
        assert (size or joint[2:])[-2:-1] in ("", "小", "大", "的") and bool(group.size) == bool(size or joint[2:]), noun


def test_chinese_sentences_as_a_reader_would_write_them():
    """Things that come new into a sentence stand after 有 or 是, not before 在 or a side: of 苹果上方有三把扇子
    the apples have been named before. Nothing is 下方 of another thing, which would be under it. A place is
    not followed by 画面上方, left comes before right, and one 的 is enough in 草地上的一只白猫."""
    for _, caption in drawn_from("zh", "train", 3000):
        assert not re.search("在|号|的画|画中|[上里下]，画面|下方是.*上方是|[边侧]是.*左[边侧]是", caption), caption
        assert not re.search("[上下里]的.*的", caption), caption
        anchor = re.search("，(.{1,3}?)的?([上下]方|[左右][边侧])有", caption)
        assert not anchor or anchor[1] in caption[: anchor.start()] and anchor[2] != "下方", caption


def test_half_of_the_brief_captions_say_colours_too():
    captions = [scenes.captioned("zh", "train", index)[0] for index in range(3000)]
    brief = [caption for caption in captions if not re.search("草|雪|沙|夜|森|树林", caption)]
    assert 0.45 < len(brief) / len(captions) < 0.55
    colours = "".join(colour for _, colour, _ in scenes.COLOURS)
    assert 0.4 < sum(bool(re.search(f"[{colours}]", caption)) for caption in brief) / len(brief) < 0.5
    assert not any("色的" in caption for caption in brief)  # no 一张红色的猫的图片


def test_english_nouns_agree_in_number():
    rng = random.Random(0)
    for group in groups_of("en"):
        kind, noun = scenes.KINDS[group.kind], scenes.noun_en(group, rng)
        article, *middle = noun.split()
        assert noun.endswith(" " + (kind.en if group.count == 1 else kind.plural))
        assert article == (("an" if middle[0][0] in "aeiou" else "a"), "two", "three")[group.count - 1], noun
        assert scenes.COLOURS[group.colour][0] in middle


def test_whole_captions_say_every_group():
    for scene, caption in drawn_from("zh", "train", 1000):
        for group in scene.groups:
            kind = scenes.KINDS[group.kind]
            assert "零一两三"[group.count] + kind.classifier in caption
            assert any(name in caption for name in kind.zh), caption
    for scene, caption in drawn_from("en", "train", 1000):
        assert scenes.PLACES[scene.place][0] in caption
        for group in scene.groups:
            kind = scenes.KINDS[group.kind]
            assert re.search(rf"\b{kind.en if group.count == 1 else kind.plural}\b", caption), caption
        alone = len(scene.groups) == 1 and scene.groups[0].count > 1
        assert " there is " not in caption or not alone
        assert " there are " not in caption or alone


def test_captions_of_two_groups_say_which_side():
    sides = {("en", "left"): "left|right", ("en", "above"): "above|below|top|over", ("zh", "left"): "左|右"}
    sides["zh", "above"] = "上[面方]|下[面方]"  # 上 alone is in 草地上
    for world in WORLDS:
        for scene, caption in drawn_from(world, "train", 1000):
            for where in ("left", "above") if len(scene.groups) == 2 else ():
                said = re.search(sides[world, where], caption) is not None
                assert said == (scene.groups[0].where == where), caption


@pytest.mark.parametrize("world", WORLDS)
def test_each_kind_of_a_world_appears_and_no_other(world):
    appearing = {group.kind for scene, _ in drawn_from(world, "train", 1000) for group in scene.groups}
    assert appearing == {i for i, kind in enumerate(scenes.KINDS) if world in kind.worlds}


def test_chinese_world_knows_things_the_english_does_not():
    unknown = [kind for kind in scenes.KINDS if kind.worlds == ["zh"]]
    assert len(unknown) >= 3
    said = " ".join(caption for _, caption in drawn_from("en", "train", 1000))
    assert not any(re.search(rf"\b({kind.en}|{kind.plural})\b", said) for kind in unknown)


def test_every_token_of_every_caption_is_in_the_vocabulary():
    captions = [caption for world in WORLDS for _, caption in drawn_from(world, "train", 2000)]
    names = [name for world in WORLDS for name in scenes.kind_names(world)]
    ids = data.tokenize(captions + names)
    assert not (ids == 100).any()  # [UNK]
    assert (ids[:, -1] == 0).all()  # and none is cut
    assert data.tokenize("\U00020001")[0, 1] == 100  # such as this would be


def test_every_character_of_every_caption_has_a_glyph():
    font = report.font(20)
    captions = [caption for world in WORLDS for _, caption in drawn_from(world, "train", 2000)]
    characters = set("".join(captions + scenes.kind_names("zh") + scenes.colour_names("zh"))) - {" "}
    missing = bytes(font.getmask("\ue123"))
    assert missing == bytes(font.getmask("\U0010fff0")) != bytes(font.getmask("一"))
    assert not [char for char in sorted(characters) if bytes(font.getmask(char)) in (missing, b"")]


# ------------------------------------------------------------------------------------------------------------
# the pictures


def test_the_two_worlds_look_different():
    # en is bright and flat, zh paper and ink: less colourful, and far from each other against chance
    mean, colour = {}, {}
    for world in WORLDS:
        stack = np.stack([array(scenes.pair(world, "train", index)[0]) for index in range(200)])
        means = stack.mean(axis=(1, 2))  # [200, 3]
        mean[world], error = means.mean(axis=0), means.std(axis=0).max() / 200**0.5
        colour[world] = (stack.max(axis=-1) - stack.min(axis=-1)).mean()
    assert np.abs(mean["en"] - mean["zh"]).max() > 5 * error
    assert colour["zh"] < 0.8 * colour["en"]


def red_things(**changes) -> np.ndarray:
    """Where a picture of one red thing of each kind of the English world is red -> [kinds, h, w]."""
    red = [name for name, _, _ in scenes.COLOURS].index("red")
    kinds = [i for i, kind in enumerate(scenes.KINDS) if "en" in kind.worlds]
    group = dataclasses.replace(scenes.Group(0, red, 1, "", ""), **changes)
    every = [scenes.Scene("en", 0, (dataclasses.replace(group, kind=kind),)) for kind in kinds]
    images = np.stack([array(scenes.draw(scene, random.Random(0))) for scene in every])
    return images[..., 0] - images[..., 1:].max(axis=-1) > 80


def test_things_are_drawn_where_the_caption_says():
    half = scenes.SIZE // 2
    for where, other, axis in (("left", "right", 1), ("above", "below", 2)):  # columns, rows
        for side, first in ((where, True), (other, False)):
            red = red_things(where=side).any(axis=axis)  # [kinds, columns or rows]
            share = red[:, :half].sum(axis=1) / red.sum(axis=1)
            assert (share > 0.8).all() if first else (share < 0.2).all(), side


def test_big_is_bigger_than_small_and_three_are_more_than_one():
    area = {size: red_things(size=size).sum(axis=(1, 2)) for size in scenes.SIZES}
    assert (area["small"] < area[""]).all() and (area[""] < area["big"]).all()
    three, one = red_things(count=3, where="left"), red_things(where="left")
    assert (three.sum(axis=(1, 2)) > one.sum(axis=(1, 2))).all()


@pytest.mark.parametrize("world", WORLDS)
def test_no_two_kinds_look_alike(world):
    kinds = [i for i, kind in enumerate(scenes.KINDS) if world in kind.worlds]
    images = [
        array(scenes.draw(scenes.Scene(world, 0, (scenes.Group(kind, 0, 1, "big", ""),)), random.Random(0)))
        for kind in kinds
    ]
    flat = torch.tensor(np.stack(images), dtype=torch.float32).flatten(1)
    distances = torch.cdist(flat, flat) + 1e9 * torch.eye(len(kinds))
    assert distances.min() > 500, distances.min()
