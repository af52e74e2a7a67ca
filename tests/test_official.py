"""Beside the official code: fifty steps from the same weights and batches; its scripts read our predictions;
the parts of augmentation."""

import argparse
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, noise, shake, write_folder
from PIL import Image
from stand_ins import lines_of, write_official

import data
from tools.measure import __main__ as measure
import model
from sources import layouts
import train
from sources.augment import MEAN_COLOUR, apply_operation, random_resized_crop
from bert import BertConfig
from vit import ViTConfig

official = pytest.importorskip("cn_clip.clip.model", reason="the official code, cn_clip, is not installed")
STEPS, BATCH, LR = 50, 16, 1e-3
EMOJI = ROOT.parent / "shared" / "data" / "emoji-cn"  # real pairs, where they are at hand
SMALL = model.ModelConfig(
    64, ViTConfig(64, 16, width=128, layers=3), BertConfig(layers=3, width=128, heads=2, dropout=0.0))


def their_curve(start: dict[str, torch.Tensor], batches) -> list[float]:
    """The loss of each step of cn_clip's own model, loss and optimizer groups (cn_clip/training)."""
    from cn_clip.training.scheduler import cosine_lr
    from cn_clip.training.train import get_loss
    v, t = SMALL.visual, SMALL.text
    clip = official.CLIP(
        SMALL.embed_dim, v.resolution, v.layers, v.width, v.patch_size, t.vocab_size, 0.0, "gelu", 0.0,
        t.width, 0.02, 4 * t.width, t.max_positions, t.heads, t.layers, t.token_types).float()
    clip.load_state_dict(start)
    clip.train()
    groups = {True: [], False: []}
    for name, p in clip.named_parameters():
        groups[any(part in name for part in ("bn", "ln", "bias", "logit_scale"))].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": 1e-3}],
        lr=LR, betas=(0.9, 0.98), eps=1e-6)
    scheduler = cosine_lr(optimizer, LR, 5, STEPS)
    args = argparse.Namespace(
        accum_freq=1, mask_ratio=0, distillation=False, aggregate=False, local_device_rank=0,
        report_training_batch_acc=False)
    losses = []
    for step, batch in enumerate(batches):
        scheduler(step)
        optimizer.zero_grad()
        loss, _ = get_loss(clip, data.to_pixels(batch.pictures), batch.ids, torch.nn.CrossEntropyLoss(),
                           torch.nn.CrossEntropyLoss(), args)
        loss.backward()
        optimizer.step()
        clip.logit_scale.data.clamp_(0, 4.6052)
        losses.append(loss.item())
    return losses


def test_fifty_steps_give_the_official_curve(tmp_path, monkeypatch):
    if (EMOJI / "train_imgs.tsv").is_file():
        folder = str(EMOJI)
    else:
        write_folder(tmp_path / "pairs", 200)
        folder = str(tmp_path / "pairs")
    monkeypatch.setitem(model.MODELS, "small", SMALL)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # they know no CPU
    cfg = train.Config(model="small", data=folder, batch_size=BATCH, steps=STEPS, lr=LR, warmup=5,
                       eval_every=STEPS, workers=0, log_every=1, out=str(tmp_path / "ours"), device="cpu",
                       weight_decay=1e-3)
    start = train.build(cfg, torch.device("cpu")).state_dict()
    # measuring recall before and after takes longer than training, and is not what is compared
    monkeypatch.setattr(train, "retrieval", lambda *_: {
        "text_to_image": {"R@1": 0.0}, "image_to_text": {"R@1": 0.0}, "mean_recall": 0.0})
    train.train("act", cfg)
    log = [json.loads(line) for line in (tmp_path / "ours" / "log.jsonl").read_text().splitlines()]
    ours = [entry["loss"] for entry in log if "loss" in entry]
    stream = data.Stream(layouts.open_pairs(folder, "train"), cfg.seed, 64, cfg.augment)
    theirs = their_curve(start, data.batches(stream, BATCH, range(STEPS), 52, 0))
    assert len(ours) == len(theirs) == STEPS and theirs[-1] < theirs[0]
    worst = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"worst difference of {STEPS} losses: {worst:.1e}, from {theirs[0]:.3f} to {theirs[-1]:.3f}")
    assert worst < 1e-4


@pytest.mark.parametrize("direction, script", [
    ("text-to-image", "evaluation.py"), ("image-to-text", "evaluation_tr.py")])
def test_the_official_scripts_score_our_predictions_as_we_do(direction, script, tmp_path):
    """They run as programs on the files as they are written, from image to text on the answers that the
    official transform_ir_annotation_to_tr.py makes. Every caption has two pictures."""
    folder, weights = write_official(tmp_path / "MUGE", "valid", 20), str(tmp_path / "tiny.safetensors")
    lines = [line | {"image_ids": [100 + n, 100 + (n + 7) % 20]}
             for n, line in enumerate(lines_of(tmp_path / "MUGE" / "valid_texts.jsonl"))]
    answers = tmp_path / "MUGE" / "valid_texts.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model.save(shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])), weights)
    measure.main(["retrieval", "--model", weights, "--data", folder, "--device", "cpu", "--direction", direction,
                  "--predictions", str(tmp_path / "ours.jsonl"), "--out", str(tmp_path / "out.json")])
    scripts = Path(official.__file__).parents[1] / "eval"
    if script == "evaluation_tr.py":
        command = [sys.executable, scripts / "transform_ir_annotation_to_tr.py", "--input", answers]
        subprocess.run(command, check=True, capture_output=True)
        answers = answers.with_suffix(".tr.jsonl")
    command = [sys.executable, scripts / script, answers, tmp_path / "ours.jsonl", tmp_path / "theirs.json"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = json.loads((tmp_path / "theirs.json").read_text(encoding="utf-8"))
    assert theirs["success"], theirs
    ours = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))[direction.replace("-", "_")]
    score = theirs["scoreJson"]
    assert list(ours.values()) == pytest.approx([score[key] for key in ("r1", "r5", "r10", "mean_recall")])
    assert 0 < ours["R@1"] < ours["R@10"] < 100


@pytest.mark.parametrize("mode", ("RGB", "L", "P", "CMYK", "RGBA"))
def test_pixels_are_the_official_ones(mode):
    """Of a picture as it is, or, for a palette, CMYK and transparency, one that is resized before it becomes
    RGB, as docs/weights.md and `tools.measure reproduce` do it."""
    utils = pytest.importorskip("cn_clip.clip.utils", reason="needs torchvision, which is not installed")
    image = noise(40, 30).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    theirs, first = utils.image_transform(16)(image), image.resize((16, 16), Image.Resampling.BICUBIC)
    torch.testing.assert_close(data.preprocess(first.convert("RGB"), 16), theirs, rtol=0, atol=1e-6)
    difference = (data.preprocess(image, 16) - theirs).abs().max()
    most = {"RGB": 1e-6, "L": 1e-6, "CMYK": 0.016}  # 0.015 is one grey level
    assert difference < most[mode] if mode in most else difference > 0.3


SCALES = {  # of an operation at magnitude m in direction s, as torchvision takes it
    "rotate": ("Rotate", lambda m, s: s * 30 * m / 10), "shearx": ("ShearX", lambda m, s: s * 0.3 * m / 10),
    "posterize": ("Posterize", lambda m, s: 4 + int(4 * m / 10)),
    "solarize": ("Solarize", lambda m, s: int(256 * m / 10)), "color": ("Color", lambda m, s: 0.18 * m - 0.9),
    "contrast": ("Contrast", lambda m, s: 0.18 * m - 0.9),
    "sharpness": ("Sharpness", lambda m, s: 0.18 * m - 0.9),
    "autocontrast": ("AutoContrast", lambda m, s: 0), "equalize": ("Equalize", lambda m, s: 0),
    "invert": ("Invert", lambda m, s: 0)}


@pytest.mark.parametrize("name", SCALES)
def test_operations_of_autoaugment_are_torchvisions(name):
    """Ten operations, eleven magnitudes, both directions: not a pixel differs."""
    reason = "compares with torchvision, which is not installed"
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment", reason=reason)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((90, 80), 3)
    theirs, scale = SCALES[name]
    for magnitude in range(11):
        for sign in (-1, 1):
            ours = apply_operation(image, name, magnitude, sign)
            expected = autoaugment._apply_op(image, theirs, scale(magnitude, sign),
                                             autoaugment.InterpolationMode.BICUBIC, list(MEAN_COLOUR))
            assert np.array_equal(ours, expected), (magnitude, sign)


def test_the_crop_is_torchvisions():
    """The same box. At its border `resize(box=...)` may see a pixel outside, which crop, then resize does not:
    a grey level or two there, nothing inside."""
    reason = "compares with torchvision, which is not installed"
    functional = pytest.importorskip("torchvision.transforms.functional", reason=reason)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((90, 80), 3)
    compared = 0
    for seed in range(20):
        ours, draw = random_resized_crop(image, 32, random.Random(seed)), random.Random(seed)
        area = 7200 * draw.uniform(0.9, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= 90 and h <= 80:  # the first box that is drawn fits
            x, y = draw.randint(0, 90 - w), draw.randint(0, 80 - h)
            bicubic = functional.InterpolationMode.BICUBIC
            expected = functional.resized_crop(image, y, x, h, w, [32, 32], bicubic)
            difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int))
            assert difference.max() <= 2 and not difference[2:-2, 2:-2].any()
            compared += 1
    assert compared > 3
