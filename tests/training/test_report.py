"""The two pictures of a run: the right size, something on them, the frame around the right answer."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from stand_ins import Counted

import model
from data import Stream
from sources import scenes
from sources.layouts import open_pairs
from training import report
from training.recipes import Config


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)  # [h, w, 3]


def near(pixels: np.ndarray, colour) -> np.ndarray:
    return np.abs(pixels - colour).max(axis=-1) < 12


@pytest.mark.parametrize("precision, has, cfg, words", [
    ("bfloat16", True, {}, "which this CPU computes in"), ("float32", False, {}, "as this CPU does not compute in bfloat16"),
    ("float32", True, {}, "as small models gain nothing from bfloat16"),
    ("float16", True, dict(precision="float16"), "as --precision says")])
def test_a_run_says_why_it_computes_as_it_does(precision, has, cfg, words, monkeypatch):
    monkeypatch.setattr(report, "cpu_has_bfloat16", lambda: has)
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    clip.precision = model.DTYPES[precision]
    assert report.why_precision(Config(**cfg), clip) == words


def test_curve_is_a_picture_with_a_line_a_name(tmp_path):
    series = {"一": [[(0, 1.0), (50_000, 40.0), (100_000, 95.0)]], "二": [[(0, 90.0), (100_000, 5.0)]]}
    report.curve(str(tmp_path / "curve.png"), series, "召回 recall")
    pixels = read(tmp_path / "curve.png")
    height, width, _ = pixels.shape
    assert width >= 600 and height >= 400
    # line 0 rises from the lower left to the upper right, line 1 falls
    for colour, rises in zip(report.LINE_COLOURS, (True, False)):
        ys, xs = np.nonzero(near(pixels, colour))
        assert len(ys) > 300
        assert (ys[xs == xs.max()].mean() < height / 2) == rises
        assert len(set(xs)) > width / 2
    report.curve(str(tmp_path / "untitled.png"), series, "")
    dark, untitled = ((it.max(axis=-1) < 60).sum() for it in (pixels, read(tmp_path / "untitled.png")))
    assert dark > untitled > 100  # the title; the numbers at the axes


def test_curve_of_a_single_point_at_zero(tmp_path):
    report.curve(str(tmp_path / "curve.png"), {"one": [[(0, 50.0)]]}, "")
    assert near(read(tmp_path / "curve.png"), report.LINE_COLOURS[0]).sum() > 30


def test_several_runs_are_their_mean_in_a_band(tmp_path):
    """Runs that end at 40 and 80: the line ends at 60, and the band reaches from 40 to 80."""
    runs = [[(0, 10.0), (100, 40.0)], [(0, 10.0), (100, 80.0)]]
    report.curve(str(tmp_path / "curve.png"), {"one": runs}, "")
    pixels = read(tmp_path / "curve.png")
    column = pixels[:, 860]  # near the right end, and left of the last point
    share = lambda y: 100 * (460 - y) / 410  # of the axis from 460 (0 %) to 50 (100 %)
    line = share(np.nonzero(near(column, report.LINE_COLOURS[0]))[0].mean())
    tinted = np.nonzero((column[:, 0] - column[:, 1] > 20) & ~near(column, report.LINE_COLOURS[0]))[0]
    slope = 1 - 10 / 810
    assert line == pytest.approx(10 + 50 * slope, abs=1)
    assert share(tinted.max()) == pytest.approx(10 + 30 * slope, abs=1)
    assert share(tinted.min()) == pytest.approx(10 + 70 * slope, abs=1)


@pytest.mark.parametrize("end, ticks", [
    (38_400, ["0", "10k", "20k", "30k"]), (100, ["0", "20", "40", "60", "80", "100"]), (0, ["0", "1"]),
    (1200, ["0", "200", "400", "600", "800", "1k", "1.2k"])])
def test_ticks_are_round(end, ticks, tmp_path, monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, said, **how: (
        written.append(said) if how.get("anchor") == "ma" else None, text(self, xy, said, **how)))
    report.curve(str(tmp_path / "curve.png"), {"one": [[(0, 1.0), (end, 2.0)]]}, "")
    assert written == ticks


def test_what_x_is_stands_below_it(tmp_path):
    for name, below in (("a", []), ("b", ["pairs seen"]), ("c", ["% of B"]), ("d", [""])):
        report.curve(str(tmp_path / f"{name}.png"), {"one": [[(0, 1.0), (9, 2.0)]]}, "", *below)
    a, b, c, d = (read(tmp_path / f"{name}.png")[485:] for name in "abcd")
    assert (a == b).all() and not (a == c).all() and (d[5:] == 255).all()


def test_contact_sheet_has_a_cell_a_picture_and_a_green_frame_around_the_right_one(tmp_path):
    greys = [Image.new("RGB", (40, 20), (value,) * 3) for value in (100, 120, 140)]
    rows = [
        ("一只猫", [(greys[0], False), (greys[1], True), (greys[2], False)]),
        ("船", [(greys[2], False), (greys[0], False)]),
        ("花", [(greys[1].convert("L"), True), (greys[2].convert("RGBA"), False)]),
    ]
    report.contact_sheet(str(tmp_path / "sheet.png"), [(query, [images]) for query, images in rows])
    pixels = read(tmp_path / "sheet.png")
    assert pixels.shape == (3 * (128 + 12 + 36) + 12, 3 * (128 + 12) + 12, 3)
    green = (pixels[..., 1] - pixels[..., ::2].max(axis=-1)) > 60
    for r, (_, images) in enumerate(rows):
        top = 12 + r * 176 + 36
        for c, (picture, right) in enumerate(images):
            left = 12 + c * 140
            ys, xs = slice(top, top + 128), slice(left, left + 128)
            assert near(pixels[ys, xs], picture.convert("RGB").getpixel((0, 0))).all(), (r, c)
            sides = green[ys, left - 3], green[ys, left + 130], green[top - 3, xs], green[top + 130, xs]
            assert all(side.all() if right else not side.any() for side in sides), (r, c)
        assert (pixels[top - 36 : top - 6] < 100).all(axis=-1).any()  # the query is written above
    assert green.sum() == 2 * ((128 + 10) ** 2 - 128**2)  # no other green


def test_contact_sheet_shows_a_transparent_picture_on_white(tmp_path):
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    report.contact_sheet(str(tmp_path / "sheet.png"), [("一只猫", [[(clear, False)]])])
    assert (read(tmp_path / "sheet.png")[48 : 48 + 128, 12 : 12 + 128] == 255).all()


def test_chinese_text_is_drawn_in_glyphs_of_its_own(tmp_path):
    masks = {bytes(report.font(20).getmask(char)) for char in "猫船花一上ab1"}
    assert len(masks) == 8


def test_repeats_and_the_loss_they_leave():
    """Twelve pairs of three captions, in batches of twelve: each caption four times, so ln 4."""
    pairs = Counted(12)
    assert report.repeats(Stream(pairs, 0, 8, "none"), 12, batches=2) == (0, 0)
    pairs.texts = ["猫", "狗", "鱼"] * 4
    shared, floor = report.repeats(Stream(pairs, 0, 8, "none"), 12, batches=2)
    assert shared == 1 and floor == pytest.approx(math.log(4))


@pytest.mark.parametrize("losses, recall, lr, words", [
    ([2.1, 2.0, 1.2, 0.9], [9, 30], 0, ""),
    ([2.1, 2.09, 2.08, 2.08], [9, 9.5], 1e-6, "never left that of guessing: raise --lr 1.0e-06 (random weights of a small model take 1e-3)"),
    ([2.1, 2.09, 2.08, 2.08], [9, 8], 1e-1, "never left that of guessing: lower --lr 1.0e-01 (the recipe's is 1.0e-03)"),
    ([2.1, 2.09, 2.08, 2.08], [9, 8], 0, "take more steps, or see whether captions belong"),
    ([2.1, 1.5, 0.9, 0.6], [40, 30], 0, "lower --lr, or find more pairs"),
])
def test_what_is_said_of_a_run_that_learnt_nothing(losses, recall, lr, words, tmp_path):
    """ln 8 = 2.08 is guessing. The end of the log decides, not a step that happened to be better."""
    cfg = Config(batch_size=8, recipe_lr=1e-3, lr_batch=1, lr=lr, out=str(tmp_path))
    log = report.Log(cfg, 4, 0, [])
    log.losses = losses
    said = log.advice([{"mean_recall": value} for value in recall])
    assert words in said and bool(words) == bool(said)


def test_a_caption_that_no_font_can_draw_is_named_by_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SYSTEM_FONTS", ("no such font",))
    rare = "\u9f98\u9f98"  # not among the characters of the scenes
    report.contact_sheet(str(tmp_path / "sheet.png"), [(text, [[(Image.new("RGB", (9, 9)), True)]]) for text in ("一只猫", rare)])
    assert capsys.readouterr().out == (
        f"   row 2 of {tmp_path / 'sheet.png'}, which no font here can write: {rare}\n")


def test_ones_own_validation_pairs_are_looked_at_too(pairs, tmp_path, capsys):
    """Six captions of the folder, the picture of each, and the six nearest; the right ones have a green frame."""
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"]).eval()
    report.look_at_retrieval({"": clip}, open_pairs(pairs, "valid"), str(tmp_path / "sheet.png"), 52)
    assert read(tmp_path / "sheet.png").shape == (36 + 6 * 176 + 12, 140 + 24 + 6 * 140 + 12, 3)
    shutil.copytree(pairs, tmp_path / "pairs")
    (tmp_path / "pairs" / "valid.jsonl").write_text('{"image": "valid0.png", "text": "一只猫"}\n', encoding="utf-8")
    report.look_at_retrieval({"": clip}, open_pairs(str(tmp_path / "pairs"), "valid"), str(tmp_path / "one.png"), 52)
    pixels = read(tmp_path / "one.png")  # a single picture, which can only be right
    assert pixels.shape == (36 + 188, 140 + 24 + 152, 3) and near(pixels, (40, 170, 80)).sum() == 138**2 - 128**2


def test_before_and_after_stand_side_by_side(pairs, tmp_path):
    """The picture of every caption, and beside it two of each of three models, under the model's name."""
    config = model.MODELS["ViT-tiny"]
    clips = {name: model.ChineseCLIP(config).eval() for name in ("after one", "after two", "after three")}
    report.look_at_retrieval(clips, open_pairs(pairs, "valid"), str(tmp_path / "sheet.png"), 52)
    pixels = read(tmp_path / "sheet.png")
    assert pixels.shape == (36 + 6 * 176 + 12, 140 + 3 * (24 + 2 * 140) + 12, 3)
    assert near(pixels[84: 84 + 128, 12: 12 + 128], pixels[90, 20]).all()  # of one colour, without a frame
    for block in range(3):
        left = 12 + 140 + 24 + block * (2 * 140 + 24)
        assert (pixels[12:30, left: left + 100] < 180).any()  # the heading
        assert (pixels[84: 84 + 128, left: left + 268] < 250).any()  # two pictures
        assert (pixels[84: 84 + 128, left + 273: left + 299] == 255).all() or block == 2  # and a gap


def test_the_table_says_what_a_row_teaches():
    result = {way: {f"R@{k}": 1.0 for k in (1, 5, 10)} for way in ("text_to_image", "image_to_text")}
    result["mean_recall"] = 1.0
    lines = report.recall_table({"after stage1, step 90": result, "after x": result}, report.TEACHES).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["after stage1, step 90", "", "after x"]
    assert lines[2].strip() == report.TEACHES["after stage1"]


def test_zero_shot_tells_known_kinds_from_new_ones(monkeypatch, capsys):
    """A judge that knows exactly the kinds of the English world, and no colour."""
    new = scenes.new_kinds()
    assert new == {"灯笼", "风筝", "茶壶", "葫芦", "扇子", "宝塔"}

    def judge(clip, names, get_image, labels, templates):
        rows = [{"class": name, "images": 20, "accuracy": 0.0 if name in new else 100.0} for name in names]
        return {"accuracy": 72.7 if "猫" in names else 0.0, "chance": 100 / len(names), "by_class": rows}

    monkeypatch.setattr(report, "zero_shot", judge)
    report.look_at_scenes("after stage1", None)
    assert capsys.readouterr().out == (
        "after stage1, zero-shot: colours 0.0 % (chance 11), kinds 72.7 % (chance 5); kinds that English pairs "
        "show too 100.0 %, new kinds 0.0 %\n")
