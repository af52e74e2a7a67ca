"""Saving and resuming: interrupted runs end as whole ones do, bit for bit, and nothing that was saved is lost."""

import json
import math
import os
import signal
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from conftest import TINY, flags, write_folder
from safetensors.torch import load_file

import model
import train
from sources.layouts import open_pairs
from sources.pairs import DataError, SourceChanged
from training import checkpoint
from training.checkpoint import Checkpoints, Stopped
from training.recipes import ConfigError
from weights.read import WeightsError


def saved_in(out) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def tensors(out) -> dict:
    return load_file(out / "last.safetensors")


def splits(folder: str) -> list:
    return [open_pairs(folder, split) for split in ("train", "valid")]


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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


def signalled(monkeypatch, number: int, at: int):
    """This process gets a signal in the middle of step `at`."""
    real, steps = train.contrastive_loss, []

    def loss(*args):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), number)
        return real(*args)
    monkeypatch.setattr(train, "contrastive_loss", loss)


@pytest.mark.parametrize("number, at", [
    (signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGTERM, 3), (signal.SIGTERM, 6)])
def test_a_signal_saves_and_stops(number, at, pairs, tmp_path, monkeypatch):
    """In any step, also in one after which recall is measured, and in the last."""
    train.train("act", flags(pairs, tmp_path / "whole", eval_every=3))
    before = signal.getsignal(number)
    signalled(monkeypatch, number, at)
    with pytest.raises(Stopped, match=f"stopped at step {at} of 6"):
        train.train("act", flags(pairs, tmp_path / "cut", eval_every=3))
    assert signal.getsignal(number) is before
    assert saved_in(tmp_path / "cut")["step"] == at
    for _ in range(2):  # the second time it is finished
        train.train("act", flags(pairs, tmp_path / "cut", eval_every=3))
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert saved_in(tmp_path / "whole")["history"] == saved_in(tmp_path / "cut")["history"]
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("whole", "cut")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


def test_a_signal_during_a_measurement_is_answered_after_it(pairs, tmp_path, monkeypatch):
    """Also during the last one: the next act must not begin."""
    real, measured = train.retrieval, []

    def retrieval(*args):
        measured.append(1)
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "retrieval", retrieval)
    with pytest.raises(Stopped, match="stopped at step 3 of 3"):
        train.train("act", flags(pairs, tmp_path, steps=3, eval_every=3))
    assert [entry["step"] for entry in saved_in(tmp_path)["history"]] == [0, 3]


def test_a_write_that_failed_is_told_at_the_next_step(pairs, tmp_path):
    checkpoints = Checkpoints(flags(pairs, tmp_path), *splits(pairs))
    assert checkpoints.asked() == (False, False)  # nothing is being written
    checkpoints.writing = checkpoints.writer.submit(os.remove, tmp_path / "no such file")
    wait([checkpoints.writing])
    with pytest.raises(OSError, match="no such file"):
        checkpoints.asked()


def test_a_clock_saves(pairs, tmp_path, monkeypatch):
    """With --save-minutes the state is saved after every step that ends later than that."""
    saved, real = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save",
                        lambda self, *args: saved.append(args[3]) or real(self, *args))
    train.train("act", flags(pairs, tmp_path / "scheduled", eval_every=4))
    train.train("act", flags(pairs, tmp_path / "often", eval_every=4, save_minutes=1e-9))
    assert saved == [0, 4, 6] + list(range(7))
    assert equal(tensors(tmp_path / "scheduled"), tensors(tmp_path / "often"))
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("scheduled", "often")]
    assert len(logs[0]) == len(logs[1])


def test_a_checkpoint_is_written_while_the_run_goes_on(pairs, tmp_path, monkeypatch):
    """The file of step 1 is written when the second step has begun, or never: a slow disk stalls nobody."""
    real, second = torch.save, threading.Event()
    step_made = train.get_lr

    def slow(content, path):
        assert content["step"] != 1 or second.wait(60)
        real(content, path)

    def get_lr(step, cfg, total):
        if step == 1:  # asked for when the second step begins
            second.set()
        return step_made(step, cfg, total)
    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr(train, "get_lr", get_lr)
    train.train("act", flags(pairs, tmp_path, steps=3, save_every=1))
    steps = [torch.load(path, weights_only=True)["step"] for path in checkpoint.paths(str(tmp_path))]
    assert steps == [3, 2]  # the last two are kept


def nan_in(path):
    saved = torch.load(path, weights_only=True)
    saved["model"]["text_projection"][0, 0] = math.nan
    torch.save(saved, path)


@pytest.mark.parametrize("damage, words", [
    (lambda path: os.truncate(path, 10_000), "not a checkpoint of ours"),
    (nan_in, "text_projection is not finite"),
    (os.remove, ""),
])
def test_the_previous_checkpoint_is_taken_when_the_newest_is_unusable(damage, words, pairs, tmp_path, capsys):
    train.train("act", flags(pairs, tmp_path / "whole", save_every=2))
    train.train("act", flags(pairs, tmp_path / "cut", save_every=2))
    newest, previous = checkpoint.paths(str(tmp_path / "cut"))
    before = Path(previous).read_bytes()
    damage(newest)
    os.remove(tmp_path / "cut" / "last.safetensors")
    capsys.readouterr()
    train.train("act", flags(pairs, tmp_path / "cut", save_every=2))
    said = capsys.readouterr().out
    assert words in said and (not words or f"going on from {previous}, step 4" in said)
    assert "from step 4" in said and equal(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert Path(previous).read_bytes() == before  # the unusable one did not take its place
    for path in (newest, previous):
        os.truncate(path, 10_000)
    with pytest.raises(WeightsError, match="checkpoint.pt: not a checkpoint of ours .*delete it"):
        train.train("act", flags(pairs, tmp_path / "cut", save_every=2))


def test_weights_that_give_no_features_are_never_saved(pairs, tmp_path):
    """At a rate of 1e30 the first step's loss is a number and its weights are too, but no feature of them."""
    for _ in range(2):
        with pytest.raises(DataError, match="too large to give features; try a lower --lr than 1.0e\\+30"):
            train.train("act", flags(pairs, tmp_path, lr=1e30, warmup=0, save_every=1))
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert saved["step"] == 0
        assert max(value.abs().max() for value in saved["model"].values()) < 100


def test_moments_get_the_layout_of_their_parameters(tmp_path):
    """A ResNet is channels_last on a GPU alone, and the fused AdamW goes by memory. Saved there, resumed here:
    the next step is the one that the first model makes."""
    def made(layout):
        torch.manual_seed(0)
        clip = model.ChineseCLIP(model.MODELS["RN-tiny"]).to(memory_format=layout)
        return clip, train.build_optimizer(train.Config(lr=0.1), clip)

    def step(clip, optimizer, seed: int):
        g = torch.Generator().manual_seed(seed)
        for p in clip.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
        optimizer.step()

    there, optimizer = made(torch.channels_last)
    step(there, optimizer, 1)
    torch.save((there.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    here, resumed = made(torch.contiguous_format)
    state, moments = torch.load(tmp_path / "state.pt", weights_only=True)
    here.load_state_dict(state)
    resumed.load_state_dict(moments)
    checkpoint.own_layout(resumed)
    step(there, optimizer, 2)
    step(here, resumed, 2)
    for (name, p), q in zip(there.named_parameters(), here.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks for the mapping in /proc")
def test_a_checkpoint_is_mapped_not_copied(pairs, tmp_path):
    train.train("act", flags(pairs, tmp_path, steps=1))
    saved = checkpoint.read(str(tmp_path / "checkpoint.pt"))
    assert str(tmp_path / "checkpoint.pt") in Path("/proc/self/maps").read_text()
    assert saved["step"] == 1
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    optimizer = train.build_optimizer(train.Config(), clip)
    del saved
    Checkpoints(flags(pairs, tmp_path, steps=1), *splits(pairs)).load(clip, optimizer, torch.amp.GradScaler("cpu"))
    # what goes on from it holds none of it, or its disk space would stay taken, and Windows could not replace it
    assert str(tmp_path / "checkpoint.pt") not in Path("/proc/self/maps").read_text()


def test_out_may_move_with_its_acts(pairs, tmp_path):
    """The acts of a chained run name each other by act, not by path."""
    start = str(tmp_path / "start.safetensors")
    model.save(model.ChineseCLIP(model.MODELS["ViT-tiny"]), start)
    argv = ["--recipe", "pretrain", *TINY[2:], "--data", pairs, "--init", start, "--steps", "2"]
    train.main([*argv, "--out", str(tmp_path / "here")])
    os.rename(tmp_path / "here", tmp_path / "there")
    written = (tmp_path / "there" / "stage2" / "best.safetensors").stat().st_mtime_ns
    train.main([*argv, "--out", str(tmp_path / "there")])  # finished: nothing is run again
    assert (tmp_path / "there" / "stage2" / "best.safetensors").stat().st_mtime_ns == written


def test_checkpoint_of_another_command_is_refused(pairs, tmp_path):
    argv = [*TINY, "--data", pairs, "--steps", "2", "--out", str(tmp_path)]
    assert train.main(argv) is None
    message = "checkpoint.pt was made with --lr 0.001, this command has --lr 0.5; to go on, repeat"
    with pytest.raises(ConfigError, match=message):
        train.main([*argv, "--lr", "0.5"])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_caption_that_was_edited_is_another_set(split, tmp_path):
    """After a stop the same command goes on with the same captions, in a copy of the set too; with others, not."""
    write_folder(tmp_path / "pairs", 8)
    argv = [*TINY, "--steps", "2", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "pairs")]
    train.main(argv)
    path = tmp_path / "pairs" / f"{split}.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")  # another time of the last change, the same lines
    train.main(argv)
    path.write_text(text.replace("第3张", "第三张"), encoding="utf-8")
    with pytest.raises(ConfigError, match="checkpoint.pt was made with other captions"):
        train.main(argv)
    path.write_text("\n".join(text.split("\n")[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="8 training pairs, this command has 7" if split == "train" else "other captions"):
        train.main(argv)


def test_a_list_that_loses_lines_under_a_run_stops_it(tmp_path, monkeypatch):
    write_folder(tmp_path / "pairs", 8)
    path, real = tmp_path / "pairs" / "train.jsonl", train.retrieval

    def retrieval(*args):  # before step 0
        path.write_text("\n".join(path.read_text(encoding="utf-8").split("\n")[:4]), encoding="utf-8")
        return real(*args)
    monkeypatch.setattr(train, "retrieval", retrieval)
    with pytest.raises(SourceChanged, match=r"train.jsonl: changed during the run; put it back .* or begin anew"):
        train.train("act", flags(str(tmp_path / "pairs"), tmp_path / "out", steps=20))
