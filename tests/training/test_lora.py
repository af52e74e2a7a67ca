"""LoRA: what the adapted weights are, that they start as they were, and that they are saved as plain ones."""

import copy

import pytest
import torch
from conftest import difference, flags, random_pixels, shake
from safetensors.torch import load_file

import model
import train
from training.checkpoint import Stopped
from training.lora import ALPHA, LowRank, add_lora, split
from training.recipes import Config, ConfigError, parse
from weights.read import WeightsError
from weights.sizes import describe


def adapted(name: str, start: model.ChineseCLIP, **how) -> model.ChineseCLIP:
    clip = copy.deepcopy(start)
    add_lora(clip, Config(model=name, init="a file", **how))
    return clip


def features(clip: model.ChineseCLIP) -> torch.Tensor:
    """[4, 2 E] of four pictures and four captions. (Without gradient, PyTorch multiplies a weight that needs
    none in another order than one that does, so weights that are frozen would move the last digit.)"""
    ids = torch.tensor([[101, 102 + n, 800 * (n + 1), 102] for n in range(4)])
    pixels = random_pixels(4, clip.config.visual.resolution)
    return torch.cat([clip.eval().encode_image(pixels), clip.encode_text(ids)], dim=1).detach()


def test_the_sum_by_hand():
    """W is 2 x 2, A is [[1, 2]], B is [[3], [4]], so B A is [[3, 6], [4, 8]]."""
    low_rank = LowRank(torch.zeros(2, 2), rank=1, parts=1)
    low_rank.A.data, low_rank.B.data = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0], [4.0]]])
    expected = torch.eye(2) + ALPHA * torch.tensor([[3.0, 6.0], [4.0, 8.0]])
    assert torch.equal(low_rank(torch.eye(2)), expected)
    # of two parts, one below the other, each has an A and a B of its own; a larger rank divides ALPHA
    assert 0.9 < LowRank(torch.zeros(300, 100), rank=50, parts=3).A.std() * 100**0.5 < 1.1
    low_rank = shake(LowRank(torch.zeros(4, 2), rank=2, parts=2))
    low_rank.B.data[0] = 0
    below = ALPHA / 2 * low_rank.B[1] @ low_rank.A[1]
    assert torch.allclose(low_rank(torch.zeros(4, 2)), torch.cat([torch.zeros(2, 2), below]))


@pytest.mark.parametrize("name, how, count", [
    ("ViT-tiny", "qkv", 2 * 3 + 2), ("ViT-tiny", "all", 2 * 6 + 2 * 4), ("RN-tiny", "qkv", 2 * 3 + 3),
    ("RN-tiny", "all", 2 * 6 + 4)])
def test_an_adapted_model_starts_as_it_was_and_is_saved_as_a_plain_one(name, how, count, tmp_path, capsys):
    start = shake(model.ChineseCLIP(model.MODELS[name]))
    clip = adapted(name, start, lora=3, lora_on=how)
    assert torch.equal(features(start), features(clip))
    assert set(clip.state_dict()) == set(start.state_dict())
    trains, frozen = split(clip)
    assert len(trains) == 2 * count + 1 and "logit_scale" in trains  # A and B beside each weight
    assert len(frozen) == len(start.state_dict()) - 1
    assert "visual, the first" in capsys.readouterr().out

    for p in trains.values():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    model.save(clip, str(tmp_path / "it"))
    merged, _ = model.load(str(tmp_path / "it"))
    assert difference(features(merged), features(clip)) < 1e-6 < difference(features(start), features(clip))
    with torch.autocast("cpu", torch.bfloat16):  # there, too, the sum is float32
        assert torch.equal(clip.bert.encoder.layer[0].attention["self"].query.weight,
                           merged.bert.encoder.layer[0].attention["self"].query.weight)


def test_at_full_rank_any_weights_can_be_reached():
    """Fine-tuning moves W to W'. With rank = width, A the identity and B = (W' - W) rank / ALPHA do too."""
    start = shake(model.ChineseCLIP(model.MODELS["ViT-tiny"]))
    clip = adapted("ViT-tiny", start, lora=32)
    wanted = copy.deepcopy(start)
    for name, module in clip.named_modules():
        if isinstance(module, LowRank):
            path, _, key = name.partition(".parametrizations.")
            weight = wanted.get_submodule(path).get_parameter(key.split(".")[0])
            change = torch.randn_like(weight)
            weight.data += change
            module.A.data = torch.eye(32).expand_as(module.A).clone()
            module.B.data = (change * 32 / ALPHA).view_as(module.B)
    assert difference(features(clip), features(wanted)) < 1e-5 < difference(features(clip), features(start))


def test_stage_1_adapts_the_text_tower_alone_and_trains_a_fresh_projection():
    clip = model.ChineseCLIP(model.MODELS["ViT-tiny"])
    add_lora(clip, Config(model="ViT-tiny", lora=2, freeze_image=True, text_init="a file"))
    assert not any(name.startswith("visual.") for name in split(clip)[0])
    assert {"text_projection", "logit_scale"} < set(split(clip)[0])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("start") / "start.safetensors")
    model.save(shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])), path)
    return path


RUN = dict(lora=2, lora_on="all", save_every=2, eval_every=6, lr=1e-2, log_every=1)


@pytest.fixture(scope="module")
def whole(pairs, start, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train.train("act", flags(pairs, out, init=start, **RUN))
    return out


def test_what_a_run_says_of_it(pairs, tmp_path, capsys):
    train.train("act", flags(pairs, tmp_path, model="RN-tiny", steps=1, chunk_size=4, lora=2, lr=0.0))
    said = capsys.readouterr().out
    count = sum(p.numel() for p in model.ChineseCLIP(model.MODELS["RN-tiny"]).parameters())
    assert f"; {count - 1 - 32 * 16:,} are frozen, the others train" in said  # not the temperature, projection
    assert "peak learning rate 1.17e-06; the recipe's is 5.00e-05 from batch 1,024 on, with --lora three times " \
           "that: 1.17e-06 here" in said
    assert "BatchNorm" not in said


def test_a_checkpoint_is_no_model_and_goes_on_with_lora_alone(whole, pairs, start, tmp_path):
    with pytest.raises(WeightsError, match="a checkpoint of --lora holds only what trains; best.safetensors"):
        model.load(str(whole / "checkpoint.pt"))
    train.train("act", flags(pairs, tmp_path, init=start, steps=1, save_every=1))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for flag in ("lora", "lora_on", "precision"):  # as before there were such flags
        del saved["flags"][flag]
    del saved["computes"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    train.train("act", flags(pairs, tmp_path, init=start, steps=1, save_every=1))
    with pytest.raises(ConfigError, match="made with --lora 0, this command has --lora 2"):
        train.train("act", flags(pairs, tmp_path, init=start, steps=1, save_every=1, lora=2))


def test_a_run_in_another_precision_says_so(pairs, start, tmp_path, monkeypatch, capsys):
    """A run may go on on a machine that computes in bfloat16."""
    train.train("act", flags(pairs, tmp_path, init=start, steps=1, save_every=1))
    monkeypatch.setattr(train, "choose_precision", lambda *args: torch.bfloat16)
    train.train("act", flags(pairs, tmp_path, init=start, steps=1, save_every=1))
    said = capsys.readouterr().out
    assert "was made with towers in torch.float32, this command has towers in torch.bfloat16: goes on, but" in said


def test_a_run_leaves_a_plain_model_and_a_small_checkpoint(whole, start):
    before, after = load_file(start), load_file(whole / "last.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if name.startswith(("bert.encoder", "visual.transformer"))
                and before[name].ndim == 2}
    assert moved == matrices | {"logit_scale"} and set(after) == set(before)
    saved = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert all(name.endswith((".0.A", ".0.B")) or name == "logit_scale" for name in saved["model"])
    assert describe(model.load(str(whole / "best.safetensors"))[0].config, model.MODELS) == "ViT-tiny"


@pytest.mark.parametrize("how", [
    {}, dict(precision="float16"),
    dict(teacher="start", chunk_size=3, grad_checkpointing=True, precision="bfloat16")])
def test_a_run_that_was_stopped_ends_as_the_whole_one(how, whole, pairs, start, tmp_path, monkeypatch):
    how = RUN | how | (dict(teacher=start) if "teacher" in how else {})
    if how != RUN:
        whole = tmp_path / "whole"
        train.train("act", flags(pairs, whole, init=start, **how))
    calls = iter(range(9))  # the first after the measurement before step 1, then one after each step
    monkeypatch.setattr(train.Checkpoints, "asked", lambda *args, **more: (True, next(calls) == 3))
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        train.train("act", flags(pairs, tmp_path / "cut", init=start, **how))
    monkeypatch.undo()
    train.train("act", flags(pairs, tmp_path / "cut", init=start, **how))
    one, other = (load_file(out / "last.safetensors") for out in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_goes_on_only_beside_the_weights_that_it_was_made_with(whole, pairs, tmp_path):
    model.save(shake(model.ChineseCLIP(model.MODELS["ViT-tiny"]), 1), other := str(tmp_path / "other"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    saved["flags"]["init"] = other
    torch.save(saved, out / "checkpoint.pt")
    with pytest.raises(ConfigError, match="was made with other weights to start from than there are now"):
        train.train("act", flags(pairs, out, init=other, **RUN))


@pytest.mark.parametrize("argv, said", [
    (["--lora", "8"], "--lora: random weights are nothing to adapt; name trained ones by --init"),
    (["--lora", "8", "--image-init", "x"], "--lora: random weights are nothing to adapt"),
    (["--lora", "-1", "--init", "x"], "--lora -1: expected 0 or more"),
])
def test_what_cannot_be_adapted_is_refused(argv, said):
    with pytest.raises(ConfigError, match=said):
        parse(["--recipe", "scratch", "--model", "ViT-tiny", "--data", "scenes-zh", "--lr", "1e-3", *argv])


def test_of_several_acts_those_adapt_that_start_from_trained_towers():
    assert [cfg.lora for cfg in parse(["--lora", "8"]).values()] == [0, 0, 8]  # the demo
    towers = ["--image-init", "a", "--text-init", "b"]
    acts = parse(["--recipe", "pretrain", "--data", "x", "--lora", "8", *towers])
    assert [cfg.lora for cfg in acts.values()] == [8, 8]


def test_a_rank_above_the_width_is_refused(pairs, start, tmp_path):
    with pytest.raises(ConfigError, match="--lora 33: bert.encoder.layer.0.* has at most rank 32"):
        train.train("act", flags(pairs, tmp_path, init=start, lora=33))
