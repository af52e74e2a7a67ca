"""
PyTorch's files, read as data: which tensors a file holds, where in it their numbers stand, and nothing else.

    zip           torch.save since 1.6: NAME/data.pkl is the description, the storages are NAME/data/0, 1, ...
    TorchScript   the same with NAME/constants.pkl beside it, and with modules in the place of dictionaries
    legacy        torch.save before 1.6: the description, a list of storages, and these one after another

A storage is a row of numbers in the file. A tensor is a window on a storage: an offset, sizes and strides.
The description is read first and compared with what is really there, and only then is the file mapped.
torch.load would not do: its weights_only keeps a file from running code but not from taking memory, and 244
bytes that say `bytearray(2**30)` get their gigabyte.
"""

import io
import math
import os
import pickle
import zipfile
from typing import NamedTuple

import torch

LONGEST = 2**20  # bytes of a description; that of ViT-H-14's checkpoint with AdamW's moments has 0.3 million
# The first bytes of a legacy file: a magic number and a version, pickled.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}

class Refused(ValueError):
    """The file asks for something that no checkpoint needs, which the message names."""


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class Window(NamedTuple):
    """A tensor that is described but not yet read."""
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Module:
    """Stands for a module of a TorchScript archive. It has attributes but no behaviour."""
    attributes: dict = {}


# ------------------------------------------------------------------------------------------------------------
# descriptions


def window(storage, offset, size, stride, *_) -> Window:
    """Called in the place of torch's function that makes a tensor. Refused if the tensor reaches beyond its
    storage, or repeats numbers: repetitions need no bytes in a file but any amount of memory."""
    sizes = type(storage) is Storage and type(size) is type(stride) is tuple and len(size) == len(stride) < 9
    if not sizes or any(type(n) is not int or not 0 <= n < 2**60 for n in (offset, *size, *stride)):
        raise Refused("describes a tensor by something other than sizes")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if numel and (numel > storage.numel or last >= storage.numel):
        raise Refused(f"has a tensor that claims {numel:,} numbers; {storage.numel:,} are there")
    return Window(storage, offset, size, stride)


# What a description may ask for. Values of the last types may stand beside the weights; they become None.
KNOWN = {f"torch.{name}": dtype for name, dtype in DTYPES.items()} | {
    "torch._utils._rebuild_tensor_v2": window, "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": lambda: {}}
KNOWN |= dict.fromkeys(["torch.Size", "torch.device", "collections.Counter", "_codecs.encode",
                        "__builtin__.set", *map(str, DTYPES.values())], lambda *_: None)


class Description(pickle._Unpickler):
    """Reads the pickle of a state dict: dictionaries, lists, text, numbers and windows. This is pickle's own
    interpreter in Python, restricted to the opcodes that torch writes. (The one in C allocates an array as
    long as the largest number under which a file stores a value.) Nothing here may copy a value, because a
    small file can name a large value again and again."""

    CODES = [getattr(pickle, name)[0] for name in (
        "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD BINPERSID MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
        "LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
        "APPENDS EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT").split()]
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in CODES}

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return Module
        if module == "torch.jit._pickle":  # lists of one type
            return lambda values, *_: values
        if f"{module}.{name}" not in KNOWN:
            raise Refused(f"asks for {module[:99]}.{name[:99]}, which no checkpoint needs")
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, pid) -> Storage:
        _, dtype, key, _, numel = pid[:5]  # legacy files have a sixth, which is None
        if not (isinstance(dtype, torch.dtype) and type(key) is str and type(numel) is int
                and 0 <= numel < 2**60) or any(pid[5:6]):
            raise Refused("describes a storage by something other than a type, a name and a size")
        self.storages.setdefault(key, Storage(dtype, key, numel))
        return Storage(dtype, key, numel)

    def load_newobj(self):
        self.stack.pop()
        if self.stack.pop() is not Module:
            raise Refused("makes something other than modules and tensors")
        self.append(Module())

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(function(*arguments[:9]))

    def load_build(self):
        """Keeps the attributes of a module. Those of an ordered dictionary say nothing about weights."""
        state = self.stack.pop()
        if type(self.stack[-1]) is Module:
            self.stack[-1].attributes = state

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        # With keys of other types, a file could be built for which a dictionary takes hours.
        if type(self.stack[-1]) is not dict or type(key) is not str and not (
                type(key) is int and abs(key) < 2**60):
            raise Refused("has a key that is neither a name nor a number")
        self.stack[-1][key] = value

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2]):
            self.stack += key, value
            self.load_setitem()

    dispatch |= {pickle.NEWOBJ[0]: load_newobj, pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build,
                 pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def from_modules(tree: Module) -> dict[str, Window]:
    """A tree of modules -> its state dict."""
    state, waiting, seen = {}, [(tree, "")], set()
    while waiting:
        module, prefix = waiting.pop()
        seen.add(id(module))  # each module is visited once, or a circle of modules would never end
        for name, value in module.attributes.items():
            if len(prefix + name) > 999:
                raise Refused("has modules in modules without end")
            if isinstance(value, Module) and id(value) not in seen:
                waiting.append((value, f"{prefix}{name}."))
            elif isinstance(value, Window):
                state[prefix + name] = value
    return state


# ------------------------------------------------------------------------------------------------------------
# files


class Piecewise(io.FileIO):
    """A file that refuses to be read in large pieces. zipfile would read a directory of any length, and make
    twenty bytes of each byte."""

    def read(self, size: int = -1) -> bytes:
        if size > LONGEST:
            raise Refused(f"describes its tensors in {size:,} bytes, expected at most {LONGEST:,}")
        return super().read(size)


def describe(path: str) -> tuple[object, dict[str, tuple[int, int]], str]:
    """-> (the content of the file, with windows in the place of tensors; the place of each storage by its
    name, as (first byte, number of bytes); what the file is, for people)."""
    with Piecewise(path) as file:
        places = {}
        if file.read(len(LEGACY)) == LEGACY:
            # Three pickles follow: the first describes the machine, the second the tensors, the third lists
            # the storages. These come next, each as a number of elements in eight bytes and the elements.
            pickles = io.BytesIO(file.read(LONGEST))
            Description(pickles).load()
            description = Description(pickles)
            tree, keys = description.load(), Description(pickles).load()
            start = len(LEGACY) + pickles.tell()
            for key in keys:
                if type(key) is not str or key not in description.storages:
                    raise Refused("lists a storage that no tensor has")
                file.seek(start)
                numel = int.from_bytes(file.read(8), "little")
                places[key] = (start + 8, numel * description.storages[key].dtype.itemsize)
                start = sum(places[key])
            return tree, places, "PyTorch file"
        for member in zipfile.ZipFile(file).infolist():
            if member.compress_type == zipfile.ZIP_STORED:  # PyTorch compresses only TorchScript's code
                file.seek(member.header_offset)
                header = file.read(30)  # ends with the lengths of a name and an extra field that follow
                before = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                name = member.filename.partition("/")[2]  # without the folder, which has any name
                places[name.removeprefix("data/")] = (member.header_offset + 30 + before, member.file_size)
        if "data.pkl" not in places:
            raise Refused("is a zip file that PyTorch did not write, or was compressed; if so, unpack it")
        start, length = places["data.pkl"]
        file.seek(start)
        tree = Description(io.BytesIO(file.read(length))).load()
    if "constants.pkl" in places:
        return from_modules(tree), places, "TorchScript archive"
    return tree, places, "PyTorch file"


def read(path: str, state: dict[str, Window], places: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The tensors behind the windows. They are mapped from the file, or copied if they stand at odd
    addresses, as in legacy files. A storage is read once, for all its windows. Refused if it is missing."""
    size = os.path.getsize(path)
    mapped = torch.UntypedStorage.from_file(path, False, size)
    used = {window.storage.key: places.get(window.storage.key, (0, 0)) for window in state.values()}
    if any(start + length > size for start, length in used.values()) or (
            sum(length for _, length in used.values()) > size):
        raise Refused("is cut off, or its tensors overlap")
    pieces = {}
    for key, (start, length) in used.items():
        piece = mapped[start: start + length]
        pieces[key] = piece if start % 8 == 0 else piece.clone()
    tensors = {}
    for name, (storage, offset, sizes, strides) in state.items():
        piece = pieces[storage.key]
        if storage.numel * storage.dtype.itemsize > piece.nbytes():
            raise Refused(f"has a tensor that claims {storage.numel:,} numbers; they are not there")
        tensors[name] = torch.empty(0, dtype=storage.dtype).set_(piece, offset, sizes, strides)
    return tensors
