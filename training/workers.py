"""
Worker processes that prepare pairs while the model computes, and that ignore Ctrl-C and SIGTERM.

Both signals reach every process of a run. The training process alone answers them: it finishes its step, for
which it needs its workers, saves, and then ends the workers itself.
"""

import atexit
import multiprocessing
import signal

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def started(loader: torch.utils.data.DataLoader):
    """-> an iterator over the loader, whose workers ignore the signals."""
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
