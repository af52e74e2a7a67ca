"""
What several files need: processes that find each other and add up numbers, files that appear only when they
are complete, and errors that a user sees as one line.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import re
import sys
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group exists, see leave_processes

# ------------------------------------------------------------------------------------------------------------
# processes: alone, or started together by torchrun; each has a number, its rank


def join_processes(device: str = "") -> torch.device:
    """-> this process's device: of the kind named, or a GPU if there is one. The processes that torchrun
    started find each other here. Tensors on CPUs travel by gloo, those on GPUs by nccl."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo"
        store, rank, world_size = next(dist.rendezvous("env://"))
        # after a restart torchrun's store still holds the addresses of the processes that died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(minutes=30))
        patient_group()  # now, because all processes must take part in making it
    if kind == "cpu":
        return torch.device("cpu")
    # SLURM may show each process one GPU alone, which is then its number 0
    own = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(own)
    one_process_a_device(str(torch.cuda.get_device_properties(own).uuid))
    return torch.device(kind, own)


def one_process_a_device(device: str):
    """SystemExit if two processes have the device of this name; nccl would say nothing that helps."""
    if dist.is_initialized():
        devices = [None] * dist.get_world_size()
        dist.all_gather_object(devices, device)
        if devices.count(device) > 1:
            raise SystemExit(f"error: {devices.count(device)} processes have the GPU {device}; start fewer")


@functools.cache
def patient_group():
    """All processes, connected by gloo, which may wait for each other for a week."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def leave_processes():
    """Leave the groups and wait until their threads have ended: a thread of gloo that drops a tensor while
    Python shuts down aborts the process. destroy_process_group waits only for groups that nothing refers to.
    So our cache is emptied here, and torch.distributed.nn.functional is imported before there is a group: its
    default arguments are evaluated then, and would keep one."""
    patient_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all():
    """Return when every process has called it, even if that takes longer than the half hour nccl waits."""
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Changes x itself; gradients do not flow through it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    return sum_over_ranks(x) / world_size()  # x becomes the sum, as gloo has no mean


# ------------------------------------------------------------------------------------------------------------
# files


def replace(path: str, write_to):
    """Call write_to(temporary name) and rename the result to `path`: a reader sees the old file or the new,
    never half of one, and a full disk or a kill leaves the old one as it was. OSError if it cannot be
    written."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.tmp"  # in the same folder, as a rename across disks is not atomic
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # the usual one; safetensors would set 0600
        try:
            write_to(temporary)
        except (RuntimeError, safetensors.SafetensorError) as error:  # what they raise on a full disk
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0][-120:]})") from None
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk first, or a power cut could leave an empty file there
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def replace_text(path: str, text: str):
    replace(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path: str, value):
    """Results as JSON; Chinese stays readable."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------------
# errors


class Flags(argparse.ArgumentParser):
    """A parser that answers a wrong flag with one line, not with a page of usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; add --help to see the flags\n")


class UserError(ValueError):
    """Something that a user can correct. Its message is one line: where, what was expected, what to do."""

    exit_code = 1


@contextlib.contextmanager
def one_line_errors(then: str = "", out_of_memory: str = "--dtype bfloat16 takes half"):
    """Around a whole command: a user's mistake, too little memory or a lost process ends it with one line and
    an exit code. `then` says what the user can do after an interruption."""
    try:
        yield
    except UserError as error:
        leave_processes()
        # an error of a worker process brings its traceback along; its last line is the message
        message = re.sub(r"^[\w.]*\.(DataError|SourceChanged): ", "", str(error).strip().split("\n")[-1])
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory ({str(error).splitlines()[0][:120]}); {out_of_memory}")
    except RuntimeError as error:
        reason = str(error).split("\n")[0]  # what a process says when another died
        if not (dist.is_initialized() and any(word in reason for word in ("gloo", "NCCL", "Connection"))):
            raise
        sys.exit(f"error: another process is gone, see its message{then}")
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)  # at once: a usual end would try to write what is left, and fail again
    except OSError as error:
        sys.exit(f"error: {error}{then}")
    except KeyboardInterrupt:
        sys.exit(f"stopped{then}")
