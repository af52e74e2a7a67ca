"""Several processes train to the parameters of one process that holds the whole batch: float64, gloo, both
stages."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import model
import train
from conftest import write_folder


def worker(rank: int, world_size: int, data: str, out: str):
    """Trains stage 1 (with BatchNorm, frozen) and then stage 2 as one of `world_size` processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name, config in list(model.MODELS.items()):  # dropout is drawn per process, so it cannot be equal
        model.MODELS[name] = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.0))
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}-store", rank=rank, world_size=world_size)
    flags = dict(data=data, batch_size=16, steps=4, lr=1e-2, warmup=1, workers=0, device="cpu", log_every=2)
    train.train("stage1", train.Config(model="RN-tiny", freeze_image=True, out=f"{out}/stage1", **flags))
    train.train("stage2", train.Config(model="ViT-tiny", out=f"{out}/stage2", **flags))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> {world size: folder}; one, two and four processes on the same 24 pairs."""
    folder = tmp_path_factory.mktemp("distributed")
    write_folder(folder / "pairs", 24)
    for world_size in (1, 2, 4):
        args = (world_size, str(folder / "pairs"), str(folder / str(world_size)))
        mp.spawn(worker, args, nprocs=world_size)
    return {world_size: folder / str(world_size) for world_size in (1, 2, 4)}


@pytest.mark.parametrize("stage", ("stage1", "stage2"))
@pytest.mark.parametrize("world_size", (2, 4))
def test_parameters_equal_one_process_with_the_whole_batch(trained, stage, world_size):
    alone, together = (load_file(trained[n] / stage / "last.safetensors") for n in (1, world_size))
    assert alone["logit_scale"].dtype == torch.float64
    for name, value in alone.items():
        assert (value - together[name]).abs().max() < 1e-9, name


def test_training_changed_what_it_should(trained):
    start = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    fresh = model.ChineseCLIP(model.MODELS["RN-tiny"]).state_dict()
    torch.set_default_dtype(torch.float32)
    torch.set_rng_state(start)
    after = load_file(trained[1] / "stage1" / "last.safetensors")
    for name, value in fresh.items():  # stage 1: the image tower, BatchNorm statistics included, is as it was
        same, either = torch.equal(value, after[name]), name.endswith((".key.bias", "embeddings.weight"))
        assert same == name.startswith("visual.") or either, name
    assert not torch.equal(fresh["logit_scale"], after["logit_scale"])
