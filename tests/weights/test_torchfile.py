"""weights/torchfile.py: PyTorch's files as data. What they may ask for, and that little never takes much."""

import collections
import functools
import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from fuzz_weights import ALLOWED, LINUX, allowance
from checkpoints import VIT, built, official, refusal, same, saved

import model
from weights import read, torchfile
from weights.names import to_hugging_face

MEMORY = pytest.mark.skipif(not LINUX, reason="memory is measured as Linux counts it")


class Storage:
    def __init__(self, numel, key="0", kind=torch.FloatStorage):
        self.id = ("storage", kind, key, "cpu", numel)


class Tensor:
    """Described as torch.save does, whatever is there."""

    def __init__(self, storage, size, stride=(1,), offset=0):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Writer(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def pickled(content) -> bytes:
    file = io.BytesIO()
    Writer(file, 2).dump(content)
    return file.getvalue()


def archive(path, program: bytes, storages=None, scripted: bool = False, more=None) -> str:
    """A zip file as torch.save or torch.jit.save writes it, around any pickle."""
    members = {"data.pkl": program} | {f"data/{key}": content for key, content in (storages or {}).items()}
    members |= ({"constants.pkl": b"N."} if scripted else {}) | (more or {})
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr("a/" + name, content)
    return str(path)


def modules(attributes: dict) -> bytes:
    """The root of a TorchScript archive."""
    return b"\x80\x02c__torch__\nM\n)\x81" + pickled(attributes)[2:-1] + b"b."


# ------------------------------------------------------------------------------------------------------------
# what is read


def test_torch_load_gives_the_same(tmp_path):
    """Every type, views, transposed, empty, shared and without a dimension, in both containers."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=g)
    tensors = {str(d): torch.randint(0, 2, (3, 4), generator=g).to(d) for d in torchfile.DTYPES.values()}
    tensors |= {"view": base[1:4, 2:], "transposed": base.T, "whole": base, "again": base,
                "scalar": base[0, 0], "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base + 1)}
    for how in (True, False):
        content = {"state_dict": tensors, "epoch": 3, "note": "一"}
        path = saved(tmp_path, content, _use_new_zipfile_serialization=how)
        state = read.read_file(path)[0]
        expected = torch.load(path, weights_only=True)["state_dict"]
        assert same(state, dict(expected))
        assert all(state[key].stride() == expected[key].stride() for key in state)
        assert state["whole"].data_ptr() == state["again"].data_ptr() == state["transposed"].data_ptr()


def test_what_a_checkpoint_holds_beside_weights_does_no_harm(tmp_path):
    clip = built(VIT)
    beside = {"shape": torch.Size([3]), "device": torch.device("cpu"), "dtype": torch.float16, "milestones":
              collections.Counter([3, 3]), "bytes": b"abc", "set": {1, 2}, "n": 2**60, "lr": [0.1, None]}
    path = saved(tmp_path, official(clip.state_dict()) | {"args": beside})
    assert same(model.load(path)[0].state_dict(), clip.state_dict())


@MEMORY
def test_only_what_is_asked_for_is_read(tmp_path):
    """The moments of an optimizer stay in the file, and the weights are mapped from it, not copied."""
    content = {"model": {"x": torch.ones(10**7)}, "optimizer": {"state": {0: torch.zeros(10**7)}}}
    path = saved(tmp_path, content)
    with allowance(90_000_000):  # of addresses, for a file of 80 MB
        x = read.read(path)[0]["x"]
    assert x.sum() == 10**7


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(1000)})
    read.read(path)[0]["x"].zero_()
    assert read.read(path)[0]["x"].sum() == 1000


# ------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("name", [
    "builtins.eval", "os.system", "torch.load", "collections.defaultdict", "torch._utils._rebuild_tensor",
    "builtins.bytearray", "torch.storage.UntypedStorage", "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2"])
@pytest.mark.parametrize("scripted", [False, True])
def test_files_may_ask_for_nothing_but_tensors(name, scripted, tmp_path):
    module, _, attribute = name.rpartition(".")
    program = f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")
    assert f"asks for {name}" in refusal(read.read, archive(tmp_path / "a.pt", program, scripted=scripted))


@pytest.mark.parametrize("window", [
    Tensor(Storage(4), (5,)), Tensor(Storage(4), (4,), offset=1), Tensor(Storage(4), (2, 2), (3, 1)),
    Tensor(Storage(4), (2, 2), (0, 1), 3), Tensor(Storage(4), (100,), (0,)), Tensor(Storage(5), (4,)),
    Tensor(Storage(2**50), (2**50,)), Tensor(Storage(4, key="../data.pkl"), (4,)),
    Tensor(Storage(4, key="1"), (4,)), Tensor(Storage(4, kind=torch.DoubleStorage), (4,))])
def test_tensors_that_reach_beyond_their_storage(window, tmp_path):
    path = archive(tmp_path / "a.pt", pickled({"x": window}), {"0": b"\0" * 16})
    assert "not a readable checkpoint (it has a tensor that claims" in refusal(read.read, path)


@pytest.mark.parametrize("window", [
    Tensor(Storage(4), (-4,)), Tensor(Storage(4), (4.0,)), Tensor(Storage(4), [4], [1]),
    Tensor(Storage(4), (1,) * 9, (1,) * 9),
    Tensor(Storage(4), (4,), (1, 1)), Tensor(Storage(4), (4,), offset=-1), Tensor(Storage(4), (True,)),
    Tensor(Storage(4), (2**70,)), Tensor(Storage(-4), (4,)), Tensor(Storage(4, key=0), (4,)),
    Tensor(Storage(4, kind=5), (4,)), Tensor(7, (4,)), Tensor(Storage(4), None)])
@pytest.mark.parametrize("scripted", [False, True])
def test_tensors_that_are_described_by_nonsense(window, scripted, tmp_path):
    content = modules({"x": window}) if scripted else pickled({"x": window})
    path = archive(tmp_path / "a.pt", content, {"0": b"\0" * 16}, scripted)
    assert "not a readable checkpoint" in refusal(read.read, path)


def test_a_dictionary_that_is_its_own_value(tmp_path):
    endless = {}
    endless["state_dict"] = endless
    path = archive(tmp_path / "a.pt", pickled(endless))
    assert "is a dict, expected a tensor" in refusal(read.read, path)


def test_a_legacy_file_whose_storage_has_another_length(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(1000)}, _use_new_zipfile_serialization=False)
    with open(path, "rb+") as file:
        content = file.read()
        file.seek(content.index((1000).to_bytes(8, "little")))
        file.write((999).to_bytes(8, "little"))
    assert "claims 1,000 numbers" in refusal(read.read, path)


@pytest.mark.parametrize("key", ["1", 0, "a tuple in tuples"])
def test_a_legacy_file_that_lists_another_storage(key, tmp_path):
    if key == "a tuple in tuples":  # which Python cannot even print
        key = functools.reduce(lambda inner, _: (inner,), range(900), "0")
    content = b"".join(map(pickled, ({}, {"x": Tensor(Storage(1), (1,))}, [key])))
    (tmp_path / "a.pt").write_bytes(torchfile.LEGACY + content + bytes(20))
    assert "lists a storage that no tensor has" in refusal(read.read, str(tmp_path / "a.pt"))


def test_an_index_is_no_shard(tmp_path):
    for name, other in (("a.json", "b.bin"), ("b.bin", "a.json")):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"x": other}}))
    assert "b.bin: not a readable checkpoint" in refusal(read.read, str(tmp_path / "a.json"))


def test_names_that_no_line_could_hold(tmp_path):
    for name in ("x\ny", "x" * 5000):
        assert "no ordinary tensor" in refusal(read.read, saved(tmp_path, {name: torch.ones(3)}))
        message = refusal(read.read, saved(tmp_path, {"state_dict": {name: 3}}))
        assert "is a int, expected a tensor" in message and len(message) < 1000


# ------------------------------------------------------------------------------------------------------------
# little that would make much


def four_bytes(number: int) -> bytes:
    return struct.pack("<I", number)


NUMBERED = [b"J" + four_bytes(i) + b"N" for i in range(30_000)]  # 0 None 1 None ...
BOMBS = {
    "a memo of 2^25 places": b"Nr" + four_bytes(2**25) + b".",
    "a memo of 2^32 places": b"Nr" + four_bytes(2**32 - 1) + b".",
    "bytearray(2^30)": b"cbuiltins\nbytearray\nJ" + four_bytes(2**30) + b"\x85R.",
    "a long text": b"X" + four_bytes(2**32 - 1) + b"abc.",
    "long bytes": b"\x8e" + struct.pack("<Q", 2**33) + b"abc.",
    "a long bytearray": b"\x96" + struct.pack("<Q", 2**33) + b"abc.",
    "a long number": b"\x8b" + four_bytes(2**31 - 1) + b"abc.",
    "text doubled thirty times": b"c_codecs\nencode\n" * 30 + b"U\4aaaa" + b"X\3\0\0\0hex\x86R" * 30 + b".",
    "lists": b"]" * 10**6 + b".",  # the most of all, 75 MB
    "many lists": b"]" * 3 * 10**7 + b".",
    "a dictionary copied": b"ccollections\nOrderedDict\nq\1](" + b"\x86".join(NUMBERED) + b"\x86eq\2("
    + b"h\1h\2\x85R" * 80_000 + b"t.",
    "attributes copied": b"c__torch__\nM\nq\1}(" + b"".join(NUMBERED) + b"uq\2("
    + b"h\1)\x81h\2b" * 80_000 + b"t.",
    "arguments copied": b"ctorch\nSize\nq\1(" + b"N" * 300_000 + b"tq\2(" + b"h\1h\2R" * 80_000 + b"t.",
    "keys that collide": b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N"
                                          for k in range(1, 70_000)) + b"u.",
}


@MEMORY
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_a_pickle(bomb, tmp_path):
    path = archive(tmp_path / "a.pt", b"\x80\x02" + BOMBS[bomb])
    with allowance(2 * (tmp_path / "a.pt").stat().st_size + ALLOWED):
        assert "Memory" not in refusal(read.read, path)


@MEMORY
@pytest.mark.parametrize("container", ["legacy", "TorchScript"])
@pytest.mark.parametrize("bomb", [
    "a memo of 2^25 places", "bytearray(2^30)", "a long text", "attributes copied"])
def test_bombs_in_other_containers(bomb, container, tmp_path):
    path = tmp_path / "a.pt"
    if container == "legacy":
        path.write_bytes(torchfile.LEGACY + b"\x80\x02N." + b"\x80\x02" + BOMBS[bomb] + b"\x80\x02].")
    else:
        archive(path, b"\x80\x02" + BOMBS[bomb], scripted=True)
    with allowance(2 * path.stat().st_size + ALLOWED):
        assert "Memory" not in refusal(read.read, str(path))


@MEMORY
@pytest.mark.parametrize("kind, size", [(torch.FloatStorage, 4), (torch.HalfStorage, 2)])
@pytest.mark.parametrize("scripted", [False, True], ids=["zip", "TorchScript"])
def test_one_storage_under_two_hundred_names(kind, size, scripted, tmp_path):
    tensors = {f"{i:03}": Tensor(Storage(10**6, kind=kind), (10**6,)) for i in range(200)}
    content = modules(tensors) if scripted else pickled(tensors)
    path = archive(tmp_path / "a.pt", content, {"0": bytes(10**6 * size)}, scripted)
    with allowance(2 * 10**6 * size + ALLOWED):
        assert "its tensors claim 800,000,000 bytes" in refusal(read.read, path)


@MEMORY
def test_one_attribute_with_a_long_name_in_every_module(tmp_path):
    program = b"\x80\x02c__torch__\nM\nq\1X" + four_bytes(400_000) + b"x" * 400_000 + b"q\2"
    program += b"h\1)\x81}h\2" * 900
    path = archive(tmp_path / "a.pt", program + b"N" + b"sb" * 900 + b".", scripted=True)
    with allowance(ALLOWED):
        assert "modules without end" in refusal(read.read, path)


@MEMORY
def test_a_directory_of_many_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        for i in range(30_000):
            file.writestr(f"a/data/{i}", b"")
    with allowance(2 * (tmp_path / "a.pt").stat().st_size + ALLOWED):
        assert "describes its tensors in" in refusal(read.read, str(tmp_path / "a.pt"))


@MEMORY
def test_members_that_are_the_same_bytes(tmp_path):
    """Three hundred names for one megabyte, at an odd address, where tensors are copied."""
    tensors = {f"x{i}": Tensor(Storage(1, key=str(i)), (1,)) for i in range(300)}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", pickled(tensors))
        file.writestr("a/data/0", bytes(10**6))
        first = file.getinfo("a/data/0")
        for i in range(1, 300):
            other = zipfile.ZipInfo(f"a/data/{i}")
            other.header_offset, other.file_size, other.compress_size = first.header_offset, 10**6, 10**6
            other.CRC = first.CRC
            file.filelist.append(other)
    with allowance(2 * 10**6 + ALLOWED):
        assert "overlap" in refusal(read.read, str(tmp_path / "a.pt"))


@MEMORY
@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json", "config.json"])
def test_descriptions_of_ten_megabytes(name, tmp_path):
    many = b'{"x":{"dtype":"F32","shape":[' + b"0," * 5_000_000 + b'0],"data_offsets":[0,0]}}'
    safetensors = tmp_path / "a.safetensors"
    if name == "config.json":
        read.write(str(safetensors), to_hugging_face(built(VIT).state_dict()), {})
        (tmp_path / name).write_bytes(many)
    else:
        length = len(many).to_bytes(8, "little") if name == "a.safetensors" else b""
        (tmp_path / name).write_bytes(length + many)
    path = tmp_path / ("a.safetensors" if name == "config.json" else name)
    with allowance(2 * path.stat().st_size + ALLOWED):
        assert "1,048,576" in refusal(read.read, str(path))


def test_the_largest_model_is_described_in_a_third_of_what_is_allowed():
    with torch.device("meta"):
        weights_of = model.ChineseCLIP(model.MODELS["ViT-H-14"]).state_dict()

    def tensors(count: int) -> list[Tensor]:
        return [Tensor(Storage(10**6, key=f"{i + 1000}"), (1000, 1000), (1000, 1)) for i in range(count)]

    moments = {i: dict(zip(("step", "exp_avg", "exp_avg_sq"), tensors(3))) for i in range(len(weights_of))}
    checkpoint = {"model": dict(zip(weights_of, tensors(len(weights_of)))), "optimizer": {"state": moments}}
    assert torchfile.LONGEST / 6 < len(pickled(checkpoint)) < torchfile.LONGEST / 3
