"""The recipe's formulas by hand, resume after kill -9, freezing, and what a wrong command gets."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import model
import train
import weights
from conftest import ROOT, write_folder

TINY = ["--recipe", "scratch", "--model", "ViT-tiny", "--batch-size", "8", "--lr", "1e-3",
        "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with 24 training and 24 validation pairs."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_folder(folder, 24)
    return str(folder)


def run(*argv: str) -> subprocess.CompletedProcess:
    """The command as a user types it."""
    return subprocess.run(
        [sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# formulas


def test_lr_warms_up_and_falls_as_a_cosine():
    cfg = train.Config(lr=1.0, warmup=10)
    assert [train.get_lr(step, cfg, 110) for step in (0, 9)] == [0.1, 1.0]
    assert math.isclose(train.get_lr(60, cfg, 110), 0.5)  # half way down
    assert train.get_lr(109, cfg, 110) < 0.001
    # warm-up is at most a tenth of the run
    assert train.get_lr(0, train.Config(lr=1.0, warmup=5000), 20) == 0.5


def test_only_matrices_decay():
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    decayed, free = (group["params"] for group in train.param_groups(clip, 0.1))
    names = {id(p): name for name, p in clip.named_parameters()}
    matrices = ("weight", "positional_embedding", "proj", "text_projection")
    assert all(names[id(p)].endswith(matrices) for p in decayed)
    vectors = {"logit_scale", "visual.class_embedding", "bert.embeddings.LayerNorm.weight"}
    assert vectors <= {names[id(p)] for p in free}
    assert len(decayed) + len(free) == len(names)


def test_recipes_are_the_papers():
    cfg = train.parse(["--recipe", "flickr30k-cn", "--model", "ViT-H-14", "--data", "x"])["flickr30k-cn"]
    assert (cfg.batch_size, cfg.peak_lr, cfg.epochs, cfg.warmup) == (4096, 6e-6, 18, 6)  # table 9, last row
    cfg = train.parse(["--recipe", "icr", "--model", "ViT-L-14", "--data", "x"])["icr"]
    assert cfg.context_length == 128  # appendix A.4
    argv = ["--recipe", "pretrain", "--model", "RN50", "--data", "x", "--image-init", "a", "--text-init", "b"]
    acts = train.parse(argv)
    one, two = acts["stage1"], acts["stage2"]
    assert (one.batch_size, one.peak_lr, one.epochs) == (32768, 1e-4, 20)
    assert (one.freeze_image, one.image_init) == (True, "a")
    assert (two.batch_size, two.peak_lr, two.epochs, two.freeze_image) == (16384, 2e-5, 44, False)
    assert (two.init, two.image_init) == (os.path.join("out", "stage1", "best.safetensors"), "")


def test_rate_falls_with_the_batch_unless_it_was_given():
    muge = ["--recipe", "muge", "--model", "ViT-B-16", "--data", "x"]
    assert train.parse([*muge])["muge"].peak_lr == 2e-5  # table 9
    scaled = train.parse([*muge, "--batch-size", "128"])["muge"].peak_lr
    assert math.isclose(scaled, 5e-5 * 128 / 1024, rel_tol=0.01)
    assert train.parse([*muge, "--batch-size", "128", "--lr", "3e-6"])["muge"].peak_lr == 3e-6


def test_every_flag_is_read_somewhere():
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "recipes.py"))
    for f in dataclasses.fields(train.Config):
        assert f"cfg.{f.name}" in source, f.name


# ------------------------------------------------------------------------------------------------------------
# runs


def test_stage_1_moves_no_tensor_of_the_image_tower(pairs, tmp_path):
    cfg = train.Config(model="RN-tiny", data=pairs, freeze_image=True, batch_size=8, steps=3, lr=1e-2,
                       out=str(tmp_path), device="cpu")
    train.train("stage1", cfg)
    torch.manual_seed(cfg.seed)
    before = model.ChineseCLIP(model.MODELS["RN-tiny"]).state_dict()
    after = load_file(tmp_path / "last.safetensors")
    visual = [name for name in before if name.startswith("visual.")]
    assert any("running_var" in name for name in visual)
    assert all(torch.equal(before[name], after[name]) for name in visual)
    assert not torch.equal(before["text_projection"], after["text_projection"])


def test_logit_scale_is_clamped_at_100(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=2, lr=3.0, warmup=1,
                       out=str(tmp_path), device="cpu")
    train.train("clamp", cfg)
    assert load_file(tmp_path / "last.safetensors")["logit_scale"].item() <= math.log(100) + 1e-6


def test_history_starts_before_the_first_step_and_best_is_its_maximum(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=6, eval_every=2, lr=1e-2,
                       out=str(tmp_path), device="cpu")
    history = train.train("act", cfg)
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    clip, _ = model.load(str(tmp_path / "best.safetensors"))
    best = max(entry["mean_recall"] for entry in history)
    assert train.retrieval(clip, data.open_pairs(pairs, "valid"))["mean_recall"] == best


def test_finished_run_is_not_run_again(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=2, lr=1e-2,
                       out=str(tmp_path), device="cpu")
    history = train.train("act", cfg)
    written = (tmp_path / "best.safetensors").stat().st_mtime_ns
    assert train.train("act", cfg) == history
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == written


def test_killed_three_times_ends_bit_identical(pairs, tmp_path):
    """kill -9 at random moments of a two-act run with dropout and augmentation; the same command goes on."""
    command = ["--recipe", "pretrain", *TINY[2:], "--data", pairs, "--steps", "40", "--save-every", "3",
               "--eval-every", "20", "--log-every", "1", "--augment", "auto"]
    whole = run(*command, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))  # other moments every time this test runs
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-u", "train.py", *command, "--out", str(tmp_path / "killed")], cwd=ROOT,
            stdout=subprocess.PIPE, text=True, encoding="utf-8")
        for _ in range(rng.randrange(8, 30)):  # lines of its log, then a moment somewhere inside a step
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    again = run(*command, "--out", str(tmp_path / "killed"))
    assert again.returncode == 0, again.stderr
    for act in ("stage1", "stage2"):
        for name in ("last.safetensors", "best.safetensors"):
            one, other = ((tmp_path / out / act / name).read_bytes() for out in ("whole", "killed"))
            assert one == other, (act, name)
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "killed")]
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------------------------
# wrong commands and wrong data: one line, exit code 2 or 1, no traceback


@pytest.mark.parametrize("argv, code, words", [
    (["--model", "ViT-B-17"], 2, ["ViT-B-17", "ViT-B-16"]),
    (["--recipe", "mug"], 2, ["mug", "muge"]),
    (["--stepz", "3"], 2, ["--stepz"]),
    (["--recipe", "muge", "--model", "ViT-tiny"], 2, ["ViT-tiny", "table 9"]),
    (["--augment", "strong"], 2, ["strong", "crop"]),
    (["--batch-size", "1"], 2, ["--batch-size 1"]),
    (["--recipe", "scratch", "--model", "ViT-tiny", "--data", "no-such"], 1, ["no-such", "scenes-zh"]),
])
def test_wrong_command_is_one_line(argv, code, words, tmp_path):
    done = run(*argv, "--out", str(tmp_path))
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    assert "Traceback" not in done.stderr


def test_checkpoint_of_another_command_is_refused(pairs, tmp_path):
    argv = [*TINY, "--data", pairs, "--steps", "2", "--out", str(tmp_path)]
    assert train.main(argv) is None
    message = "checkpoint.pt was made with --lr 0.001, this command says 0.5"
    with pytest.raises(train.ConfigError, match=message):
        train.main([*argv, "--lr", "0.5"])


def test_weights_of_another_model_are_refused(pairs, tmp_path):
    path = str(tmp_path / "rn.safetensors")
    model.save(model.ChineseCLIP(model.MODELS["RN-tiny"]), path)
    with pytest.raises(weights.WeightsError, match="does not fit this model: .*it looks like RN-tiny"):
        train.main([*TINY, "--data", pairs, "--init", path, "--out", str(tmp_path / "out")])


def test_fewer_pairs_than_a_batch_is_refused(pairs, tmp_path):
    message = "24 training pairs are fewer than one batch; --batch-size is 32"
    with pytest.raises(data.DataError, match=message):
        train.main([*TINY, "--data", pairs, "--batch-size", "32", "--out", str(tmp_path)])


def test_loss_that_is_no_number_stops_the_run(pairs, tmp_path):
    with pytest.raises(data.DataError, match="the loss is nan at step"):
        train.main([*TINY, "--data", pairs, "--steps", "20", "--lr", "1e30", "--log-every", "1",
                    "--out", str(tmp_path)])
