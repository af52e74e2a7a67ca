"""
The built-in data set: small drawn scenes with captions, made from a seed without any download.

There are two worlds, so that the paper's story can be told on a laptop. `en` stands for what OpenAI's CLIP
learned from: flat, bright pictures with English captions. `zh` stands for the Chinese web: the same kind of
scene, painted in ink on paper, with things that the first world has never seen (lanterns, kites, gourds ...)
and with Chinese captions. A scene has a place and one or two groups of things. A thing has a kind, a colour
and a size; a group has a number and a position. That makes some thirty million scenes in each world, and each
of them can be described in dozens of ways. So a network that ranks new captions well has learned the words,
not the sentences.

    image, caption = scenes.pair("zh", "train", index=7)
"""

import functools
import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from sources.pairs import DataError, Pairs

# ------------------------------------------------------------------------------------------------------------
# the words and the shapes

# English singular, plural | Chinese names | classifier | worlds. The lines below draw the thing by outlines
# in a box from -1 to 1, x to the right and y down: `o x y r` is a circle, `e x y rx ry` an ellipse, and
# `p x y x y ...` a polygon. They have the main colour, after + a lighter shade, after - a darker one.
KINDS_TABLE = """
apple apples | 苹果 | 个 | en zh
    o 0 .15 .75; -p -.06 -.5 .08 -.5 .14 -.95 0 -.95; +e .35 -.7 .3 .16
fish fish | 鱼 | 条 | en zh
    e -.15 0 .7 .45; p .4 0 .95 -.5 .95 .5; -o -.5 -.1 .12
house houses | 房子 | 座 | en zh
    p -.7 0 .7 0 .7 .9 -.7 .9; -p -.95 0 0 -.9 .95 0; +p -.2 .9 -.2 .35 .2 .35 .2 .9
tree trees | 树 松树 | 棵 | en zh
    -p -.14 .2 .14 .2 .14 .95 -.14 .95; p 0 -.95 .7 .4 -.7 .4
boat boats | 船 帆船 | 艘 | en zh
    p -.95 .3 .95 .3 .55 .85 -.55 .85; +p .08 -.9 .75 .2 .08 .2; -p -.08 -.95 .06 -.95 .06 .3 -.08 .3
car cars | 汽车 | 辆 | en zh
    p -.95 0 .95 0 .95 .5 -.95 .5; +p -.6 0 -.35 -.45 .35 -.45 .65 0; -o -.5 .5 .26; -o .5 .5 .26
star stars | 星星 | 颗 | en zh
    p 0 -.95 .24 -.32 .92 -.3 .38 .12 .58 .8 0 .4 -.58 .8 -.38 .12 -.92 -.3 -.24 -.32
heart hearts | 爱心 | 颗 | en zh
    o -.4 -.28 .45; o .4 -.28 .45; p -.82 -.1 .82 -.1 0 .88
flower flowers | 花 | 朵 | en zh
    o 0 -.55 .37; o .53 -.17 .37; o .33 .45 .37; o -.33 .45 .37; o -.53 -.17 .37; -o 0 0 .28
umbrella umbrellas | 雨伞 伞 | 把 | en zh
    -p -.07 0 .07 0 .07 .95 -.4 .95 -.4 .8 -.07 .8; p -.95 .15 -.7 -.4 -.3 -.75 .3 -.75 .7 -.4 .95 .15
cup cups | 杯子 茶杯 | 个 | en zh
    -p .4 -.45 .9 -.35 .9 .3 .35 .4 .35 .2 .68 .15 .68 -.15 .4 -.2; p -.7 -.7 .5 -.7 .35 .8 -.55 .8
book books | 书 | 本 | en zh
    p -.95 -.55 0 -.4 0 .7 -.95 .55; +p .95 -.55 0 -.4 0 .7 .95 .55; -p -.06 -.4 .06 -.4 .06 .7 -.06 .7
balloon balloons | 气球 | 个 | en zh
    -p -.04 .3 .04 .3 .1 .98 0 .98; e 0 -.25 .58 .68
butterfly butterflies | 蝴蝶 | 只 | en zh
    e -.48 -.38 .45 .45; e .48 -.38 .45 .45; +e -.38 .45 .34 .38; +e .38 .45 .34 .38; -e 0 0 .1 .75
cat cats | 猫 猫咪 | 只 | en zh
    p -.68 0 -.66 -.95 -.05 -.45; p .68 0 .66 -.95 .05 -.45; o 0 .15 .72; -o -.3 .02 .13; -o .3 .02 .13;
    +e 0 .42 .24 .14
flag flags | 旗子 旗 | 面 | en zh
    -p -.8 -.9 -.64 -.9 -.64 .95 -.8 .95; p -.64 -.9 .9 -.75 .6 -.35 .9 .1 -.64 -.02
hat hats | 帽子 | 顶 | en
    p -.45 -.8 .45 -.8 .5 .35 -.5 .35; -p -.95 .3 .95 .3 .95 .55 -.95 .55
key keys | 钥匙 | 把 | en
    o -.5 0 .43; +o -.5 0 .18; p -.1 -.1 .95 -.1 .95 .5 .75 .5 .75 .1 .6 .1 .6 .4 .42 .4 .42 .1 -.1 .1
mushroom mushrooms | 蘑菇 | 朵 | en
    +p -.25 0 .25 0 .32 .9 -.32 .9; p -.9 .1 -.65 -.5 -.2 -.8 .2 -.8 .65 -.5 .9 .1
rocket rockets | 火箭 | 枚 | en
    -p -.35 .3 -.75 .9 .75 .9 .35 .3; p 0 -.98 .36 -.45 .36 .7 -.36 .7 -.36 -.45; +o 0 -.2 .2
lantern lanterns | 灯笼 | 盏 | zh
    -p -.35 -.85 .35 -.85 .35 .72 -.35 .72; e 0 -.05 .85 .62; +p -.12 .7 .12 .7 .12 .98 -.12 .98
kite kites | 风筝 | 只 | zh
    -p -.05 .3 .08 .3 .35 .95 .2 .98; p 0 -.95 .62 -.25 0 .55 -.62 -.25; +p 0 -.95 0 .55 -.62 -.25
teapot teapots | 茶壶 | 把 | zh
    -p -.55 -.05 -.95 -.2 -.95 .5 -.5 .5 -.6 .3 -.78 .3 -.78 0; e 0 .25 .62 .52;
    p .45 .2 .98 -.35 .98 -.1 .5 .55; -o 0 -.35 .17
gourd gourds | 葫芦 | 个 | zh
    -p -.06 -.7 .06 -.7 .2 -.98 .1 -.98; o 0 -.38 .4; o 0 .35 .6; +e 0 -.02 .3 .08
fan fans | 扇子 折扇 | 把 | zh
    p 0 .75 -.98 -.1 -.65 -.6 0 -.8 .65 -.6 .98 -.1; -p 0 .95 -.12 .6 .12 .6; +p 0 .5 -.3 -.7 -.2 -.74;
    +p 0 .5 .3 -.7 .2 -.74
pagoda pagodas | 宝塔 塔 | 座 | zh
    p -.5 -.6 .5 -.6 .5 .95 -.5 .95; -p -.7 -.45 0 -.98 .7 -.45; -p -.85 .2 -.45 -.1 .45 -.1 .85 .2;
    -p -.95 .75 -.5 .45 .5 .45 .95 .75
"""

COLOURS = [  # English, Chinese, RGB
    ("red", "红", (222, 40, 40)), ("orange", "橙", (247, 140, 22)), ("yellow", "黄", (248, 218, 40)),
    ("green", "绿", (38, 160, 60)), ("blue", "蓝", (40, 90, 220)), ("purple", "紫", (140, 50, 180)),
    ("pink", "粉", (250, 150, 195)), ("black", "黑", (38, 38, 42)), ("white", "白", (248, 248, 248)),
]

PLACES = [  # English phrase, Chinese places and what follows them, RGB of the upper and of the lower half
    ("on the grass", ["草地", "草坪"], "上", (190, 228, 250), (120, 200, 90)),
    ("on the snow", ["雪地"], "上", (150, 178, 205), (228, 236, 244)),
    ("on the beach", ["沙滩"], "上", (120, 205, 235), (236, 214, 150)),
    ("at night", ["夜空"], "下", (22, 26, 66), (44, 46, 98)),
    ("in the desert", ["沙漠"], "里", (252, 214, 150), (214, 150, 80)),
    ("in the forest", ["树林", "森林"], "里", (84, 128, 84), (46, 84, 52)),
]
# The colours that stand bare before a name, as in 红花 and 白猫. Other pairs mean something else (黄鱼 is a
# croaker, 红树 a mangrove), or nobody says them (蓝塔).
BARE = {"花": "红黄蓝白", "伞": "红黄绿蓝黑白", "旗": "红黄绿蓝黑白", "猫": "黑白", "塔": "白"}

SIZE = 64  # pixels a side of a picture
FEW = 20_000  # scenes are kept once they are drawn; a picture has 12 kB
# These shares and sizes were found by trying (docs/experiments.md).
TWO_GROUPS = {"en": 0.2, "zh": 0.5}  # the share of scenes with two groups of things; others have one
BRIEF = {"en": 0.7, "zh": 0.5}  # the share of captions that only name the things
COLOURED = 0.5  # the share of these that also say the colours
SIZES = {"small": 0.7, "big": 1.2, "": 1.0}  # of things; captions do not mention the middle size, ""


@dataclass(frozen=True)
class Kind:
    en: str
    plural: str
    zh: list[str]
    classifier: str
    worlds: list[str]
    drawing: list[tuple[str, np.ndarray]]  # (shade, corners [n, 2]) of each outline, back to front


def read_kinds() -> list[Kind]:
    kinds = []
    for row in KINDS_TABLE.strip().split("\n"):
        if row.startswith(" "):
            kinds[-1].drawing.extend(outline(shape) for shape in row.strip(" ;").split(";"))
        else:
            english, chinese, classifier, worlds = row.split(" | ")
            kinds.append(Kind(*english.split(), chinese.split(), classifier, worlds.split(), []))
    return kinds


def outline(shape: str, steps: int = 14) -> tuple[str, np.ndarray]:
    """One outline of a drawing -> its shade ("", "+" or "-") and its corners [n, 2]."""
    kind, *numbers = shape.split()
    shade = kind[:-1]
    numbers = np.array(numbers, dtype=float)
    if kind.endswith("p"):
        return shade, numbers.reshape(-1, 2)
    x, y, rx, ry = numbers if kind.endswith("e") else (*numbers, numbers[-1])
    turn = np.arange(steps) * (2 * math.pi / steps)
    return shade, np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


KINDS = read_kinds()


# ------------------------------------------------------------------------------------------------------------
# what is in a scene


@dataclass(frozen=True)
class Group:
    kind: int
    colour: int
    count: int  # 1 to 3
    size: str  # a key of SIZES
    where: str  # "left", "right", "above", "below", or "" in the middle of a scene of one group


@dataclass(frozen=True)
class Scene:
    world: str
    place: int
    groups: tuple[Group, ...]  # one or two


def make_scene(world: str, rng: random.Random) -> Scene:
    """A random scene. Two groups always differ in kind and colour."""
    kinds = rng.sample([i for i, kind in enumerate(KINDS) if world in kind.worlds], 2)
    colours = rng.sample(range(len(COLOURS)), 2)
    two = rng.random() < TWO_GROUPS[world]
    wheres = rng.choice((("left", "right"), ("above", "below"))) if two else ("",)
    groups = tuple(
        Group(kind, colour, rng.choice((1, 1, 1, 2, 2, 3)), rng.choice(("", "", "", "small", "big")), where)
        for kind, colour, where in zip(kinds, colours, wheres))
    return Scene(world, rng.randrange(len(PLACES)), groups)


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that mentions everything in a scene, in its world's language. `rng` chooses the words."""
    return (describe_zh if scene.world == "zh" else describe_en)(scene, rng)


def describe_briefly(scene: Scene, rng: random.Random) -> str:
    """A caption that only says what there is, at times its colour, as on the web: 一张红伞和书的图片."""
    groups, coloured = list(scene.groups), rng.random() < COLOURED
    rng.shuffle(groups)
    if scene.world == "zh":
        names = [rng.choice(KINDS[group.kind].zh) for group in groups]
        names = "和".join(coloured and short_zh(group, name) or name for group, name in zip(groups, names))
        return rng.choice((names, f"一张{names}的图片", f"{names}的画", f"图里有{names}", f"画的是{names}"))
    names = " and ".join(
        a_or_an(f"{COLOURS[group.colour][0]} " * coloured + KINDS[group.kind].en) for group in groups)
    return rng.choice((names, f"a picture of {names}", f"a drawing of {names}"))


def short_zh(group: Group, name: str) -> str:
    """Colour and name without 的: 黄色茶杯 or 白猫; "" if nobody says it so."""
    colour = COLOURS[group.colour][1]
    return f"{colour}色{name}" if len(name) > 1 else colour + name if colour in BARE.get(name, "") else ""


def noun_zh(group: Group, name: str, rng: random.Random) -> str:
    """A group in words: 三只红色的猫咪, 三只白猫, 三个黄色茶杯, 三把大大的黄色扇子 or 三把黄色的小扇子."""
    colour, short = COLOURS[group.colour][1], short_zh(group, name)
    number = "一两三"[group.count - 1] + KINDS[group.kind].classifier
    if not group.size:
        return number + (short if short and rng.random() < 0.5 else f"{colour}色的{name}")
    plain, *before = {"small": ("小", "小小的", "很小的"), "big": ("大", "大大的", "很大的")}[group.size]
    if short and rng.random() < 0.5:
        return number + rng.choice(before) + short
    return f"{number}{colour}色的{plain}{name}"


def describe_zh(scene: Scene, rng: random.Random) -> str:
    _, places, after, *_ = PLACES[scene.place]
    place = rng.choice(places)
    at = place + after
    names = [rng.choice(KINDS[group.kind].zh) for group in scene.groups]
    a, *rest = (noun_zh(group, name, rng) for group, name in zip(scene.groups, names))
    if not rest:
        return rng.choice((
            f"{at}有{a}", f"{at}是{a}" if "的" in a else f"{at}的{a}",
            f"画面中间是{a}，背景是{place}", f"{a}，背景是{place}"))
    b = rest[0]
    of_a, of_b = (name if len(name) > 1 else name + "的" for name in names)
    if scene.groups[0].where == "left":
        first, second = rng.choice((("左边", "右边"), ("左侧", "右侧")))
        return rng.choice((
            f"{at}有{a}，{of_a}{second}有{b}", f"{at}有{b}，{of_b}{first}有{a}", f"{at}有{a}，{second}还有{b}",
            f"{at}，{first}是{a}，{second}是{b}", f"{first}是{a}，{second}是{b}，背景是{place}"))
    # no 汽车下方: below a thing that stands on the ground is under it
    return rng.choice((
        f"{at}有{b}，{of_b}上方有{a}", f"画面上方是{a}，下方是{b}，背景是{place}",
        f"画面上方有{a}，下方有{b}，背景是{place}"))


def a_or_an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_en(group: Group, rng: random.Random) -> str:
    """A group in words: three red cats, or three little red cats."""
    kind, colour = KINDS[group.kind], COLOURS[group.colour][0]
    small, big = rng.choice(("small ", "little ")), rng.choice(("big ", "large "))
    coloured = {"small": small, "big": big, "": ""}[group.size] + colour
    if group.count == 1:
        return a_or_an(f"{coloured} {kind.en}")
    return f"{('two', 'three')[group.count - 2]} {coloured} {kind.plural}"


def describe_en(scene: Scene, rng: random.Random) -> str:
    place = PLACES[scene.place][0]
    a, *rest = (noun_en(group, rng) for group in scene.groups)
    if not rest:
        there_is = "there is" if scene.groups[0].count == 1 else "there are"
        return rng.choice((f"{a} {place}", f"{place} {there_is} {a}", f"a picture of {a} {place}"))
    b = rest[0]
    if scene.groups[0].where == "left":
        return rng.choice((f"{a} to the left of {b}, {place}", f"{b} to the right of {a}, {place}",
                           f"{place}, {a} on the left and {b} on the right", f"{place}, {b} right of {a}"))
    return rng.choice((f"{a} above {b}, {place}", f"{b} below {a}, {place}",
                       f"{place}, {a} at the top and {b} at the bottom", f"{place}, {a} over {b}"))


# ------------------------------------------------------------------------------------------------------------
# how a scene looks


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """An RGB picture of the scene, SIZE x SIZE. It is drawn at twice the size and halved for smooth edges."""
    side = 2 * SIZE
    *_, upper, lower = PLACES[scene.place]
    ink = scene.world == "zh"
    if ink:  # paint pale colours on paper
        upper, lower = (mix(colour, (235, 222, 190), 0.45) for colour in (upper, lower))
    image = Image.new("RGB", (side, side), upper)
    canvas = ImageDraw.Draw(image)
    horizon = side * rng.uniform(0.4, 0.65)
    if ink:  # draw hills along the horizon
        points = [(side * i / 8, horizon + side * rng.uniform(-0.12, 0.05)) for i in range(9)]
        canvas.polygon([(0, side), *points, (side, side)], fill=lower)
        canvas.line(points, fill=mix(lower, (0, 0, 0), 0.5), width=2)
    else:
        canvas.rectangle((0, horizon, side, side), fill=lower)
    for group in scene.groups:
        alone = group.where == "" and group.count == 1
        share = (0.42 if alone else 0.27) * SIZES[group.size] * (1, 0.8, 0.7)[group.count - 1]
        for x, y in layout(group, rng):
            radius = side * share * rng.uniform(0.92, 1.08)
            angle = rng.uniform(-0.3, 0.3) if ink else 0.0
            draw_thing(canvas, group, (x * side, y * side), radius, angle, ink)
    return image.reduce(2)


def layout(group: Group, rng: random.Random) -> list[tuple[float, float]]:
    """The centre (x, y) of each thing of a group, as fractions of the picture's side."""
    x, y = {"": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5),
            "above": (0.5, 0.27), "below": (0.5, 0.73)}[group.where]
    spread = 0.17 if group.where in ("left", "right", "") else 0.2
    across = group.where in ("above", "below", "")
    offsets = {1: (0.0,), 2: (-spread, spread), 3: (-1.6 * spread, 0.0, 1.6 * spread)}[group.count]
    x, y = x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05)
    return [(x + offset, y + rng.uniform(-0.03, 0.03)) if across
            else (x + rng.uniform(-0.03, 0.03), y + offset) for offset in offsets]


def draw_thing(canvas: ImageDraw.ImageDraw, group: Group, centre, radius: float, angle: float, ink: bool):
    """Draw one thing of a group; centre and radius are in pixels. In ink, its colours are dull and a brush
    outlines its parts."""
    colour = COLOURS[group.colour][2]
    turn = radius * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    main = mix(colour, (120, 105, 90), 0.2) if ink else colour
    is_black = sum(colour) < 150  # which has no darker shade
    dark = mix(main, (255, 255, 255), 0.3) if is_black else mix(main, (0, 0, 0), 0.5)
    shades = {"": main, "+": mix(main, (255, 255, 255), 0.55), "-": dark}
    for shade, points in KINDS[group.kind].drawing:
        corners = (points @ turn + centre).ravel().tolist()
        canvas.polygon(corners, fill=shades[shade], outline=shades["-"])
        if ink:  # Pillow draws a polygon with a wide outline three times as slowly as this line.
            canvas.line(corners + corners[:2], fill=(30, 24, 20), width=3)


def mix(a, b, share: float) -> tuple[int, ...]:
    """Mix colour a with a share (0 to 1) of colour b."""
    return tuple(round(u + (v - u) * share) for u, v in zip(a, b))


# ------------------------------------------------------------------------------------------------------------
# as a data set


def scene(world: str, split: str, index: int, seed: int = 0) -> tuple[Scene, random.Random]:
    """Scene number `index` of a world and split, and the random generator that describes and draws it. A hash
    of its contents puts one scene in ten into "valid", so the splits share neither a scene nor a caption."""
    rng = random.Random(f"{world} {split} {seed} {index}")
    while True:
        candidate = make_scene(world, rng)
        if (zlib.crc32(repr(candidate).encode()) % 10 == 0) == (split == "valid"):
            return candidate, rng


def captioned(world: str, split: str, index: int, seed: int = 0) -> tuple[str, Scene, random.Random]:
    """The caption of scene number `index`, the scene, and the generator that draws it. In training, half of
    the captions or more are brief. In validation all are full, because a brief one fits many pictures."""
    it, rng = scene(world, split, index, seed)
    brief = split == "train" and rng.random() < BRIEF[world]
    return (describe_briefly if brief else describe)(it, rng), it, rng


def pair(world: str, split: str, index: int, seed: int = 0) -> tuple[Image.Image, str]:
    """The picture and the caption of scene number `index`."""
    caption, it, rng = captioned(world, split, index, seed)
    return draw(it, rng), caption


class ScenePairs(Pairs):
    """`count` training scenes, or a thousand for validation, no two with the same caption. They are drawn
    when they are asked for, and if they are few, kept."""

    def __init__(self, world: str, split: str, count: int):
        if split not in ("train", "valid"):
            raise DataError(f"scenes-{world}: no split {split!r}; expected train or valid")
        self.world, self.split = world, split
        self.numbers = distinct(world) if split == "valid" else range(count)
        self.image_count, self.drawn = len(self.numbers), {}
        self.positives = torch.arange(len(self.numbers))[:, None].expand(-1, 2)

    @functools.cached_property
    def texts(self) -> list[str]:
        if len(self.numbers) > FEW:
            raise DataError(f"scenes-{self.world}: its training pairs are too many to measure; take valid")
        return [self.text(row) for row in range(len(self.numbers))]

    def text(self, row: int) -> str:
        return captioned(self.world, self.split, self.numbers[row])[0]

    def image(self, row: int, size: int = 0) -> Image.Image:
        return self.pair(row)[0]

    def pair(self, i: int, size: int = 0) -> tuple[Image.Image, str]:
        if i in self.drawn:
            return self.drawn[i]
        drawn = pair(self.world, self.split, self.numbers[i])
        if len(self.numbers) <= FEW:  # they are looked at again and again
            self.drawn[i] = drawn
        return drawn

    def caption_fingerprint(self) -> str:
        return str([self.text(row) for row in range(len(self.numbers))[:9]])  # one code draws all others

    def fingerprint(self) -> str:
        raise DataError(f"scenes-{self.world}: these scenes are drawn on demand, so there are no files whose "
                        "features could be kept")


@functools.cache  # training opens the set again for each of its stages
def distinct(world: str) -> list[int]:
    """The numbers of 1,000 validation scenes, no two with the same caption."""
    found = {}
    for number in range(2000):
        found.setdefault(scene(world, "valid", number)[0], number)
    return list(found.values())[:1000]


def class_example(world: str, index: int, seed: int = 0) -> tuple[Image.Image, int, int]:
    """A picture of one thing, for zero-shot classification, the number of its kind in `kind_names` and that
    of its colour in `colour_names`."""
    rng = random.Random(f"class {world} {seed} {index}")
    kinds = [i for i, kind in enumerate(KINDS) if world in kind.worlds]
    label = index % len(kinds)
    group = Group(kinds[label], rng.randrange(len(COLOURS)), 1, rng.choice(("", "big")), "")
    return draw(Scene(world, rng.randrange(len(PLACES)), (group,)), rng), label, group.colour


def kind_names(world: str) -> list[str]:
    return [kind.zh[0] if world == "zh" else kind.en for kind in KINDS if world in kind.worlds]


def coloured() -> list[str]:
    """Templates for colours, each of which belongs to a thing: 一只{}的猫, and so on for every Chinese kind."""
    return [f"一{kind.classifier}{{}}的{kind.zh[0]}" for kind in KINDS if "zh" in kind.worlds]


def new_kinds() -> set[str]:
    """The names of the kinds that only the Chinese world has."""
    return {kind.zh[0] for kind in KINDS if kind.worlds == ["zh"]}


def colour_names(world: str) -> list[str]:
    return [zh + "色" if world == "zh" else en for en, zh, _ in COLOURS]
