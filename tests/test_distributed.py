"""
The same step, however it is cut: whole batch, chunks, tiles, two and four processes, and chunks within
processes train to the same parameters, in float64 to 1e-9, with dropout and patch dropping on, for both
target modes.

Dropout draws its numbers by chunk (train.py's seed_chunk), so the reference for a batch in four chunks is one
process that runs the four forward passes, keeps everything, and takes one dense loss: no replay, no tiles.
"""

import functools
import itertools
import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import leave_processes
from conftest import whole_batch, write_folder
from safetensors.torch import load_file

from training import tiles
import model
import train
from eval import retrieval
from sources.layouts import open_pairs

STAGES = {  # act: (model, flags)
    "stage1-RN": ("RN-tiny", dict(freeze_image=True)),
    "stage1-ViT": ("ViT-tiny", dict(freeze_image=True)),
    "stage2-ViT": ("ViT-tiny", dict(patch_drop=0.25)),
    "stage2-RN": ("RN-tiny", {}),  # BatchNorm sees its chunk, here as there
    "LoRA-ViT": ("ViT-tiny", dict(lora=2, lora_on="all")),
    "LoRA-RN": ("RN-tiny", dict(lora=2)),  # BatchNorm is frozen
}
WHOLE = {"whole": 1, "whole, as 2": 2, "whole, as 4": 4}  # one process; BatchNorm's statistics as of so many
# name: (processes, chunk size, tiles instead of the matrix); every one holds 16 pairs as chunks of 4
WAYS = {"chunked": (1, 4, False), "chunked, tiled": (1, 4, True), "2 x chunked": (2, 4, False),
        "2 x chunked, tiled": (2, 4, True), "4": (4, 0, False), "4, tiled": (4, 0, True)}


def worker(rank: int, world_size: int, data: str, out: str):
    """All ways of this many processes, one after the other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world_size)
    for way, (processes, chunk, tiled) in (WAYS | {way: (1, 4, False) for way in WHOLE}).items():
        if processes != world_size:
            continue
        # `chunk` of the reference only numbers the random numbers; it keeps the whole graph
        if way in WHOLE:
            train.features_in_chunks = functools.partial(whole_batch, ranks=WHOLE[way])
            train.backward_in_chunks = lambda *arguments: None  # the loss's backward pass has done it all
        train.DENSE_LIMIT, tiles.TILE = (0, 3) if tiled else (2**25, 2048)
        stages = STAGES if WHOLE.get(way, 1) == 1 else {"stage2-RN": STAGES["stage2-RN"]}
        for (act, (name, how)), targets in itertools.product(stages.items(), ("one-hot", "multi")):
            if (name == "RN-tiny" or "lora" in how) and targets == "multi":
                continue  # what BatchNorm and LoRA do is the same for both
            train.train(act, train.Config(
                model=name, data=data, batch_size=16, chunk_size=chunk, targets=targets, steps=2, lr=1e-2,
                warmup=1, workers=0, device="cpu", eval_every=2, log_every=1,
                out=f"{out}/{way}/{act}-{targets}", **how))
    if world_size > 1:
        leave_processes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> {way: folder}, each trained on the same 24 pairs, of which every third shares its caption."""
    folder = tmp_path_factory.mktemp("distributed")
    write_folder(folder / "pairs", 24)
    lines = (folder / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for i in range(0, len(lines), 3):
        lines[i] = lines[i].split('"text"')[0] + '"text": "同一句话"}'
    (folder / "pairs" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for world_size in (1, 2, 4):
        mp.spawn(worker, (world_size, str(folder / "pairs"), str(folder)), nprocs=world_size)
        (folder / "store").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("stage, targets", [
    *((stage, "one-hot") for stage in STAGES), ("stage1-ViT", "multi"), ("stage2-ViT", "multi")])
@pytest.mark.parametrize("way", WAYS)
def test_parameters_and_statistics_equal_those_of_the_whole_batch(trained, way, stage, targets):
    reference = "whole" if stage != "stage2-RN" or WAYS[way][0] == 1 else f"whole, as {WAYS[way][0]}"
    whole, other = (load_file(trained / name / f"{stage}-{targets}" / "last.safetensors")
                    for name in (reference, way))
    assert whole["logit_scale"].dtype == torch.float64
    for name, value in whole.items():
        assert (value - other[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][0] > 1])
def test_saved_statistics_are_those_that_were_measured(trained, way):
    """Recall of the saved model is the recall in its history: all processes measured one and the same."""
    folder = trained / way / "stage2-RN-one-hot"
    history = torch.load(folder / "checkpoint.pt", weights_only=True)["history"]
    torch.set_default_dtype(torch.float64)
    try:
        clip = model.ChineseCLIP(model.MODELS["RN-tiny"])
        clip.load_state_dict(load_file(folder / "last.safetensors"))
        measured = retrieval(clip.eval(), open_pairs(str(trained / "pairs"), "valid"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert measured["mean_recall"] == history[-1]["mean_recall"]


@pytest.mark.parametrize("stage", STAGES)
def test_logs_tell_the_loss_of_the_whole_batch(trained, stage):
    logs = [[json.loads(line) for line in (trained / way / f"{stage}-one-hot" / "log.jsonl").open()]
            for way in ("whole", "2 x chunked", "4, tiled")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] == pytest.approx(losses[2], rel=1e-9)


def test_the_modes_differ(trained):
    """Or the equalities above would show nothing."""
    one_hot, multi = (load_file(trained / "whole" / f"stage2-ViT-{targets}" / "last.safetensors")
                      for targets in ("one-hot", "multi"))
    assert (one_hot["text_projection"] - multi["text_projection"]).abs().max() > 1e-6


def test_recall_is_the_same_for_any_number_of_processes(trained):
    paths = [trained / way / "stage2-ViT-one-hot" / "checkpoint.pt" for way in ("whole", "2 x chunked", "4")]
    histories = [torch.load(path, weights_only=True)["history"] for path in paths]
    assert histories[0] == histories[1] == histories[2]


def test_training_changed_what_it_should(trained):
    start = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    fresh = model.ChineseCLIP(model.MODELS["RN-tiny"]).state_dict()
    torch.set_default_dtype(torch.float32)
    torch.set_rng_state(start)
    after = load_file(trained / "whole" / "stage1-RN-one-hot" / "last.safetensors")
    for name, value in fresh.items():  # stage 1: the image tower, BatchNorm statistics included, is as it was
        same, either = torch.equal(value, after[name]), name.endswith((".key.bias", "embeddings.weight"))
        assert same == name.startswith("visual.") or either, name
    assert not torch.equal(fresh["logit_scale"], after["logit_scale"])
