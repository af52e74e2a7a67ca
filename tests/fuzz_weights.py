"""
Thousands of damaged and hostile weight files: reading one may raise WeightsError, one line, and nothing else
may happen. No crash, no hang (a case has a minute), no more memory than twice the files plus 100 MB.

    python tests/fuzz_weights.py --count 10000        # minutes; tests/test_fuzz.py runs a few hundred

A case is a small good model in one of the layouts of `good_files`, of which one file was damaged: in every
second case bytes of it, wherever they stand, in the others what describes the tensors: lengths and offsets
of a header, values of a JSON file, opcodes of a pickle, the directory of a zip file. It is read, loaded, and
used to initialise another model. Memory is measured on Linux only: the address space is cut to the allowance,
and the peak of what was really used is read off.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import os
import pickletools
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile

import safetensors.torch
import torch
from fuzz import damage

from tools import weights
import model
from weights.names import WeightsError, to_hugging_face
from weights.start import initialise
from bert import BertConfig
from resnet import ResNetConfig
from vit import ViTConfig

ALLOWED = 100_000_000  # bytes, beside twice the files
SECONDS = 60  # a quarter of a second is usual
LINUX = sys.platform == "linux"
TEXT = BertConfig(2, 16, 2, vocab_size=50, max_positions=60)
SMALL = {"ViT-fuzz": model.ModelConfig(8, ViTConfig(16, 8, width=16, layers=2, head_width=8), TEXT),
         "RN-fuzz": model.ModelConfig(8, ResNetConfig(32, width=4, blocks=(1, 1, 1, 1), heads=4), TEXT)}
NUMBERS = (0, 1, 2, 3, 8, 100, 255, 2**15, 2**16 - 1, 2**20, 2**24, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
           2**61 - 1, 2**63 - 1, 2**63, 2**64 - 1)

# ------------------------------------------------------------------------------------------------------------
# good files


def pickled(content, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def scripted(tensors: dict[str, torch.Tensor]) -> bytes:
    """A TorchScript archive of modules in modules."""
    root, file = torch.nn.Module(), io.BytesIO()
    for name, value in tensors.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        node.register_buffer(last, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), file)
    return file.getvalue()


@functools.cache
def good_files() -> dict[str, dict[str, bytes]]:
    """Layout -> name of a file: what is in it. The first file is the one to read."""
    torch.manual_seed(0)
    clips = {name: model.ChineseCLIP(config) for name, config in SMALL.items()}
    vit, rn = (clip.state_dict() for clip in clips.values())
    half = {"module." + key: value.half() for key, value in vit.items()}
    their = to_hugging_face(vit)
    keys = list(their)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    config = json.dumps(weights.hugging_face_config(SMALL["ViT-fuzz"])).encode()
    ours = json.dumps(dataclasses.asdict(SMALL["ViT-fuzz"]))
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": value} for i, value in enumerate(rn.values())}
    return {
        "ours": {"a.safetensors": safetensors.torch.save(vit, {"config": ours})},
        "official": {"a.pt": pickled({"epoch": 1, "name": "fuzz", "state_dict": half})},
        "official, legacy": {"a.pt": pickled({"state_dict": half}, zipped=False)},
        "checkpoint": {"checkpoint.pt": pickled({
            "model": rn, "config": json.dumps(dataclasses.asdict(SMALL["RN-fuzz"])), "step": 3,
            "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}})},
        "TorchScript": {"a.pt": scripted({key: value for key, value in vit.items() if key[0] != "b"})},
        "Hugging Face": {"model.safetensors": safetensors.torch.save(their), "config.json": config},
        "Hugging Face, old": {"pytorch_model.bin": pickled(their), "config.json": config},
        "shards": {"model.safetensors.index.json": json.dumps({"weight_map": {
            key: name for name, part in shards.items() for key in part}}).encode(), "config.json": config} | {
            name: safetensors.torch.save({key: their[key] for key in part}) for name, part in shards.items()},
        "open_clip": {"open_clip_pytorch_model.bin": pickled({k: v for k, v in vit.items() if k[0] != "b"})},
        "BERT": {"pytorch_model.bin": pickled(clips["RN-fuzz"].bert.state_dict(), zipped=False)}}


# ------------------------------------------------------------------------------------------------------------
# damage to what describes the tensors


def other_value(rng: random.Random):
    """For JSON: what a reader may take for a size, a name, a structure."""
    deep = functools.reduce(lambda inner, _: [inner], range(300), 0)
    return rng.choice((
        *NUMBERS, -1, 0.5, 1e308, None, True, "", "F8_E4M3", "C64", "I64", "F64", "BOOL", "config.json",
        "../a.pt", "model.safetensors.index.json", "b.safetensors", "\n", "gelu", [], {}, [[]] * 9,
        [2**40, 2**40], [1] * 9999, {str(n): n for n in range(999)}, "猫" * 99_999, "[" * 9999, deep))


def change_json(value, rng: random.Random):
    """The same with one of its values, at any depth, replaced, taken out, or said twice."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return other_value(rng)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.randrange(12)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[rng.choice((key + "x", "\n", "x" * 5000, "vision_model.", "module."))] = value[key]
    else:
        value[key] = change_json(value[key], rng)
    return value


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return rng.choice((*NUMBERS, length - 1, length + 1)).to_bytes(8, "little") + content[8:]
    parsed = json.loads(content[8: 8 + length])
    if "__metadata__" in parsed and rng.random() < 0.4:
        config = json.loads(parsed["__metadata__"]["config"])
        parsed["__metadata__"]["config"] = json.dumps(change_json(config, rng))
    else:
        parsed = change_json(parsed, rng)
    header = json.dumps(parsed).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length:]


def number(code: str, value: int) -> bytes:
    return struct.pack(code, value % 2 ** (8 * struct.calcsize(code)))


def call(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


def hostile_opcodes(rng: random.Random) -> bytes:
    """A few opcodes that make much of little, or something that no checkpoint needs."""
    value, n = rng.choice(NUMBERS), rng.choice((1, 50, 50, 3000) * 10 + (100_000,))
    four, eight = number("<I", value), number("<Q", value)
    code = bytes([rng.choice(b"rjXTBJG\x8b\x8d\x8e\x95\x96")])
    return rng.choice((
        code + four, code + eight, b"(" * n, b"]" * n, b"}" * n, b"\x85" * n, b"\x94" * n, b"2" * n,
        b"R", b"b", b"\x81", b"s", b"u", b"e", b"a", b"t", b"Q", b"0", b".", b")Q", b"}(K\1K\2K\3K\4u",
        b"]q\1" + b"h\1a" * n, b"}q\1" + b"h\1h\1s" * n, b"(" + b"N" * n + b"tq\1" + b"h\1" * n,
        b"(" + b"N" * n + b"tq\1" + b"ctorch\nSize\nq\2" + b"h\2h\1R0" * n,
        b"ccollections\nOrderedDict\nq\1" + b"h\1)R" * n,
        b"c__torch__\nM\nq\1" + b"h\1)\x81}U\1ah\1)\x81sb" * n,
        b"ctorch\nFloatStorage\n", call(b"builtins\nset", b"h\0"), call(b"os\nsystem", b"U\4true"),
        call(b"builtins\nbytearray", b"J" + four), call(b"torch\nTensor", b"J" + four),
        call(b"torch.storage\nUntypedStorage", b"J" + four),
        call(b"torch._utils\n_rebuild_tensor", b"h\0K\0K\1\x85K\1\x85"),
        call(b"torch._tensor\n_rebuild_from_type_v2", b"h\0h\0)N"),
        b"c_codecs\nencode\n" * n + b"X\4\0\0\0aaaa" + b"X\3\0\0\0hex\x86R" * n))


def change_pickle(program: bytes, rng: random.Random) -> bytes:
    """One to three opcodes of it with another argument, replaced, taken out, doubled, or hostile ones."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            places = [place for _, _, place in pickletools.genops(program)] + [len(program)]
        except Exception:  # an earlier round left what pickletools cannot cut into opcodes, for many reasons
            return program
        which = rng.randrange(len(places) - 1)
        start, end = places[which: which + 2]
        how, opcode = rng.randrange(6), program[start: end]
        if how == 0 and len(opcode) > 1:
            argument = number(rng.choice(("<B", "<H", "<I", "<Q")), rng.choice(NUMBERS))
            opcode = opcode[:1] + argument + opcode[1 + len(argument):]
        elif how == 1:
            opcode = rng.choice(pickletools.opcodes).code.encode("latin-1") + opcode[1:]
        elif how == 2:
            opcode = b""
        elif how == 3:
            other = rng.randrange(len(places) - 1)
            opcode = program[places[other]: places[min(other + 5, len(places) - 1)]] + opcode
        else:
            opcode += hostile_opcodes(rng)
        program = program[:start] + opcode + program[end:]
    return program


def change_zip(content: bytes, rng: random.Random) -> bytes:
    """Another pickle in the archive, other members, or other numbers in its directory."""
    how = rng.randrange(4)
    if how < 2:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            for member in old.infolist():
                name, inside, packed = member.filename, old.read(member), zipfile.ZIP_STORED
                if how == 0 and name.endswith("/data.pkl"):
                    inside = change_pickle(inside, rng)
                elif how == 1 and rng.random() < 0.1:
                    name = rng.choice((name, name, "../x", "x/data/0", "x/constants.pkl", "x/data.pkl"))
                    inside = rng.choice((b"", inside[:-1], inside * 2, b"big", bytes(10**6)))
                    packed = zipfile.ZIP_DEFLATED if len(inside) == 10**6 else zipfile.ZIP_STORED
                new.writestr(zipfile.ZipInfo(name), inside, packed)
            for n in range(5000 if rng.random() < 0.02 else 0):
                new.writestr(f"x/data/{n}", b"")
        return file.getvalue()
    content = bytearray(content)
    directory = content.index(b"PK\1\2")
    for _ in range(rng.choice((1, 1, 3))):
        at, code = rng.randrange(directory, len(content)), rng.choice(("<B", "<H", "<I", "<Q"))
        if rng.random() < 0.3:  # in the header of a member
            at = content.index(b"PK\3\4", rng.randrange(directory // 2)) + rng.randrange(30)
        other = number(code, rng.choice(NUMBERS))
        content[at: at + len(other)] = other
    return bytes(content)


def change_structure(name: str, content: bytes, rng: random.Random) -> bytes:
    if name.endswith(".json"):
        return json.dumps(change_json(json.loads(content), rng)).encode()
    if name.endswith(".safetensors"):
        return change_safetensors(content, rng)
    if content.startswith(b"PK"):
        return change_zip(content, rng)
    file, ends = io.BytesIO(content), []  # legacy: five pickles
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    which = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
    start, end = ([0] + ends)[which: which + 2]
    if rng.random() < 0.1:  # the length of the first storage
        return content[:ends[-1]] + number("<Q", rng.choice(NUMBERS)) + content[ends[-1] + 8:]
    return content[:start] + change_pickle(content[start: end], rng) + content[end:]


# ------------------------------------------------------------------------------------------------------------
# one case


@contextlib.contextmanager
def allowance(size: int):
    """Memory of at most `size` bytes for what is inside; AssertionError if it took more."""
    if not LINUX:
        yield
        return
    import resource
    ctypes.CDLL(None).malloc_trim(0)  # what earlier cases left, or this one could use it unseen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before, limits = memory(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        peak = memory()["VmHWM"]
        statistics["peak"] = max(statistics["peak"], peak)
    used = peak - before["VmRSS"]
    assert used <= size, f"{used:,} bytes used, {size:,} allowed"


def memory() -> dict[str, int]:
    with open("/proc/self/status") as file:
        rows = dict(line.split(":") for line in file)
    return {key: 1024 * int(rows[key].split()[0]) for key in ("VmSize", "VmRSS", "VmHWM")}


statistics = collections.Counter()


class OutOfTime(BaseException):
    """Not an Exception, which readers turn into errors of their own."""


def out_of_time(*_):
    raise OutOfTime


def case(number: int, folder: str):
    rng = random.Random(number)
    layout = rng.choice(list(good_files()))
    files = dict(good_files()[layout])
    victim = rng.choice(list(files))
    changed = change_structure(victim, files[victim], rng) if number % 2 else damage(files[victim], rng)
    statistics["unchanged"] += changed == files[victim]
    files[victim] = changed
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    path = os.path.join(folder, list(files)[0])
    clip = model.ChineseCLIP(rng.choice(list(SMALL.values())))
    part = rng.choice(("init", "image_init", "text_init"))
    for action in (weights.info, model.load, lambda path: initialise(clip, model.MODELS, **{part: path})):
        with allowance(2 * sum(map(len, files.values())) + ALLOWED):
            try:
                action(path)
                statistics["read"] += 1
            except WeightsError as error:
                statistics["refused"] += 1
                assert "\n" not in str(error) and len(str(error)) < 6000, str(error)[:500]
                assert "MemoryError" not in str(error) and "alloc" not in str(error), str(error)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="the first case, to repeat one")
    args = parser.parse_args(argv)
    model.MODELS.update(SMALL)
    good_files()
    statistics.clear()
    start_memory = memory()["VmRSS"] if LINUX else 0
    clock, slowest = time.perf_counter(), 0.0
    for number in range(args.start, args.start + args.count):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            signal.signal(signal.SIGALRM, out_of_time)
            signal.alarm(SECONDS)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    case(number, folder)
            except BaseException:
                print(f"case {number}: python tests/fuzz_weights.py --start {number} --count 1",
                      file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    print(f"{args.count:,} cases in {time.perf_counter() - clock:.0f} s, the slowest {slowest:.2f} s; "
          f"each opened three times: {statistics['read']:,} read, {statistics['refused']:,} refused; "
          f"{statistics['unchanged']:,} cases were not changed; "
          f"never more than {(statistics['peak'] - start_memory) / 1e6:.1f} MB above the start")


if __name__ == "__main__":
    main()
