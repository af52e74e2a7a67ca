"""
What can be wrong with a data set, and how a caption and a picture are looked at.

ERRORS are faults at which training would stop, or from which it should not learn. NOTES are worth knowing. A
`Part` holds what one process finds in a piece of a file (tools/curate/pieces.py). Workers return only 8-byte
digests of captions, ids and pictures, by which tools/curate/check.py finds repeats.
"""

import collections
import contextlib
import hashlib
import itertools
import re
import warnings

from PIL import Image

from data import word_ids, words
from sources.pairs import BROKEN, DataError, decode

CAP = 1000  # places that are kept of each kind; all of them are counted
COLUMNS = {"captions": 2, "text_ids": 2, "pictures": 3, "pairs": 3}  # of the tables of digests, see Part
ERRORS = {  # kind -> what to do
    "unreadable file": "put it there, or make it readable",
    "line too long": "no picture or caption has 256 MB; write the line again",
    "not UTF-8": "save the file as UTF-8",
    "not JSON": "write one JSON object per line, or drop the line",
    "not an object": "write one JSON object per line, {...}",
    "key missing": "add the key or drop the line",
    "text_id twice": "give each caption its own number",
    "image_ids not a list": "write a list, even of a single id",
    "id not in the TSV": "add the picture or drop the id",
    "one column": "write two columns, `id <tab> base64`, with an id of at most 256 bytes",
    "id twice": "drop one of them",
    "empty id": "give the picture an id",
    "broken base64": "write the picture again",
    "not a picture": "drop it, or write it as one of the formats named",
    "damaged picture": "fetch the file again or drop it",
    "enormous picture": "write it smaller; Pillow refuses it as an attack",
    "not text": "write the caption as a string",
    "blank caption": "write one or drop the pair",
    "columns missing": "name the columns image and text in the first line",
    "not CSV": "save the table again",
    "too many cells": 'put a text with a comma in it in "quotes"',
    "path not text": "write the path of a picture in the folder",
    "picture missing": "put it there or drop the line",
    "not a tar": "pack the shard again, uncompressed",
    "truncated shard": "fetch or pack the shard again",
    "member outside": "pack with paths inside the shard, without .. and without / in front",
    "member not a file": "pack files, not links, devices or sparse files",
    "picture without caption": "add KEY.txt or KEY.json, or drop the picture",
    "caption without picture": "add KEY.jpg, or drop the caption",
    "json without caption": "add the key caption, or KEY.txt",
    "key twice": "keep one picture and one caption per key",
    "no pairs": "there is nothing to learn or to measure recall on",
}
NOTES = {
    "no image_ids": "this caption is in no pair",
    "no answers": "the answers of this test set are withheld; recall cannot be measured on it",
    "path outside": "a path with .. or / in front can be read here, but the set cannot be moved",
    "picture unused": "no caption names it",
    "large picture": "it is slow to decode; write it smaller",
    "CMYK": "it is made for print; its colours may look different in RGB",
    "16 bits": "brightness is cut at 255, so most of it may become white; write it with 8 bits",
    "animated": "only the first frame is seen",
    "transparent": "what lies under transparent pixels is seen; paste it on a background",
    "sideways": "EXIF asks for a turn that training does not do; pack --resize turns it",
    "tiny picture": "a side has under 32 pixels and will be enlarged",
    "repeated picture": "another name has the same bytes",
    "picture in train too": "recall would be measured on what was learnt",
    "long caption": "its end is cut; see --context-length",
    "repeated caption": "in one batch, equal captions cannot be told apart",
    "caption in train too": "recall would be measured on what was learnt",
    "replacement characters": "text was read in a wrong encoding once; fetch it again",
    "control characters": "they vanish in tokenize; clean them",
    "HTML entities": "write the character itself",
}
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
    """What was found in a piece of a file (pieces.Task). Rows hold digests, and last their place `at`, a line
    number or the number of a shard's member: captions (caption, at), text_ids (id, at), pictures (id,
    content or 0, at), pairs (caption or 0, id of the picture, at)."""

    def __init__(self, task):
        self.split, self.path, self.size, self.args = task.split, task.path, task.size, task.args
        self.lines, self.faults = 0, Faults()
        self.rows = {name: [] for name in COLUMNS}
        self.tokens, self.sides = collections.Counter(), collections.Counter()  # of captions, of pictures

    def fault(self, kind: str, at: int | str, what: str = ""):
        self.faults.add(kind, [(self.path, at, what)], 1)

    def note(self, error: DataError, at: int | str):
        """Takes down what a function of sources/ found wrong."""
        assert error.kind in ERRORS, error
        self.fault(error.kind, at, str(error).removeprefix(f"{named(self.path, at)}: "))

    @contextlib.contextmanager
    def noting(self, at: int | str):
        """Where a run stops at a DataError, the check takes it down and goes on behind the `with`."""
        try:
            yield
        except DataError as error:
            self.note(error, at)

    def caption(self, text, at: int, place: int | str) -> int:
        """Looks at a caption -> its digest, 0 if it is none. `place` is the line `at`, or the name of member
        number `at`."""
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
        """Looks at a picture, if it has content. `name` is the digest of its id, `what` says which it is."""
        looks = content is not None and not self.args.no_pictures
        self.rows["pictures"].append((name, digest(content) if looks else 0, at))
        if not looks:
            return
        with warnings.catch_warnings(record=True) as warned, self.noting(place):
            warnings.simplefilter("always")
            image = decode(content, what)
            self.sides[min(image.size)] += 1
            kinds = list(peculiarities(image))
            if any(warning.category is Image.DecompressionBombWarning for warning in warned):
                kinds.append("large picture")
            for kind in kinds:
                self.fault(kind, place, f"{what}: {image.format} {image.mode} {image.width} x {image.height}")


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
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a phone's, with a preview
            yield "animated"
    except BROKEN:  # damage in what training does not look at: EXIF, later frames
        return


def digest(content: bytes | str) -> int:
    """A hash of 8 bytes, never 0."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def shown(text: str) -> str:
    """The first 200 characters, in one line that any terminal prints."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])


def named(file: str, at: int | str) -> str:
    """A place: "FILE line 7", "SHARD member", or the file alone if `at` is ""."""
    return f"{file} line {at}" if isinstance(at, int) else f"{file} {at}".rstrip()
