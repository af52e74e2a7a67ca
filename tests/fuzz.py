"""
Thousands of damaged data sets: reading one may raise DataError, and nothing else may happen. It may not
crash, hang (each case has ten seconds of a processor, however busy it is) or take more memory than 4 GB.

    python tests/fuzz.py --count 20000        # minutes; tests/test_fuzz.py runs a few hundred

A case is a small good set, TSV + JSONL, pictures with a list, or tar shards, of which one file was damaged:
bytes flipped, cut out, doubled, swapped for numbers that readers believe in. It is opened, read and checked.
A set in which the check finds no error must be read without one.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import pathlib
import random
import signal
import sys
import tarfile
import tempfile
import time

from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from sources import pairs as pairs_module  # noqa: E402
from sources.layouts import open_pairs  # noqa: E402
from sources.pairs import DataError  # noqa: E402
from tools.curate import check  # noqa: E402

SECONDS, BYTES = 10, 4 * 2**30
# what a reader may take for a length, an end or a structure
WORDS = (b"\0", b"\n", b"\t", b"\xff", b"\x80\0\0\0\0\0\0\0", b"-1", b"99999999999", b"{", b"[" * 50, b'"',
         b"\\u", b"\xed\xa0\x80", b"ustar", b"\xff\xd8\xff", b"IHDR\x7f\xff\xff\xff", b"../..", b",", b"NaN",
         b"1e999")


def picture(rng: random.Random) -> bytes:
    file, kind = io.BytesIO(), rng.choice(("JPEG", "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"))
    image = Image.frombytes("RGB", (12, 10), rng.randbytes(360))
    image.save(file, kind, **({"progressive": rng.random() < 0.5} if kind == "JPEG" else {}))
    return file.getvalue()


def damage(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 30, 600))
        how = rng.randrange(5)
        if how == 0:
            content[at: at + 1] = rng.randbytes(1)
        elif how == 1:
            del content[at: at + length]
        elif how == 2:
            content[at:at] = content[at: at + length]
        elif how == 3:
            word = rng.choice(WORDS)
            content[at: at + len(word)] = word
        else:
            content[at:at] = rng.choice(WORDS)
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def good_set(kind: str, rng: random.Random) -> dict[str, bytes]:
    """-> {name of a file: its bytes}."""
    pictures = [picture(rng) for _ in range(3)]
    texts = ["一张照片", "两只\"猫\"", "三, 四"]
    if kind == "official":
        lines = [json.dumps({"text_id": n, "text": t, "image_ids": [n]}) for n, t in enumerate(texts)]
        encoded = [b"%d\t%s\n" % (n, base64.b64encode(content)) for n, content in enumerate(pictures)]
        return {"train_imgs.tsv": b"".join(encoded), "train_texts.jsonl": "\n".join(lines).encode()}
    if kind in ("jsonl", "csv"):
        files = {f"{n}.jpg": content for n, content in enumerate(pictures)}
        lines = [json.dumps({"image": f"{n}.jpg", "text": t}) for n, t in enumerate(texts)]
        if kind == "csv":
            lines = ["image,text", *(f'{n}.jpg,"{t}"' for n, t in enumerate(["甲", "乙\n乙", '丙""'])) ]
        return files | {f"train.{kind}": "\n".join(lines).encode()}
    file = io.BytesIO()
    kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=kind) as shard:
        for n, (content, text) in enumerate(zip(pictures, texts)):
            name = f"{n:09}" + ("很" * 60 if rng.random() < 0.2 else "")  # a name too long for its field
            for ending, part in (("jpg", content), ("txt", text.encode()),
                                 ("json", json.dumps({"caption": text}).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(part)
                shard.addfile(member, io.BytesIO(part))
    return {"train-000000.tar": file.getvalue()}


def read(folder: str) -> list[DataError]:
    """Reads all that training, evaluation and python -m tools.curate read of a set -> what went wrong."""
    try:
        pairs = open_pairs(folder, "train")
        pairs.texts, pairs.positives, pairs.fingerprint()
    except DataError as error:
        return [error]
    errors = []
    for i in range(len(pairs)):
        for action in (lambda: pairs.pair(i, 8), lambda: pairs.image(pairs.image_number(i)).convert("RGB")):
            try:
                action()
            except DataError as error:
                errors.append(error)
    return errors


def case(number: int, folder: str):
    rng = random.Random(number)
    files = good_set(rng.choice(("official", "jsonl", "csv", "shards")), rng)
    victim = rng.choice(list(files))
    files[victim] = damage(files[victim], rng)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    errors = read(folder)
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    with contextlib.suppress(DataError):
        code = check.run(parser.parse_args([folder, "--workers", "0", "--show", "0"]))
        assert code or not errors, errors[0]


def out_of_time(*_):
    raise TimeoutError(f"not done after {SECONDS} s of a processor")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--start", type=int, default=0, help="the first case, to repeat one")
    args = parser.parse_args(argv)
    slowest, clock = 0.0, time.perf_counter()
    for number in range(args.start, args.start + args.count):
        with tempfile.TemporaryDirectory() as folder:
            pairs_module.CACHE = os.path.join(folder, "cache")
            start = time.perf_counter()
            signal.signal(signal.SIGPROF, out_of_time)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    case(number, folder)
            except BaseException:
                print(f"case {number}: python tests/fuzz.py --start {number} --count 1", file=sys.stderr)
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.perf_counter() - start)
    print(f"{args.count:,} cases in {time.perf_counter() - clock:.0f} s, the slowest {slowest:.2f} s")


if __name__ == "__main__":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    main()
