"""
Training views of a picture (paper, app. A.2): random resized crop and AutoAugment. Pictures in, pictures
out; what turns them into pixels is data.preprocess.

No left-right flip, which the official code inherits from a library's default: captions say left and right,
and pictures contain writing.
"""

import math
import random

from PIL import Image, ImageEnhance, ImageOps

MEAN_COLOUR = (123, 117, 104)  # CLIP's pixel mean in 0..255: what a turn uncovers becomes 0 after normalising


def augment(image: Image.Image, resolution: int, kind: str, rng: random.Random) -> Image.Image:
    """kind "none": as it is; "crop": a random resized crop, S x S; "auto": that and AutoAugment. A pure
    function of `rng`."""
    if kind == "none":
        return image
    image = random_resized_crop(as_rgb(image), resolution, rng)
    return auto_augment(image, rng) if kind == "auto" else image


def as_rgb(image: Image.Image) -> Image.Image:
    """In RGB; itself if it is so already, where `convert` would make a copy."""
    return image if image.mode == "RGB" else image.convert("RGB")


def random_resized_crop(image: Image.Image, resolution: int, rng: random.Random) -> Image.Image:
    """A random box of 0.9 to 1.0 of the area, with an aspect ratio of 3/4 to 4/3, squashed to S x S."""
    width, height = image.size
    size = (resolution, resolution)
    for _ in range(10):
        area = width * height * rng.uniform(0.9, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= width and h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return image.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    # no such box fits a picture longer than about 3:2; as in the official training, its middle is taken then
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    x, y = (width - w) // 2, (height - h) // 2
    return image.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))


# AutoAugment's ImageNet policy (Cubuk et al., 2019, table 9): 25 pairs of (operation, probability,
# magnitude 0..10)
AUTO_AUGMENT = """
posterize .4 8 rotate .6 9      | solarize .6 5 autocontrast .6 5 | equalize .8 8 equalize .6 3
posterize .6 7 posterize .6 6   | equalize .4 7 solarize .2 4     | equalize .4 4 rotate .8 8
solarize .6 3 equalize .6 7     | posterize .8 5 equalize 1 2     | rotate .2 3 solarize .6 8
equalize .6 8 posterize .4 6    | rotate .8 8 color .4 0          | rotate .4 9 equalize .6 2
equalize 0 7 equalize .8 8      | invert .6 4 equalize 1 8        | color .6 4 contrast 1 8
rotate .8 8 color 1 2           | color .8 8 solarize .8 7        | sharpness .4 7 invert .6 8
shearx .6 5 equalize 1 9        | color .4 0 equalize .6 3        | equalize .4 7 solarize .2 4
solarize .6 5 autocontrast .6 5 | invert .6 4 equalize 1 8        | color .6 4 contrast 1 8
equalize .8 8 equalize .6 3
"""
AUTO_AUGMENT = [row.split() for row in AUTO_AUGMENT.strip().replace("\n", "|").split("|")]


def auto_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """One of the 25 pairs at random, each of its two operations with its probability."""
    name_1, p_1, m_1, name_2, p_2, m_2 = rng.choice(AUTO_AUGMENT)
    for name, p, magnitude in ((name_1, p_1, m_1), (name_2, p_2, m_2)):
        if rng.random() < float(p):
            image = apply_operation(image, name, int(magnitude), rng.choice((-1, 1)))
    return image


def apply_operation(image: Image.Image, name: str, magnitude: int, sign: int) -> Image.Image:
    """An operation at magnitude 0..10 on an RGB image; `sign` is the direction of those that have one. The
    scales are those of the library that the official training uses (timm's "original" policy)."""
    share = magnitude / 10
    size, shear = image.size, (1, sign * 0.3 * share, 0, 0, 1, 0)
    fill = {"resample": Image.Resampling.BICUBIC, "fillcolor": MEAN_COLOUR}
    enhance = 0.1 + 1.8 * share  # 1.0 leaves the picture as it is
    operations = {
        "rotate": lambda: image.rotate(sign * 30 * share, **fill),
        "shearx": lambda: image.transform(size, Image.Transform.AFFINE, shear, **fill),
        "posterize": lambda: ImageOps.posterize(image, 4 + int(4 * share)),  # bits that stay
        "solarize": lambda: ImageOps.solarize(image, int(256 * share)),  # invert what is brighter
        "color": lambda: ImageEnhance.Color(image).enhance(enhance),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(enhance),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhance),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }
    return operations[name]()
