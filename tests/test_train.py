"""The recipe's formulas by hand, resume after kill -9, freezing, and what a wrong command gets."""

import dataclasses
import functools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib

import pytest
import torch
from safetensors.torch import load_file

import data
import loss
import model
import sources
import train
import weights
from conftest import ROOT, typed, write_folder
from loss import distillation_loss
from pairs import DataError

TINY = ["--recipe", "scratch", "--model", "ViT-tiny", "--batch-size", "8", "--lr", "1e-3",
        "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with 24 training and 24 validation pairs."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_folder(folder, 24)
    return str(folder)


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
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    clip.load_state_dict(load_file(tmp_path / "best.safetensors"))  # copied, so that no kernel rounds differently
    best = max(entry["mean_recall"] for entry in history)
    assert train.retrieval(clip.eval(), sources.open_pairs(pairs, "valid"))["mean_recall"] == best


def test_finished_run_is_not_run_again(pairs, tmp_path):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=2, lr=1e-2,
                       out=str(tmp_path), device="cpu")
    history = train.train("act", cfg)
    written = (tmp_path / "best.safetensors").stat().st_mtime_ns
    assert train.train("act", cfg) == history
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == written


KILLS = int(os.environ.get("KILLS", 0))  # KILLS=20 for a thorough look; else two, of torchrun one
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]


def children(pid: int) -> list[int]:
    """Processes that torchrun started: they outlive it."""
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes of a run in /proc")
@pytest.mark.parametrize("start, extra", [
    (["train.py"], []), (["train.py"], ["--cache-features", "20", "--chunk-size", "3"]), (TORCHRUN, []),
    (TORCHRUN, ["--cache-features", "20", "--chunk-size", "2", "--targets", "multi"])],
    ids=["alone", "cached and chunked", "two processes", "two processes, cached and chunked"])
def test_killed_runs_end_bit_identical(start, extra, pairs, tmp_path):
    """kill -9 at random moments of a run with dropout and augmentation; the same command goes on. Without a
    cache the run has both acts."""
    recipe = ["--recipe", "stage1"] if extra else ["--recipe", "pretrain"]
    command = [*recipe, *TINY[2:], "--data", pairs, "--steps", "40", "--save-every", "3",
               "--eval-every", "20", "--log-every", "1", "--augment", "auto", *extra]

    def begin(out: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-u", *start, *command, "--out", str(tmp_path / out)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    whole = begin("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))  # other moments every time this test runs
    for _ in range(KILLS or (2 if start[0] == "train.py" else 1)):
        process = begin("killed")
        for _ in range(rng.randrange(1, 30)):  # lines of its log, then a moment somewhere inside a step
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.stdout.read()  # until the last of them has let go of it
        process.wait()
        process.stdout.close()
    again = begin("killed")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    for act in ("stage1",) if extra else ("stage1", "stage2"):
        for name in ("last.safetensors", "best.safetensors") + (("features.f16",) if extra else ()):
            one, other = ((tmp_path / out / act / name).read_bytes() for out in ("whole", "killed"))
            assert one == other, (act, name)
        logs = [(tmp_path / out / act / "log.jsonl").read_text().splitlines() for out in ("whole", "killed")]
        steps = [[(entry["step"], entry.get("loss")) for entry in map(json.loads, log)] for log in logs]
        assert steps[0] == steps[1]
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes of a run in /proc")
def test_torchrun_restarts_after_a_process_died(pairs, tmp_path):
    command = ["--recipe", "scratch", *TINY[2:], "--data", pairs, "--steps", "30", "--save-every", "2",
               "--eval-every", "15", "--log-every", "1"]
    restarting = [sys.executable, "-u", *TORCHRUN[:3], "--max-restarts", "3", *TORCHRUN[3:], *command]
    process = subprocess.Popen([*restarting, "--out", str(tmp_path / "died")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if "step     10/30" in line:
            break
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    # what the other process says of it, if torchrun does not stop it sooner
    assert "goes on from the last checkpoint" in said or "closing signal" in said
    assert re.search(r"from step \d*[1-9]", said)
    alone = subprocess.run([sys.executable, *TORCHRUN, *command, "--out", str(tmp_path / "whole")], cwd=ROOT)
    assert alone.returncode == 0
    one, other = ((tmp_path / out / "scratch" / "last.safetensors").read_bytes() for out in ("whole", "died"))
    assert one == other


def test_a_disk_that_fills_up_during_a_checkpoint_loses_nothing(pairs, tmp_path, monkeypatch):
    cfg = train.Config(model="ViT-tiny", data=pairs, batch_size=8, steps=4, save_every=1, lr=1e-2, workers=0,
                       out=str(tmp_path), device="cpu")
    real, calls = torch.save, []

    def full(content, path):
        calls.append(path)
        if len(calls) == 3:
            with open(path, "wb") as file:
                file.write(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")
        real(content, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint.pt could not be written .*file write failed"):
        train.train("act", cfg)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
    monkeypatch.setattr(torch, "save", real)
    assert train.train("act", cfg)[-1]["step"] == 4  # goes on


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
    seen = sources.open_pairs(pairs, "train")
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
    train.set_train_mode(clip, freeze_image=True)
    assert clip.encode_image(torch.randn(2, 3, 32, 32)).grad_fn is None


def test_compiled_towers_train_the_same(pairs, tmp_path, monkeypatch):
    """Traced and differentiated as always, but not turned into C++, which takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    row = model.MODELS["ViT-tiny"]  # compiled dropout draws other numbers than eager dropout
    monkeypatch.setitem(model.MODELS, "dry", dataclasses.replace(
        row, text=dataclasses.replace(row.text, dropout=0.0)))
    losses = []
    for compiled, chunk in ((False, 0), (True, 4)):  # chunks run with and without gradient
        out = tmp_path / f"{compiled} {chunk}"
        train.train("act", train.Config(
            model="dry", data=pairs, batch_size=8, chunk_size=chunk, steps=4, lr=1e-2, workers=0, log_every=1,
            compile=compiled, out=str(out), device="cpu"))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        assert not any("_orig_mod" in name for name in load_file(out / "last.safetensors"))
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
    monkeypatch.setattr(loss, "free_memory", lambda device: moments + 3_000_000)
    train.train("act", train.Config(**flags, steps=2, out=str(tmp_path / "auto")))
    chunk = int(re.search(r"in \d chunks of (\d)", capsys.readouterr().out)[1])
    assert 1 <= chunk < 8
    train.train("act", train.Config(**flags, steps=2, chunk_size=chunk, out=str(tmp_path / "given")))
    monkeypatch.setattr(loss, "free_memory", lambda device: 2**40)
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


def test_cached_features_are_for_the_acts_with_a_frozen_tower():
    acts = train.parse(["--recipe", "pretrain", "--data", "x", "--cache-features", "3"])
    assert [acts[act].cache_features for act in ("stage1", "stage2")] == [3, 0]
    with pytest.raises(train.ConfigError, match="only a frozen image tower"):
        train.parse(["--recipe", "stage2", "--data", "x", "--cache-features", "3"])


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
    (["--recipe", "muge", "--model", "ViT-tiny"], 2, ["ViT-tiny", "table 9"]),
    (["--augment", "strong"], 2, ["strong", "crop"]),
    (["--batch-size", "1"], 2, ["--batch-size 1"]),
    (["--recipe", "scratch", "--model", "ViT-tiny", "--data", "no-such"], 1, ["no-such", "scenes-zh"]),
])
def test_wrong_command_is_one_line(argv, code, words, tmp_path):
    found, said = typed("train.py", *argv, "--out", str(tmp_path))
    last = said.strip().splitlines()[-1]
    assert found == code and all(word in last for word in words), said
    assert "Traceback" not in said


def test_a_pattern_of_shards_is_not_its_own_validation_split(tmp_path):
    for source in ("a/{0..1}.tar", "a/0.tar,photos", "photos, a/*.tar"):
        with pytest.raises(train.ConfigError, match="--valid-data"):
            train.train("act", train.Config(model="ViT-tiny", data=source, batch_size=8, device="cpu",
                                            out=str(tmp_path)))


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
    with pytest.raises(DataError, match=message):
        train.main([*TINY, "--data", pairs, "--batch-size", "32", "--out", str(tmp_path)])


def test_loss_that_is_no_number_stops_the_run(pairs, tmp_path):
    with pytest.raises(DataError, match="the loss is nan at step"):
        train.main([*TINY, "--data", pairs, "--steps", "20", "--lr", "1e30", "--log-every", "1",
                    "--out", str(tmp_path)])
