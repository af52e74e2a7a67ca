"""Worker processes: they ignore the signals that end a run, and end with it."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader

from training.processes import start_workers


class Counting(torch.utils.data.Dataset):
    """Numbers; reading number 5 fails."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return 1 / (i - 5)


class Handlers(torch.utils.data.Dataset):
    """Says whether the process that reads it ignores SIGTERM and SIGINT."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_ignore_signals_however_they_are_started(way):
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {way} processes")
    (ignored,) = start_workers(DataLoader(Handlers(), num_workers=1, multiprocessing_context=way))
    assert all(ignored)


def test_a_process_that_fails_does_not_wait_for_its_workers():
    """multiprocessing would send the workers a SIGTERM, which they ignore, and wait for ever."""
    code = ("from test_processes import Counting, DataLoader, start_workers\n"
            "for _ in start_workers(DataLoader(Counting(), num_workers=1)): pass")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "training")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
