"""The recipe's formulas by hand, resume after kill -9, freezing, and what a wrong command gets."""

import collections
import dataclasses
import functools
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import weakref
import zlib

import kills
import pytest
import torch
from conftest import ROOT, TINY, flags, typed
from safetensors.torch import load_file

import data
import model
import train
from sources import layouts
from sources.pairs import DataError
from training import chunks, distill
from training.distill import distillation_loss
from weights.read import WeightsError, find

# ------------------------------------------------------------------------------------------------------------
# formulas


def test_lr_warms_up_and_falls_as_a_cosine():
    cfg = train.Config(lr=1.0, warmup=10)
    assert [train.get_lr(step, cfg, 110) for step in (0, 9)] == [0.1, 1.0]
    assert math.isclose(train.get_lr(60, cfg, 110), 0.5)  # half way down
    assert train.get_lr(109, cfg, 110) < 0.001
    # a warm-up that would be more than half of the run is a tenth of it
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
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    clip.load_state_dict(load_file(tmp_path / "best.safetensors"))  # copied, so that no kernel rounds differently
    best = max(entry["mean_recall"] for entry in history)
    assert train.retrieval(clip.eval(), layouts.open_pairs(pairs, "valid"))["mean_recall"] == best


def test_the_folder_of_a_run_stands_for_its_best_weights(pairs, tmp_path):
    train.train("act", flags(pairs, tmp_path, steps=2))
    assert find(str(tmp_path)) == str(tmp_path / "best.safetensors")


def test_finished_run_is_not_run_again(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=2, lr=1e-2,
                       out=str(tmp_path), device="cpu")
    history = train.train("act", cfg)
    written = (tmp_path / "best.safetensors").stat().st_mtime_ns
    assert train.train("act", cfg) == history
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == written


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes of a run in /proc")
@pytest.mark.parametrize("kind", ["saved by the clock", "cache", "two acts", "two ranks, BatchNorm",
                                  "two ranks, cache and chunks"])
def test_disturbed_runs_end_bit_identical(kind, tmp_path):
    """kill -9, SIGTERM or a full disk at a random moment; `python tests/kills.py` has more of them."""
    print("seed", seed := int.from_bytes(os.urandom(4), "big"))  # other moments every time this test runs
    rng = random.Random(seed)
    kills.prepare(tmp_path)
    kills.undisturbed(kind, tmp_path, "whole")
    kills.disturbed(kind, tmp_path, "out", rng.choices(kills.hows(kind), k=1), rng)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes of a run in /proc")
def test_torchrun_restarts_after_a_process_died(pairs, tmp_path):
    command = ["--recipe", "scratch", *TINY[2:], "--data", pairs, "--steps", "30", "--save-every", "2",
               "--eval-every", "15", "--log-every", "1"]
    restarting = [sys.executable, "-u", *kills.TWO[:3], "--max-restarts", "3", *kills.TWO[3:], *command]
    process = subprocess.Popen([*restarting, "--out", str(tmp_path / "died")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if "step     10/30" in line:
            break
    os.kill(kills.children(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    # what the other process says of it, if torchrun does not stop it sooner
    assert "goes on from the last checkpoint" in said or "closing signal" in said
    assert re.search(r"from step \d*[1-9]", said)
    alone = subprocess.run([sys.executable, *kills.TWO, *command, "--out", str(tmp_path / "whole")], cwd=ROOT)
    assert alone.returncode == 0
    one, other = ((tmp_path / out / "scratch" / "last.safetensors").read_bytes() for out in ("whole", "died"))
    assert one == other


def test_an_act_is_gone_when_the_next_measures_memory(pairs, tmp_path, monkeypatch):
    """Its model and optimizer would count as used, and the second act would get chunks of a few pairs."""
    models, alive, real = [], [], train.choose_chunks

    def measure(cfg, clip, before):
        alive.append([there() is not None for there in models])
        models.append(weakref.ref(clip))
        clip.circle = [clip]  # as torch makes some: only the collector can end it
        return real(cfg, clip, before)
    monkeypatch.setattr(train, "choose_chunks", measure)
    gc.disable()  # the collector comes when it likes
    try:
        for act in ("one", "two"):
            train.train(act, flags(pairs, tmp_path / act, steps=2))
    finally:
        gc.enable()
    assert alive == [[], [False]]


def test_processes_speak_with_one_voice(pairs, tmp_path):
    start = str(tmp_path / "start.safetensors")
    model.save(model.ChineseCLIP(model.MODELS["ViT-tiny"]), start)
    argv = ["--recipe", "stage1", *TINY[2:], "--data", pairs, "--init", start, "--teacher", start,
            "--steps", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *kills.TWO, *argv], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for line in ("the paper has no numbers for ViT-tiny", f"tensors from {start}", f"loaded {start}", "== stage1"):
        assert done.stdout.count(line) == 1, line


# ------------------------------------------------------------------------------------------------------------
# what the larger flags do


def test_a_teacher_teaches(pairs, tmp_path):
    """The student comes nearer to the teacher's similarities than one without a teacher; the teacher's width,
    tower and resolution are not the student's."""
    row = model.MODELS["ViT-tiny"]
    torch.manual_seed(3)
    teacher = model.ChineseCLIP(dataclasses.replace(
        row, embed_dim=24, visual=dataclasses.replace(row.visual, resolution=64)))
    model.save(teacher, str(tmp_path / "teacher"))
    seen = layouts.open_pairs(pairs, "train")
    ids = data.tokenize([seen.text(i) for i in range(24)])
    small, large = (torch.stack([data.preprocess(seen.image(i), size) for i in range(24)])
                    for size in (32, 64))
    with torch.no_grad():
        taught = teacher.eval()(large, ids)
    away = {}
    for weight in (0.0, 100.0):
        out = str(tmp_path / str(weight))
        train.train("act", train.Config(
            model="ViT-tiny", data=pairs, batch_size=24, chunk_size=12, steps=40, lr=3e-3, workers=0,
            eval_every=40, device="cpu", teacher=str(tmp_path / "teacher"), distill=weight, out=out))
        student, _ = model.load(out + "/last.safetensors")
        with torch.no_grad():
            away[weight] = distillation_loss(*student(small, ids), taught).item()
    itself = distillation_loss(*taught, taught).item()
    assert away[100.0] - itself < 0.2 * (away[0.0] - itself)


def test_a_teacher_of_a_batch_too_large_for_the_matrix(pairs, tmp_path, monkeypatch):
    """Above DENSE_LIMIT similarities the two losses are taken in tiles; the numbers stay."""
    start, logs = str(tmp_path / "start.safetensors"), []
    model.save(model.ChineseCLIP(model.MODELS["ViT-tiny"]), start)
    for limit in (2**25, 24):
        for room in (train, distill):
            monkeypatch.setattr(room, "DENSE_LIMIT", limit)
        out = tmp_path / str(limit)
        train.train("act", flags(pairs, out, steps=3, teacher=start, log_every=1))
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


def test_the_log_is_json_lines(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=6, log_every=2, eval_every=3,
                       lr=1e-2, workers=0, out=str(tmp_path), device="cpu")
    train.train("act", cfg)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 3, 4, 6]
    assert [entry["step"] for entry in log if "mean_recall" in entry] == [0, 3, 6]
    assert {"loss", "lr", "logit_scale", "in_batch_t2i", "pairs_per_second"} <= set(log[1])


def test_a_rate_far_above_the_recipes_is_said(pairs, tmp_path, capsys):
    start = str(tmp_path / "start.safetensors")
    model.save(model.ChineseCLIP(model.MODELS["ViT-tiny"]), start)
    for lr, init, warned in ((1e-2, start, True), (0.0, start, False), (1e-2, "", False)):  # last: from nothing
        train.train("act", train.Config(
            model="ViT-tiny", data=pairs, batch_size=8, steps=1, lr=lr, init=init, workers=0,
            out=str(tmp_path / f"{lr}{bool(init)}"), device="cpu"))
        assert ("more than four times the recipe's rate" in capsys.readouterr().out) == warned


def test_a_frozen_tower_keeps_no_activations():
    clip = model.ChineseCLIP(model.MODELS["RN-tiny"])
    clip.visual.requires_grad_(False)
    train.set_train_mode(clip)
    assert clip.encode_image(torch.randn(2, 3, 32, 32)).grad_fn is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_leaves_parameters_and_statistics_in_float32(precision, pairs, tmp_path, monkeypatch):
    """On a CPU as on a GPU: only the towers compute in it, and float16 has a scaler, whose state is saved. A
    step whose scaled gradients overflow is left out."""
    computed, real, linear = set(), train.contrastive_loss, torch.nn.Linear.forward

    def loss(image_features, text_features, *more):
        assert image_features.dtype == text_features.dtype == torch.float32
        return real(image_features, text_features, *more)
    monkeypatch.setattr(train, "contrastive_loss", loss)

    def forward(self, x):
        computed.add((y := linear(self, x)).dtype)
        return y
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    for how in ("float32", precision):
        train.train("act", flags(pairs, tmp_path / how, model="RN-tiny", precision=how, log_every=1, eval_every=6))
    assert computed == {torch.float32, getattr(torch, precision)}
    exact, rounded = (load_file(tmp_path / how / "last.safetensors") for how in ("float32", precision))
    assert {x.dtype for x in rounded.values()} == {torch.float32, torch.int64}
    assert 0 < (exact["visual.bn1.running_mean"] - rounded["visual.bn1.running_mean"]).abs().max() < 0.01
    logs = [[json.loads(line) for line in (tmp_path / how / "log.jsonl").open()] for how in ("float32", precision)]
    one, other = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert one != other and one[0] == pytest.approx(other[0], abs=0.02)
    state = torch.load(tmp_path / precision / "checkpoint.pt", weights_only=True)["scaler"]
    assert bool(state) == (precision == "float16")

    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    train.train("act", flags(pairs, tmp_path / "large", model="RN-tiny", precision=precision, steps=1, save_every=1))
    state = torch.load(tmp_path / "large" / "checkpoint.pt", weights_only=True)
    assert state["scaler"].get("scale", 2.0**39) == 2.0**39  # half of what was too much
    moments = {float(moment["step"]) for moment in state["optimizer"]["state"].values()}
    assert moments == ({1.0} if precision == "bfloat16" else {0.0})


def test_compiled_towers_train_the_same(pairs, tmp_path, monkeypatch):
    """Traced and differentiated as always, but not turned into C++, which takes minutes. Half of the weights
    that are compiled are adapted ones."""
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    row = model.MODELS["ViT-tiny"]  # compiled dropout draws other numbers than eager dropout
    monkeypatch.setitem(model.MODELS, "dry", dataclasses.replace(
        row, text=dataclasses.replace(row.text, dropout=0.0)))
    losses, replays, real = [], [], chunks.replay_distance
    monkeypatch.setattr(chunks, "replay_distance", lambda *args: replays.append(real(*args)) or replays[-1])
    for compiled, chunk in ((False, 0), (True, 4)):  # chunks run with and without gradient
        out = tmp_path / f"{compiled} {chunk}"
        train.train("act", train.Config(
            model="dry", data=pairs, batch_size=8, chunk_size=chunk, steps=4, lr=1e-2, workers=0, log_every=1,
            compile=compiled, lora=2, out=str(out), device="cpu"))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        assert not any("_orig_mod" in name for name in load_file(out / "last.safetensors"))
    assert len(replays) == 1 and replays[0] < 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-2  # it moved, so equal curves mean equal gradients


@pytest.mark.skipif("COMPILE" not in os.environ, reason="COMPILE=1: minutes of a C++ compiler")
def test_compiled_towers_draw_the_same_dropout_again():
    """What chunks need: without gradient and with it, the same random numbers give the same features."""
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"]).train()
    clip.visual.patch_drop = 0.5
    ids = torch.randint(1, 99, (4, 12), generator=torch.Generator().manual_seed(0))
    clip.bert.encoder.compile()
    clip.visual.compile()
    for tower, x in ((clip.bert, ids), (clip.visual, torch.randn(4, 3, 32, 32))):
        found = []
        for seed, gradient in ((3, False), (3, True), (4, True)):
            torch.manual_seed(seed)
            with torch.set_grad_enabled(gradient):
                found.append(tower(x).detach())
        assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_chunks_are_what_fits_and_stay_so_after_a_restart(pairs, tmp_path, monkeypatch, capsys):
    """With little memory free the batch is cut, as by --chunk-size; a run that goes on keeps its chunks."""
    flags = dict(model="ViT-tiny", data=pairs, batch_size=8, lr=1e-3, workers=0, device="cpu", save_every=1)
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    moments = 12 * sum(p.numel() for p in clip.parameters())
    monkeypatch.setattr(chunks, "free_memory", lambda device: moments + 3_000_000)
    train.train("act", train.Config(**flags, steps=2, out=str(tmp_path / "auto")))
    said = capsys.readouterr().out
    chunk = int(re.search(r"in \d chunks of (\d)", said)[1])
    assert 1 <= chunk < 8 and f"only {chunk} pairs fit" in said
    train.train("act", train.Config(**flags, steps=2, chunk_size=chunk, out=str(tmp_path / "given")))
    monkeypatch.setattr(chunks, "free_memory", lambda device: 2**40)
    one, other = (load_file(tmp_path / out / "last.safetensors") for out in ("auto", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    train.train("act", train.Config(**flags, steps=2, out=str(tmp_path / "auto")))
    assert f"chunks of {chunk}" in capsys.readouterr().out
    train.train("act", train.Config(**flags, steps=2, out=str(tmp_path / "whole")))
    assert "chunks" not in capsys.readouterr().out


def test_out_of_memory_can_be_answered_with_chunks(pairs, tmp_path, capsys):
    """The start was saved before the step that did not fit; the repeated command may say --chunk-size."""
    flags = dict(model="ViT-tiny", data=pairs, batch_size=8, steps=2, lr=1e-3, workers=0, out=str(tmp_path),
                 device="cpu", save_every=1)
    train.train("act", train.Config(**flags))
    assert train.train("act", train.Config(**flags, chunk_size=4))[-1]["step"] == 2
    assert "goes on, but not bit for bit" in capsys.readouterr().out


def test_every_seed_and_step_has_its_own_dropout():
    """torch's generator on a CPU takes 32 bits of a seed, so they must differ in these."""
    seeds = [zlib.crc32(f"{seed} {step} {k}".encode()) for seed in (0, 1, 7) for step in (0, 1, 65536)
             for k in (0, 1)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32


# ------------------------------------------------------------------------------------------------------------
# wrong commands and wrong data: one line, exit code 2 or 1, no traceback


@pytest.mark.parametrize("argv, code, words", [
    (["--model", "ViT-B-17"], 2, ["ViT-B-17", "ViT-B-16"]),
    (["--recipe", "mug"], 2, ["mug", "muge"]),
    (["--stepz", "3"], 2, ["--stepz"]),
    (["--augment", "strong"], 2, ["strong", "crop"]),
    (["--batch-size", "1"], 2, ["--batch-size 1"]),
    (["--recipe", "scratch", "--model", "ViT-tiny", "--data", "no-such"], 1, ["no-such", "scenes-zh"]),
])
def test_wrong_command_is_one_line(argv, code, words, tmp_path):
    found, said = typed("train.py", *argv, "--out", str(tmp_path))
    (line,) = said.strip().splitlines()
    assert found == code and all(word in line for word in words), said


def test_weights_of_another_model_are_refused(pairs, tmp_path):
    path = str(tmp_path / "rn.safetensors")
    model.save(model.ChineseCLIP(model.MODELS["RN-tiny"]), path)
    with pytest.raises(WeightsError, match=r"rn.safetensors: is RN-tiny, not ViT-tiny \(--model RN-tiny\): "):
        train.main([*TINY, "--data", pairs, "--init", path, "--out", str(tmp_path / "out")])


def test_a_batch_larger_than_the_set_repeats_pairs(pairs, tmp_path, capsys):
    """Each as often as any other, which is said; with --targets multi they are no negatives of each other."""
    losses = {}
    for targets in ("one-hot", "multi"):
        cfg = flags(pairs, tmp_path / targets, batch_size=64, steps=0, epochs=2, targets=targets, log_every=1)
        train.train("act", cfg)
        said = capsys.readouterr().out
        assert "batch is larger than the set: every pair occurs in it 2 or 3 times; --batch-size 16" in said
        assert "; 2 steps, 128 pairs" in said
        log = map(json.loads, (tmp_path / targets / "log.jsonl").read_text().splitlines())
        losses[targets] = next(entry["loss"] for entry in log if "loss" in entry)
    assert losses["one-hot"] - losses["multi"] > 0.5  # ln 2 and more
    stream = data.Stream(layouts.open_pairs(pairs, "train"), 0, 32, "none")
    for chunk in data.batches(stream, 64, range(3), 8, workers=0):
        pictures = collections.Counter(chunk.keys[:, 0].tolist())
        assert len(pictures) == 24 and set(pictures.values()) == {2, 3}


def test_a_loss_that_is_no_number_stops_the_run(pairs, tmp_path, monkeypatch):
    real = train.contrastive_loss
    monkeypatch.setattr(train, "contrastive_loss", lambda *args: real(*args) * math.nan)
    with pytest.raises(DataError, match="the loss is nan at step 1; try a lower --lr"):
        train.train("act", flags(pairs, tmp_path, log_every=1))


def test_weights_that_diverge_stop_the_run(pairs, tmp_path):
    with pytest.raises(DataError, match="too large to give features; try a lower --lr"):
        train.main([*TINY, "--data", pairs, "--steps", "20", "--lr", "1e30", "--log-every", "1",
                    "--out", str(tmp_path)])


