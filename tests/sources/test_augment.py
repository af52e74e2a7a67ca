"""Training views: the crop, AutoAugment's table and each of its operations against a formula."""

import io
import random

import numpy as np
import pytest
import torch
from conftest import array, noise
from PIL import Image

import data
from sources import augment
from sources.augment import apply_operation, as_rgb


def test_worked_example():
    """Three operations on one pixel by hand."""
    pixel = Image.new("RGB", (1, 1), (255, 100, 51))
    for name, magnitude, expected in (
            ("invert", 0, (0, 155, 204)),  # 255 - x
            ("solarize", 5, (0, 100, 51)),  # invert what is 128 or brighter
            ("posterize", 0, (240, 96, 48))):  # keep the upper 4 bits: 16 * (x // 16)
        assert apply_operation(pixel, name, magnitude, 1).getpixel((0, 0)) == expected, name


@pytest.mark.parametrize("kind", ("none", "crop", "auto"))
def test_augment_is_a_function_of_its_random_numbers(kind):
    image, before = noise(60, 50), global_random_state()
    views = [data.preprocess(augment.augment(image, 32, kind, random.Random(seed)), 32) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) == (kind == "none")
    assert global_random_state() == before


def global_random_state() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_none_leaves_the_picture_as_it_is():
    view = augment.augment(noise(60, 50), 32, "none", random.Random(0))
    assert torch.equal(data.preprocess(view, 32), data.preprocess(noise(60, 50), 32))


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"))
def test_every_mode_can_be_augmented(mode):
    image = Image.new("I;16", (20, 20), 77) if mode == "I;16" else noise(20, 20).convert(mode)
    for seed in range(30):
        view = augment.augment(image, 16, "auto", random.Random(seed))
        assert view.size == (16, 16) and view.mode == "RGB"


def test_transparency_is_white_by_hand():
    """Orange, (255, 120, 0), over white: all of it, two fifths of it, none of it."""
    for alpha, expected in ((255, (255, 120, 0)), (102, (255, 201, 153)), (0, (255, 255, 255))):
        assert as_rgb(Image.new("RGBA", (1, 1), (255, 120, 0, alpha))).getpixel((0, 0)) == expected


def from_file(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    image = Image.open(file)
    image.load()
    return image


def black_on_clear(mode: str) -> Image.Image:
    """As read from a file: two pixels of which the left one is transparent and the right one has a colour; in
    a file without transparency both would be black or dark."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (10, 10, 10, 255))
        return from_file(image.convert(mode))
    if mode in ("P by index", "GIF", "P by bytes"):  # both entries of the palette are black
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        return from_file(image, "GIF" if mode == "GIF" else "PNG",
                         transparency=b"\0\xff" if mode == "P by bytes" else 0)
    image = Image.new(mode, (2, 1))  # with one colour that is transparent, tRNS
    image.putpixel((1, 0), {"1": 1, "L": 10, "RGB": (10, 10, 10)}[mode])
    return from_file(image, transparency=(0, 0, 0) if mode == "RGB" else 0)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ("RGBA", "LA", "P by index", "P by bytes", "GIF", "1", "L", "RGB"))
def test_every_kind_of_transparency_is_white_unless_the_picture_is_converted_first(mode):
    image = black_on_clear(mode)
    assert image.mode == mode or mode[0] in "PG" and image.mode == "P"
    official = image.convert("RGB")
    assert official.getpixel((0, 0)) == (0, 0, 0)  # what lies under it
    seen, right = as_rgb(image), official.getpixel((1, 0))
    assert seen.mode == "RGB" and list(seen.get_flattened_data()) == [(255, 255, 255), right]
    assert as_rgb(official) is official and as_rgb(seen) is seen


@pytest.mark.parametrize("mode", ("RGB", "1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"))
def test_an_opaque_picture_becomes_what_convert_makes_of_it(mode):
    image = Image.new("I;16", (20, 20), 77) if mode == "I;16" else noise(20, 20).convert(mode)
    assert as_rgb(image).tobytes() == image.convert("RGB").tobytes()
    assert (as_rgb(image) is image) == (mode == "RGB")  # no copy


def test_training_views_see_white_too():
    image = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    for kind in ("none", "crop"):
        view = augment.augment(image, 8, kind, random.Random(0))
        assert torch.equal(data.squash(view, 8), torch.full((3, 8, 8), 255, dtype=torch.uint8)), kind


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


def test_the_middle_of_a_very_long_picture_is_used():
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


def test_corners_that_a_turn_uncovers_become_zero():
    for name in ("rotate", "shearx"):
        pixels = data.preprocess(apply_operation(Image.new("RGB", (40, 40), "white"), name, 10, 1))
        assert min(pixels[:, y, x].abs().max() for y in (0, -1) for x in (0, -1)) < 0.01
