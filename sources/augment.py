"""
Random views of a picture for training (paper, app. A.2): a random resized crop and AutoAugment. Unlike the
official code, this does not flip pictures, because captions say left and right and pictures contain writing.
"""

import math
import random

from PIL import Image, ImageEnhance, ImageOps

MEAN_COLOUR = (123, 117, 104)  # CLIP's mean in 0..255 fills uncovered corners: as pixels they are about 0


def augment(image: Image.Image, resolution: int, kind: str, rng: random.Random) -> Image.Image:
    """A random view of a picture: kind "none" is the picture itself, "crop" a random crop of S x S, "auto"
    that crop after AutoAugment."""
    if kind == "none":
        return image
    image = random_resized_crop(as_rgb(image), resolution, rng)
    return auto_augment(image, rng) if kind == "auto" else image


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent. An opaque RGB picture is returned without a copy,
    and so is what `image.convert("RGB")` returns, which shows the colours that lie under transparency."""
    # A file's RGB may have a transparent colour. `convert` notes one, too, but opaque pixels may have it.
    if image.mode == "RGB" and not (image.format and image.has_transparency_data):
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def random_resized_crop(image: Image.Image, resolution: int, rng: random.Random) -> Image.Image:
    """Squash a random box to S x S. It has 0.9 to 1.0 of the area and an aspect ratio of 3/4 to 4/3."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= width and h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # No such box fits into a picture longer than about 3:2. Like the official code, take its middle.
        w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        x, y = (width - w) // 2, (height - h) // 2
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))


# AutoAugment's 25 pairs of operations (Cubuk et al., 2019, table 9), with probability and magnitude, 0 to 10
AUTO_AUGMENT = [row.split() for row in """
posterize .4 8 rotate .6 9      | solarize .6 5 autocontrast .6 5 | equalize .8 8 equalize .6 3
posterize .6 7 posterize .6 6   | equalize .4 7 solarize .2 4     | equalize .4 4 rotate .8 8
solarize .6 3 equalize .6 7     | posterize .8 5 equalize 1 2     | rotate .2 3 solarize .6 8
equalize .6 8 posterize .4 6    | rotate .8 8 color .4 0          | rotate .4 9 equalize .6 2
equalize 0 7 equalize .8 8      | invert .6 4 equalize 1 8        | color .6 4 contrast 1 8
rotate .8 8 color 1 2           | color .8 8 solarize .8 7        | sharpness .4 7 invert .6 8
shearx .6 5 equalize 1 9        | color .4 0 equalize .6 3        | equalize .4 7 solarize .2 4
solarize .6 5 autocontrast .6 5 | invert .6 4 equalize 1 8        | color .6 4 contrast 1 8
equalize .8 8 equalize .6 3
""".strip().replace("\n", "|").split("|")]


def auto_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """Choose one of the 25 pairs and apply its two operations, each with its probability."""
    row = rng.choice(AUTO_AUGMENT)
    for name, probability, magnitude in (row[:3], row[3:]):
        if rng.random() < float(probability):
            image = apply_operation(image, name, int(magnitude), rng.choice((-1, 1)))
    return image


def apply_operation(image: Image.Image, name: str, magnitude: int, sign: int) -> Image.Image:
    """Apply an operation at a magnitude of 0 to 10 to an RGB image. `sign` is the direction of a rotation or
    shear. The scales are those of the official training, which uses timm's "original" policy."""
    share = magnitude / 10
    shear = (1, sign * 0.3 * share, 0, 0, 1, 0)  # column x + 0.3 y, row y
    fill = {"resample": Image.Resampling.BICUBIC, "fillcolor": MEAN_COLOUR}
    enhance = 0.1 + 1.8 * share  # A factor of 1 leaves the picture as it is.
    operations = {
        "rotate": lambda: image.rotate(sign * 30 * share, **fill),  # degrees
        "shearx": lambda: image.transform(image.size, Image.Transform.AFFINE, shear, **fill),
        "posterize": lambda: ImageOps.posterize(image, 4 + int(4 * share)),  # keep this many bits
        "solarize": lambda: ImageOps.solarize(image, int(256 * share)),  # invert values from here on
        "color": lambda: ImageEnhance.Color(image).enhance(enhance),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(enhance),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhance),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }
    return operations[name]()
