"""Pictures against the formulas, the order of training."""

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, array, noise, says
from PIL import Image

from sources import augment
import data
from sources import layouts
from sources.augment import apply_operation
from sources.order import permutation
from sources.pairs import DataError, Pairs, as_text

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


# ------------------------------------------------------------------------------------------------------------
# preprocess


def test_preprocess_gives_float32_of_the_asked_size():
    for size in ((64, 48), (1, 1), (3, 500), (224, 224)):
        pixels = data.preprocess(noise(*size), 32)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert data.preprocess(noise(5, 5)).shape == (3, 224, 224)


def test_one_colour_by_hand():
    pixels = data.preprocess(Image.new("RGB", (50, 20), (255, 0, 51)), 8)
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = torch.full((8, 8), (value - MEAN[channel]) / STD[channel])
        torch.testing.assert_close(pixels[channel], expected, rtol=0, atol=1e-6)


def test_pictures_are_squashed_not_cropped():
    image = Image.new("RGB", (100, 20), "black")
    image.paste("white", (0, 0, 25, 20))  # a centre crop of 20 x 20 would not see it
    red = data.preprocess(image, 8)[0]
    assert red[:, 0].min() > red[:, 4].max() + 3
    assert torch.equal(red[0], red[7])


def test_preprocess_is_resize_to_tensor_normalize():
    # torchvision's Resize((S, S), BICUBIC), ToTensor, Normalize, restated
    for size in ((64, 64), (97, 31), (20, 333)):
        resized = noise(*size).resize((48, 48), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
        expected = (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(data.preprocess(noise(*size), 48), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"))
def test_every_mode_is_read_as_rgb(mode):
    for size in ((40, 30), (1, 1)):
        image = Image.new("I;16", size, 77) if mode == "I;16" else noise(*size).convert(mode)
        assert torch.equal(data.preprocess(image, 16), data.preprocess(image.convert("RGB"), 16))


# ------------------------------------------------------------------------------------------------------------
# augment


@pytest.mark.parametrize("kind", ("none", "crop", "auto"))
def test_augment_is_a_function_of_its_random_numbers(kind):
    image, before = noise(60, 50), global_random_state()
    views = [data.preprocess(augment.augment(image, 32, kind, random.Random(seed)), 32) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) == (kind == "none")
    assert global_random_state() == before


def global_random_state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_augment_none_is_preprocess():
    view = augment.augment(noise(60, 50), 32, "none", random.Random(0))
    assert torch.equal(data.preprocess(view, 32), data.preprocess(noise(60, 50), 32))


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"))
def test_every_mode_can_be_augmented(mode):
    image = Image.new("I;16", (20, 20), 77) if mode == "I;16" else noise(20, 20).convert(mode)
    for seed in range(30):
        view = augment.augment(image, 16, "auto", random.Random(seed))
        assert view.size == (16, 16) and view.mode == "RGB"


def boxes_of(monkeypatch, size: tuple[int, int], count: int = 300) -> list[tuple]:
    """The boxes that random_resized_crop cuts out of a picture; the whole picture where it names none."""
    boxes = []

    def resize(image, size, resample=None, box=None, reducing_gap=None):
        boxes.append(box or (0, 0, *image.size))
        return image

    image, rng = noise(*size), random.Random(0)
    monkeypatch.setattr(Image.Image, "resize", resize)
    for _ in range(count):
        augment.random_resized_crop(image, 32, rng)
    assert len(boxes) == count
    return boxes


@pytest.mark.parametrize("size", ((400, 400), (480, 400), (400, 500)))
def test_crop_keeps_nine_tenths_of_the_area_and_bounds_the_aspect(monkeypatch, size):
    boxes = boxes_of(monkeypatch, size)
    for left, top, right, bottom in boxes:
        w, h = right - left, bottom - top
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert 0.9 - 0.004 <= w * h / (size[0] * size[1]) <= 1.0 + 0.004  # sides are rounded to whole pixels
        assert 3 / 4 - 0.004 <= w / h <= 4 / 3 + 0.004
    assert len(set(boxes)) > 100


def test_of_a_very_long_picture_the_middle_is_used():
    image = noise(600, 30)
    view = augment.random_resized_crop(image, 32, random.Random(0))
    middle = image.resize((32, 32), Image.Resampling.BICUBIC, box=(280, 0, 320, 30))  # 4:3, as in timm
    assert view.tobytes() == middle.tobytes()


OPERATIONS = "posterize rotate solarize autocontrast equalize color contrast sharpness invert shearx".split()


def test_auto_augment_has_25_pairs_of_known_operations():
    assert len(augment.AUTO_AUGMENT) == 25
    for row in augment.AUTO_AUGMENT:
        assert len(row) == 6
        for name, probability, magnitude in (row[:3], row[3:]):
            assert name in OPERATIONS and 0 <= float(probability) <= 1 and 0 <= int(magnitude) <= 10
    # the paper's table 9 begins and ends so
    assert augment.AUTO_AUGMENT[0] == ["posterize", ".4", "8", "rotate", ".6", "9"]
    assert augment.AUTO_AUGMENT[-1] == ["equalize", ".8", "8", "equalize", ".6", "3"]


def test_auto_augment_applies_operations_as_often_as_its_table_says(monkeypatch):
    seen, rng, count = [], random.Random(0), 5000
    monkeypatch.setattr(augment, "apply_operation", lambda image, *rest: seen.append(rest) or image)
    for _ in range(count):
        augment.auto_augment(None, rng)
    for name in OPERATIONS:
        cells = [cell for row in augment.AUTO_AUGMENT for cell in (row[:3], row[3:]) if cell[0] == name]
        expected = sum(float(probability) for _, probability, _ in cells) / 25
        assert abs(sum(n == name for n, _, _ in seen) / count - expected) < 0.03, name
        magnitudes = {int(magnitude) for _, _, magnitude in cells}
        assert {(m, s) for n, m, s in seen if n == name} <= {(m, s) for m in magnitudes for s in (-1, 1)}
    assert abs(sum(sign for _, _, sign in seen)) < 0.05 * len(seen)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode_and_only_geometry_has_a_direction(name):
    image = noise(24, 17)
    for magnitude in (0, 5, 10):
        left, right = (apply_operation(image, name, magnitude, sign) for sign in (-1, 1))
        assert left.size == right.size == image.size and left.mode == right.mode == "RGB"
        same = np.array_equal(array(left), array(right))
        assert same == (name not in ("rotate", "shearx") or magnitude == 0)


def test_operations_on_each_pixel_against_their_formulas():
    image = noise(16, 12)
    x = array(image)
    formulas = {
        "invert": lambda m: 255 - x,
        "posterize": lambda m: x >> (4 - 4 * m // 10) << (4 - 4 * m // 10),  # 4, 6, 8 bits stay
        "solarize": lambda m: np.where(x < 256 * m // 10, x, 255 - x),
    }
    for name, formula in formulas.items():
        for magnitude in (0, 5, 10):
            result = array(apply_operation(image, name, magnitude, 1))
            assert np.array_equal(result, formula(magnitude)), (name, magnitude)


def test_enhancements_blend_with_a_dull_picture():
    # result = dull + (0.1 + 1.8 m / 10) * (image - dull); at 5 the picture stays as it is
    image = noise(16, 12)
    x, grey = array(image), array(image.convert("L").convert("RGB"))
    dull = {"color": grey, "contrast": np.full_like(x, round(grey.mean()))}
    for name in ("color", "contrast", "sharpness"):
        assert np.array_equal(array(apply_operation(image, name, 5, 1)), x), name
        for magnitude in (0, 10) if name in dull else ():
            expected = (dull[name] + (0.1 + 0.18 * magnitude) * (x - dull[name])).clip(0, 255)
            assert np.abs(array(apply_operation(image, name, magnitude, 1)) - expected).max() <= 1, name
    blurred, sharp = (array(apply_operation(image, "sharpness", magnitude, 1)) for magnitude in (0, 10))
    assert blurred.std() < x.std() < sharp.std()


def test_autocontrast_stretches_and_equalize_flattens():
    image = noise(64, 64).point(lambda v: 100 + v // 8)
    x = array(image)
    low, high = x.min((0, 1)), x.max((0, 1))
    stretched = array(apply_operation(image, "autocontrast", 3, 1))
    assert np.abs(stretched - 255 * (x - low) / (high - low)).max() <= 1
    equalized = array(apply_operation(image, "equalize", 3, 1))
    assert 65 < equalized.std() < 85  # uniform values have 256 / sqrt(12) = 74
    # every value equally often in every channel: flat already
    values = np.tile(np.arange(256, dtype=np.uint8).repeat(16)[:, None], (1, 3))
    flat = Image.fromarray(np.random.default_rng(0).permuted(values, axis=0).reshape(64, 64, 3))
    assert np.array_equal(array(apply_operation(flat, "equalize", 3, 1)), array(flat))


def test_shear_moves_each_row_and_rotation_turns():
    ramp = Image.fromarray(np.tile(2 * np.arange(100, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    x, y = np.meshgrid(np.arange(100), np.arange(40))
    for magnitude in (0, 5, 10):
        for sign in (-1, 1):
            source = x + sign * 0.03 * magnitude * (y + 0.5)  # the column a pixel comes from
            inside = (source > 3) & (source < 96)
            sheared = array(apply_operation(ramp, "shearx", magnitude, sign))[..., 0]
            assert np.abs(sheared - 2 * source)[inside].max() <= 2
            turned = apply_operation(noise(41, 41), "rotate", magnitude, sign)
            back = apply_operation(turned, "rotate", magnitude, -sign)
            assert np.array_equal(array(turned)[20, 20], array(noise(41, 41))[20, 20])
            assert magnitude or np.array_equal(array(back), array(noise(41, 41)))
    bar = Image.new("RGB", (41, 41), "black")
    bar.paste("white", (20, 0, 21, 20))  # from the centre up; 30 degrees anticlockwise
    points = np.argwhere(array(apply_operation(bar, "rotate", 10, 1)).min(-1) > 200)
    end = points[points[:, 0].argmin()]
    assert abs(end - (20 - 20 * 3**0.5 / 2, 20 - 10)).max() <= 3


def test_what_a_turn_uncovers_becomes_zero():
    for name in ("rotate", "shearx"):
        pixels = data.preprocess(apply_operation(Image.new("RGB", (40, 40), "white"), name, 10, 1))
        assert min(pixels[:, y, x].abs().max() for y in (0, -1) for x in (0, -1)) < 0.01


# ------------------------------------------------------------------------------------------------------------
# the order of training


class Counted(Pairs):
    """`count` pairs without a file: caption i is the number i, picture i a noise; `broken` ones fail."""

    def __init__(self, count: int, broken=()):
        self.texts, self.image_count, self.broken = [str(i) for i in range(count)], count, set(broken)
        self.positives = torch.arange(count)[:, None].expand(-1, 2)

    def text(self, row: int) -> str:
        return as_text(self.texts[row], f"list line {row + 1}")

    def image(self, row: int, size: int = 0) -> Image.Image:
        if row in self.broken:
            raise DataError(f"picture {row} is broken")
        return noise(9, 8, row)


def stream(count: int, broken=(), seed: int = 0, augment: str = "crop") -> data.Stream:
    return data.Stream(Counted(count, broken), seed, 8, augment)


def load(count: int, batch_size: int, steps: range, workers=0, rank=0, world_size=1, **options) -> list:
    """-> the Batch of each step"""
    return list(data.batches(stream(count, **options), batch_size, steps, 6, workers, rank, world_size))


def numbers(ids: torch.Tensor) -> list[int]:
    """Captions of Counted, from their ids [b, T]; all below 100 are one token."""
    table = {row: i for i, row in enumerate(data.tokenize([str(i) for i in range(100)], 6)[:, 1].tolist())}
    assert len(table) == 100
    return [table[row] for row in ids[:, 1].tolist()]


def assert_same(left: list, right: list):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a.problems == b.problems


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    orders = [permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    permutation.cache_clear()
    assert permutation(50, 0, 0).tolist() == orders[0]


def test_every_pair_is_seen_once_an_epoch_across_batches_that_straddle_its_end():
    seen = [n for batch in load(10, 4, range(10)) for n in numbers(batch.ids)]  # 40 samples, 4 epochs
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_picture_and_caption_stay_together():
    for batch in load(10, 5, range(2), augment="none"):
        for view, n, key in zip(batch.pictures, numbers(batch.ids), batch.keys):
            assert torch.equal(data.to_pixels(view), data.preprocess(noise(9, 8, n), 8)) and key[0] == n


def test_workers_do_not_change_the_samples():
    options = dict(broken=(3, 4), augment="auto")
    assert_same(load(10, 4, range(5), workers=2, **options), load(10, 4, range(5), **options))


def test_ranks_together_see_the_batches_of_one():
    whole = load(20, 8, range(4), broken=(3,))
    parts = [load(20, 8, range(4), rank=rank, world_size=4, broken=(3,)) for rank in range(4)]
    steps = [list(zip(*step)) for step in zip(*parts)]  # of each step: the ranks' pictures, ids, keys ...
    together = [data.Batch(*map(torch.cat, tensors), sum(told, [])) for *tensors, told in steps]
    assert_same(together, whole)


def test_starting_at_a_step_gives_what_skipping_gives():
    assert_same(load(10, 4, range(3, 7)), load(10, 4, range(7))[3:])


def test_views_of_a_pair_change_with_the_epoch_and_the_seed():
    position = {epoch: 10 * epoch + permutation(10, 0, epoch).tolist().index(7) for epoch in (0, 1)}
    first, second = (stream(10)[position[epoch]] for epoch in (0, 1))
    assert first[1] == second[1] == "7" and not torch.equal(first[0], second[0])
    for seed in range(5):
        assert stream(10, seed=seed)[0][1] == str(permutation(10, seed, 0)[0])


def test_a_broken_pair_is_replaced_by_another_and_named():
    order = permutation(10, 0, 0).tolist()
    broken = {order[4], order[5], order[9]}
    samples = [stream(10, broken)[position] for position in range(10)]
    for position, sample in enumerate(samples):
        if order[position] in broken:
            assert int(sample.caption) not in broken and sample.problems
            assert f"picture {order[position]} is broken" in sample.problems[0]
        else:
            assert int(sample.caption) == order[position] and not sample.problems
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples, (stream(10, broken)[p] for p in range(10))))


def test_replacements_come_from_all_over_the_set():
    """Neighbours of the broken pairs would each have a twin in their batch: 20 of 2,000, a tenth of a set of
    20,000; from all over the set, a tenth of the 20 do."""
    it = stream(20_000, broken=set(range(0, 20_000, 100)))
    captions = [it[position].caption for position in range(2000)]
    replaced = sum(it.index(position) % 100 == 0 for position in range(2000))
    assert replaced > 10 and len(captions) - len(set(captions)) <= replaced / 3


def test_a_caption_that_is_no_text_is_replaced_too():
    it, first = stream(10), int(permutation(10, 0, 0)[0])
    it.pairs.texts[first] = None
    _, caption, _, problems = it[0]
    assert int(caption) != first and problems and all("not text" in problem for problem in problems)


def test_a_hundred_broken_pairs_for_one_position_stop_the_run():
    says(lambda: stream(150, broken=range(150))[0], "100 broken", "is broken")
    says(lambda: stream(3, broken=range(3))[0], "100 broken")
    order = permutation(150, 0, 0).tolist()
    _, caption, _, problems = stream(150, broken=order[:75])[0]  # half of them do not
    assert int(caption) in order[75:] and problems


def test_equal_pictures_and_captions_have_equal_keys():
    it = stream(6)
    it.pairs.texts = ["猫", "狗", "猫", "\ud800", "狗", "猫"]
    keys = [it.keys(i, it.pairs.caption(i)) for i in range(6)]
    assert [picture for picture, _ in keys] == list(range(6))
    assert len({caption for _, caption in keys}) == 3 and keys[0][1] == keys[2][1] == keys[5][1]
    it.pairs.positives = torch.tensor([[0, 3], [1, 3]])
    assert it.keys(0, "猫")[0] == it.keys(1, "狗")[0] == 3


def test_repeats_and_the_loss_they_leave():
    """Twelve pairs of three captions, in batches of twelve: each caption four times, so ln 4."""
    it = stream(12)
    it.pairs.texts = ["猫", "狗", "鱼"] * 4
    shared, floor = data.repeats(it, 12, batches=2)
    assert shared == 1 and floor == pytest.approx(math.log(4))
    assert data.repeats(stream(12), 12, batches=2) == (0, 0)


def test_drawn_scenes_have_keys_too():
    it = data.Stream(layouts.open_pairs("scenes-zh", "train"), 0, 8, "none")
    sample, index = it[5], it.index(5)
    assert sample.keys == it.keys(index, sample.caption) and sample.keys[0] == index
    assert sample.caption == it.pairs.pair(index)[1] == it.pairs.caption(index)


class Counting(torch.utils.data.Dataset):
    """Numbers, of which number 5 is broken."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return 1 / (i - 5)


class Handlers(torch.utils.data.Dataset):
    """Whether the process it is asked in ignores SIGTERM and SIGINT."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_ignore_signals_however_they_are_started(way):
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not start processes so")
    (ignored,) = data.Loader(Handlers(), num_workers=1, multiprocessing_context=way)
    assert all(ignored)


def test_a_process_that_fails_does_not_wait_for_workers_that_hear_no_signal():
    """multiprocessing would send them a SIGTERM and wait for ever."""
    code = ("import data, test_data\n"
            "loader = iter(data.Loader(test_data.Counting(), num_workers=1))\n"
            "for _ in loader: pass")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
