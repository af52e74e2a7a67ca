"""What all tests share: the project root on the path, two threads at most unless OMP_NUM_THREADS is set, and
a few helpers."""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import tarfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py: threads that wait leave the core to others

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sources.pairs import DataError  # noqa: E402
from training.recipes import Config  # noqa: E402
from weights import transfer  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:  # many threads only wait for each other in models as small as these
    torch.set_num_threads(min(2, torch.get_num_threads()))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, 0 for two zeros."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and every BatchNorm statistic off its initial value: with gains at 1 and biases at
    0, two layers that are swapped or left out would give the right answer."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=g))
    return module


def random_pixels(batch: int, resolution: int, seed: int = 0) -> torch.Tensor:
    """[B, 3, S, S] of about unit variance, as `preprocess` gives."""
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)  # [h, w, 3]


def says(action, *parts: str):
    """`action` raises a DataError of one line that holds each of `parts`."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def features(seed: int, n: int, E: int = 6, dtype=torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(n, E, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def gradients(loss_of, *inputs) -> list:
    """Value and gradients of a loss; None where an input needs none."""
    leaves = [x.clone().requires_grad_(needs) for x, needs in inputs]
    value = loss_of(*leaves)
    (3 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def whole_batch(forward, towers, chunks, ranks=1):
    """What `chunks.features_in_chunks` and then `backward_in_chunks` must equal: features of the same chunks in
    one graph that keeps everything. BatchNorm's running statistics are the mean of those that each of `ranks`
    processes gets from its share of the chunks."""
    features, start, ends = [], [buffer.clone() for buffer in towers.buffers()], []
    for k, chunk in enumerate(chunks):
        if k % (len(chunks) // ranks) == 0:  # a process begins with what all had
            for buffer, value in zip(towers.buffers(), start):
                buffer.data.copy_(value)
        features.append(forward(chunk))
        if (k + 1) % (len(chunks) // ranks) == 0:
            ends.append([buffer.clone() for buffer in towers.buffers()])
    for buffer, *values in zip(towers.buffers(), *ends):
        buffer.data.copy_(sum(values) / ranks)
    images, texts, scales = zip(*features)
    return torch.cat(images), torch.cat(texts), scales[0]


def write_folder(folder: Path, count: int):
    """A folder of pairs: pictures, train.jsonl and valid.jsonl with `count` lines each. Every picture has one
    colour and its caption says so."""
    folder.mkdir(parents=True)
    for split in ("train", "valid"):
        lines = []
        for i in range(count):
            colour = (40 * i % 256, 90 * i % 256, 150 * i % 256)
            Image.new("RGB", (32, 32), colour).save(folder / f"{split}{i}.png")
            lines.append({"image": f"{split}{i}.png", "text": f"第{i}张图片，颜色是{colour}"})
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def typed(program: str, *argv: str) -> tuple[int, str]:
    """Exit code and last words of a command that ends before any work: in this process, for a new one takes
    seconds to import torch."""
    said, signals = io.StringIO(), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in signals]
    with (mock.patch.object(sys, "argv", [program, *argv]), contextlib.redirect_stderr(said),
          pytest.raises(SystemExit) as caught):
        if program.startswith("python -m "):
            runpy.run_module(program.removeprefix("python -m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    for number, handler in zip(signals, handlers):  # train.py has its own, which end a process with 0
        signal.signal(number, handler)
    code = caught.value.code
    return (1, said.getvalue() + code) if isinstance(code, str) else (code, said.getvalue())


TINY = ["--recipe", "scratch", "--model", "ViT-tiny", "--batch-size", "8", "--lr", "1e-3",
        "--workers", "0", "--device", "cpu"]


def flags(pairs: str, out, **more) -> Config:
    """A small run on a CPU."""
    return Config(**dict(model="ViT-tiny", data=pairs, batch_size=8, steps=6, lr=1e-3, workers=0,
                         out=str(out), device="cpu") | more)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder with 24 training and 24 validation pairs."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_folder(folder, 24)
    return str(folder)


@pytest.fixture
def hub(monkeypatch):
    """A local server in the place of Hugging Face, for weights/download.py."""
    from hub import Hub
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.endpoint)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    for variable in ("HF_TOKEN", "ZHCLIP_HUB"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):  # whatever this machine has
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    yield server
    server.shutdown()
    server.server_close()


def write_tar(path: Path, members: list) -> str:
    """A shard of these members, (name, bytes) or TarInfo each -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                shard.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                shard.addfile(info, io.BytesIO(member[1]))
    return str(path)
