"""Pictures against the formulas, and batches: every pair once in an epoch, for any workers and ranks."""

import numpy as np
import pytest
import torch
from conftest import noise, says
from PIL import Image
from stand_ins import Counted

import data
from sources import layouts
from sources.order import permutation

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


# ------------------------------------------------------------------------------------------------------------
# pictures to pixels


def test_one_colour_by_hand():
    pixels = data.preprocess(Image.new("RGB", (50, 20), (255, 0, 51)), 8)
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = torch.full((8, 8), (value - MEAN[channel]) / STD[channel])
        torch.testing.assert_close(pixels[channel], expected, rtol=0, atol=1e-6)


def test_preprocess_gives_float32_of_the_asked_size():
    for size in ((64, 48), (1, 1), (3, 500), (224, 224)):
        pixels = data.preprocess(noise(*size), 32)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert data.preprocess(noise(5, 5)).shape == (3, 224, 224)


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


def by_hand(image: Image.Image, resize_first: bool) -> torch.Tensor:
    """[3, 16, 16] as older transformers makes them (convert, resize), or the official code (resize first)."""
    steps = [lambda x: x.convert("RGB"), lambda x: x.resize((16, 16), Image.Resampling.BICUBIC)]
    for step in reversed(steps) if resize_first else steps:
        image = step(image)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, grey_levels: int = 0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 + grey_levels / 255 / min(STD))


@pytest.mark.parametrize("mode", ("RGB", "L", "CMYK", "P", "RGBA", "LA", "PA"))
def test_pixels_of_opaque_pictures_are_those_of_transformers_and_the_official_code(mode):
    image = noise(40, 30).convert(mode)
    assert_near(data.preprocess(image, 16), by_hand(image, False))
    if mode[0] != "P":  # of a palette the official code takes the nearest pixels
        assert_near(data.preprocess(image, 16), by_hand(image, True), grey_levels=mode == "CMYK")


@pytest.mark.parametrize("mode", ("RGBA", "LA"))
def test_transparency_is_white_and_both_other_ways_are_at_hand(mode):
    image = noise(40, 30).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((40, 30)).point(lambda alpha: max(0, alpha - 128)))
    ours, first = data.preprocess(image, 16), image.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB")
    white, black = (data.preprocess(Image.new("RGB", (1, 1), colour), 16) for colour in ("white", "black"))
    assert torch.equal(ours[:, :6], white[:, :6])  # the upper half is transparent
    assert torch.equal(by_hand(image, True)[:, :6], black[:, :6])
    assert (by_hand(image, False)[:, :6] - white[:, :6]).abs().max() > 1  # what lies there: noise
    assert_near(data.preprocess(image.convert("RGB"), 16), by_hand(image, False))
    assert_near(data.preprocess(first, 16), by_hand(image, True))


# ------------------------------------------------------------------------------------------------------------
# pairs to batches


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


def test_drawn_scenes_have_keys_too():
    it = data.Stream(layouts.open_pairs("scenes-zh", "train"), 0, 8, "none")
    sample, index = it[5], it.index(5)
    assert sample.keys == it.keys(index, sample.caption) and sample.keys[0] == index
    assert sample.caption == it.pairs.pair(index)[1] == it.pairs.caption(index)
