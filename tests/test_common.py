"""Files that appear only when they are complete; which device a process has (no GPU is needed to ask)."""

import datetime
import os
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import common
from conftest import ROOT


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(temporary):
        assert os.path.dirname(temporary) == str(tmp_path)  # the same disk, or renaming would not be atomic
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.replace(str(tmp_path / "x"), interrupted)
    assert os.listdir(tmp_path) == []


def gpus(monkeypatch, count: int, local_rank: int) -> torch.device:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=device))
    return common.join_processes("cuda")


def test_a_process_that_sees_one_gpu_alone_has_it(monkeypatch):
    """SLURM may show each task its own GPU only, which is number 0 there whatever the task's number."""
    assert gpus(monkeypatch, 1, 3) == torch.device("cuda", 0)
    assert gpus(monkeypatch, 8, 3) == torch.device("cuda", 3)


def waiter(rank: int, store: str, out: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    common.patient_group()
    usual, short = datetime.timedelta(minutes=30), datetime.timedelta(seconds=1)
    dist.distributed_c10d._set_pg_timeout(short, dist.group.WORLD)
    if rank == 0:
        time.sleep(3)  # a long phase of one process: other collectives would be given up after a second
    common.wait_for_all()
    dist.distributed_c10d._set_pg_timeout(usual, dist.group.WORLD)
    said = []
    for name in ("the same", str(rank)):
        try:
            common.one_process_a_device(name)
        except SystemExit as error:
            said.append(str(error))
    torch.save(said, f"{out}{rank}")
    common.leave_processes()


def test_processes_wait_for_a_long_phase_and_notice_a_shared_gpu(tmp_path):
    mp.spawn(waiter, (str(tmp_path / "store"), str(tmp_path / "said")), nprocs=2)
    for rank in (0, 1):
        (said,) = torch.load(tmp_path / f"said{rank}", weights_only=True)
        assert "2 processes have the GPU the same" in said


ALONE = """
import os, sys
import torch, torch.distributed as dist
import common

def threads():
    return sum("gloo" in open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task"))

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])  # imports much of torch
common.wait_for_all()
common.sum_over_ranks(torch.ones(2))
before = threads()
common.leave_processes()
print(before > 0, threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks at the threads in /proc")
def test_no_thread_outlives_the_groups(tmp_path):
    """A thread that still holds a tensor when Python shuts down would abort the process."""
    run = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "store")], cwd=ROOT, text=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (run.stdout, run.returncode) == ("True 0\n", 0), run.stderr
