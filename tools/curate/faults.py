"""
What can be wrong with a data set, and how a line of JSON, a caption and a picture are looked at.

What one process finds in a piece of a file is a `Part`. Of captions, ids and pictures only 8-byte digests
leave it, by which tools/curate/check.py finds repeats. The files and their pieces: tools/curate/pieces.py.

ERRORS: training would refuse or skip it, or should not learn from it. NOTES: worth knowing.
"""

import collections
import hashlib
import itertools
import json
import re
import struct
import tarfile
import warnings

from PIL import Image, UnidentifiedImageError

from data import word_ids, words
from sources.pairs import DataError, decode

LIMIT = 2**28  # bytes of a line or a file that are looked at: no picture has 256 MB
CAP = 1000  # places kept of each kind; all are counted
COLUMNS = {"captions": 2, "text_ids": 2, "pictures": 3, "pairs": 3}
ERRORS = {  # kind -> what to do
    "unreadable file": "put it there, or make it readable",
    "line too long": "no picture or caption has 256 MB; write the line again",
    "not UTF-8": "save the file as UTF-8",
    "not JSON": "one JSON object a line; write it again or drop it",
    "not an object": "one JSON object a line, {...}",
    "key missing": "add the key or drop the line",
    "text_id twice": "give each caption its own number",
    "image_ids not a list": "write a list, also of a single id",
    "id not in the TSV": "add the picture or drop the id",
    "one column": "two columns, `id <tab> base64`",
    "id twice": "drop one of them",
    "empty id": "give the picture an id",
    "broken base64": "write the picture again",
    "not a picture": "drop it, or write it as one of the formats named",
    "damaged picture": "fetch the file again or drop it",
    "enormous picture": "write it smaller; Pillow takes it for an attack",
    "not text": "a caption is a string",
    "blank caption": "write one or drop the pair",
    "columns missing": "name the columns image and text in the first line",
    "not CSV": "save the table again",
    "too many cells": 'put a text with a comma in it in "quotes"',
    "path not text": "image is the path of a picture in the folder",
    "picture missing": "put it there or drop the line",
    "not a tar": "pack the shard again, uncompressed",
    "truncated shard": "fetch or pack the shard again",
    "member outside": "pack with paths inside the shard: no .. and no / in front",
    "member not a file": "pack files, not links, devices or sparse files",
    "picture without caption": "add KEY.txt or KEY.json, or drop the picture",
    "caption without picture": "add KEY.jpg, or drop the caption",
    "json without caption": "add the key caption, or KEY.txt",
    "key twice": "one picture and one caption a key",
    "no pairs": "there is nothing to learn or to measure recall on",
}
NOTES = {
    "no image_ids": "this caption is in no pair",
    "no answers": "a test set whose answers are withheld: it cannot be measured on",
    "path outside": "a path with .. or / in front: read here, but the set cannot be moved",
    "picture unused": "no caption names it",
    "large picture": "slow to decode; write it smaller",
    "CMYK": "made for print; colours may look different in RGB",
    "16 bits": "brightness is cut at 255: most of it may become white; write it with 8 bits",
    "animated": "only the first frame is seen",
    "transparent": "what lies under transparent pixels is seen; paste it on a background",
    "sideways": "EXIF asks for a turn that training does not do; pack --resize turns it",
    "tiny picture": "under 32 pixels; it will be blown up",
    "repeated picture": "byte for byte the same under another name",
    "picture in train too": "recall is measured on what was learnt",
    "long caption": "its end is cut; see --context-length",
    "repeated caption": "in one batch they cannot be told apart",
    "caption in train too": "recall is measured on what was learnt",
    "replacement characters": "text was read in a wrong encoding once; fetch it again",
    "control characters": "they vanish in tokenize; clean them",
    "HTML entities": "write the character itself",
}
BROKEN = (  # what Pillow and tarfile raise on garbage, beside what they should
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SyntaxError,
    EOFError, MemoryError, struct.error, tarfile.TarError)

# ------------------------------------------------------------------------------------------------------------
# what is found


class Faults:
    """Counts by kind, and the first CAP places of each: (file, line number or name of a member, what)."""

    def __init__(self):
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)

    def add(self, kind: str, places, count: int):
        self.counts[kind] += count
        for file, at, what in itertools.islice(places, CAP - len(self.places[kind])):
            self.places[kind].append((shown(file), at if isinstance(at, int) else shown(at), shown(what)))


class Part:
    """What was found in a piece (pieces.Task). Rows of digests, their place last: captions (caption, at),
    text_ids (id, at), pictures (id, content or 0, at), pairs (caption or 0 if it is none, id of the picture,
    at)."""

    def __init__(self, task):
        self.split, self.path, self.size, self.args = task.split, task.path, task.size, task.args
        self.lines, self.faults = 0, Faults()
        self.rows = {name: [] for name in COLUMNS}
        self.tokens, self.sides = collections.Counter(), collections.Counter()  # of captions, of pictures

    def fault(self, kind: str, at: int | str, what: str = ""):
        self.faults.add(kind, [(self.path, at, what)], 1)

    def object(self, line: bytes, at: int | str, keys: tuple[str, ...]) -> dict | None:
        """A line of JSON; None with a fault if it is none."""
        try:
            item = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return self.fault("not UTF-8", at, str(error))
        except (ValueError, RecursionError) as error:
            return self.fault("not JSON", at, str(error))
        if not isinstance(item, dict):
            return self.fault("not an object", at, f"a {type(item).__name__}")
        if missing := [key for key in keys if key not in item]:
            self.fault("key missing", at, f"no {', '.join(missing)}; got {', '.join(item) or 'nothing'}")
        return item

    def caption(self, text, at: int, place: int | str) -> int:
        """-> its digest, 0 if it is none. `place`: `at` if that is a line, the name of member number `at`."""
        if not isinstance(text, str):
            return self.fault("not text", place, f"a {type(text).__name__}") or 0
        tokens = sum(len(word_ids(word)) for word in words(text))
        if not tokens:
            return self.fault("blank caption", place, repr(text[:40])) or 0
        tokens += 2  # [CLS] and [SEP]
        self.tokens[tokens] += 1
        if tokens > self.args.context_length:
            self.fault("long caption", place, f"{tokens} tokens")
        if found := re.search("[\ufffd\ud800-\udfff]", text):
            self.fault("replacement characters", place, f"{found[0]!a} in {text}")
        if re.search("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text):
            self.fault("control characters", place, text)
        if found := re.search(r"&(#\d+|#x[0-9a-f]+|[a-z]+\d*);", text, re.IGNORECASE):
            self.fault("HTML entities", place, found[0])
        self.rows["captions"].append((digest(text), at))
        return digest(text)

    def picture(self, name: int, content: bytes | None, at: int, place: int | str, what: str):
        """A row, and what is to be said of the content, if there is any. `name`: digest of its id."""
        if content is None or self.args.no_pictures:
            return self.rows["pictures"].append((name, 0, at))
        self.rows["pictures"].append((name, digest(content), at))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                image = decode(content, what)
            except DataError as error:
                kinds = {UnidentifiedImageError: "not a picture",
                         Image.DecompressionBombError: "enormous picture"}
                return self.fault(kinds.get(type(error.__context__), "damaged picture"), place, str(error))
            except BROKEN as error:
                return self.fault("damaged picture", place, f"{what}: {error!r}")
            self.sides[min(image.size)] += 1
            for kind in peculiarities(image):
                self.fault(kind, place, f"{what}: {image.format} {image.mode} {image.width} x {image.height}")
        if any(w.category is Image.DecompressionBombWarning for w in warned):
            self.fault("large picture", place, f"{what}: {image.width} x {image.height}")


def peculiarities(image: Image.Image):
    """Yields the kinds of note on a picture that can be learnt from but may not look as expected."""
    if min(image.size) < 32:
        yield "tiny picture"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.mode[0] in "IF":
        yield "16 bits"
    try:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            yield "transparent"
        if image.getexif().get(0x0112, 1) in range(2, 9):  # the tag Orientation
            yield "sideways"
        if image.format != "MPO" and getattr(image, "is_animated", False):  # a phone's JPEG with a preview
            yield "animated"
    except BROKEN:  # damage in what training does not look at: EXIF, later frames
        return


def digest(content: bytes | str) -> int:
    """8 bytes, never 0."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def id_text(value) -> str:
    """An id of JSON as sources/layouts.py compares it; of a list or an object, which is none, its type."""
    return type(value).__name__ if isinstance(value, (list, dict)) else str(value)


def shown(text: str) -> str:
    """In one line that any terminal prints, 200 characters of it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
