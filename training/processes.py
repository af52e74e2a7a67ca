"""
The processes of a run: training processes, which average what they learned, and workers, which prepare pairs
while the model computes.
"""

import atexit
import multiprocessing
import signal
import warnings

import torch

import model
from common import mean_over_ranks, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def distribute(clip: model.ChineseCLIP) -> torch.nn.Module:
    """The model itself, or, among several processes, one that averages gradients over them in backward."""
    if world_size() == 1:
        return clip
    with warnings.catch_warnings():  # torch 2.13 has a new name for this flag, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        # BatchNorm's statistics are averaged below; broadcast, they would be those of rank 0 alone
        return torch.nn.parallel.DistributedDataParallel(clip, broadcast_buffers=False)


def average_batchnorm(clip: model.ChineseCLIP):
    """Every process moves BatchNorm's running statistics by its own pairs. Set them to the mean over the
    processes, so that all measure and save the same model."""
    moving = [buffer for part in clip.visual.modules() if isinstance(part, torch.nn.BatchNorm2d)
              and part.training for buffer in (part.running_mean, part.running_var)]
    if moving:
        mean = mean_over_ranks(torch.cat([buffer.flatten() for buffer in moving]))  # one message for all
        for buffer, part in zip(moving, mean.split([buffer.numel() for buffer in moving])):
            buffer.copy_(part.view_as(buffer))


def start_workers(loader: torch.utils.data.DataLoader):
    """-> an iterator over the loader, whose workers ignore Ctrl-C and SIGTERM. These reach every process, but
    the training process alone answers them: it finishes its step, for which it needs its workers, saves, and
    then ends the workers itself."""
    loader.worker_init_fn = ignore_signals
    if not loader.num_workers or not hasattr(signal, "pthread_sigmask"):  # Windows cannot block signals
        return iter(loader)
    # Python calls these functions last in, first out: ours has to run before that of multiprocessing.
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    # A forked worker inherits blocked signals, so none can end it before it ignores them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int):
    """The first thing that a worker does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill the workers that are left when a process ends with an error. multiprocessing would send them a
    SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would report their end as an error
    for child in multiprocessing.active_children():
        if child.daemon:  # as the workers of a DataLoader are
            child.kill()
