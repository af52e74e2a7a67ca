"""
From an address to a file: resumed where the last try ended, in several ranges at once, and checked.

What came is in NAME.part, in order and without holes, so that its length says where to go on. A host that
knows ranges is asked for several blocks at once; one that does not sends everything, of which only what is
missing is kept. A file gets its name when its length and the SHA-256 that the host publishes are right.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import requests
from tqdm import tqdm

from common import UserError

USER_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
TIMEOUT = (10, 30)  # seconds: to connect, and between two bytes
TRIES = 5  # in a row that bring no byte
CHUNK = 1 << 14  # bytes, after which a request sees that it is no longer wanted
BLOCK = 1 << 20  # bytes of one request; a kill loses up to this much of each
TOGETHER = 6  # requests
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class HostError(UserError):
    """The host does not have the file, or does not answer. The message is one line with the address."""


class Remote(NamedTuple):
    """What a host says about a file."""

    url: str  # of the bytes, after redirects
    headers: dict  # for the next requests
    size: int | None  # bytes
    sha256: str  # in lower case, or ""
    ranges: bool  # can one ask for a part of it?


def ask(url: str) -> Remote:
    """One request for the first byte. ConnectionError of requests if another may succeed, else HostError."""
    # identity: no compression on the way, so that lengths and ranges are those of the file
    headers = {"Accept-Encoding": "identity"} | token_for(url)
    first = headers | {"Range": "bytes=0-0"}
    with requests.get(url, headers=first, stream=True, timeout=TIMEOUT) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"the server says {status}")
        if status in (401, 403):
            raise HostError(f"{url}: the server says {status}; if a token opens it, set HF_TOKEN")
        if status not in (200, 206) or response.headers.get("Content-Type", "").startswith("text/html"):
            raise HostError(f"{url}: the server says {status} {response.reason}, or sends a web page; is "
                            "HF_ENDPOINT a mirror of Hugging Face, and does this network ask for a login?")
        ranges = status == 206 and bool(re.fullmatch(r"bytes 0-0/\d+", content_range))
        length = response.headers.get("Content-Length") if status == 200 else ""
        size = content_range.rpartition("/")[2] if ranges else length
        if "Authorization" not in response.request.headers:
            headers.pop("Authorization", None)  # a redirect led to a host that the token is not for
        etags = [answer.headers.get("X-Linked-ETag", "") for answer in (*response.history, response)]
        size = int(size) if size else None
        return Remote(response.url, headers, size, published_sha256(url, etags), ranges)


def token_for(url: str) -> dict[str, str]:
    """The header for a user's token of Hugging Face, from its usual variable or file; {} for other hosts."""
    home = os.environ.get("HF_HOME") or os.path.join(USER_CACHE, "huggingface")
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    token = os.environ.get("HF_TOKEN", "")
    if not token and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            token = file.read()
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    theirs = token.strip() and url.startswith(endpoint + "/")
    return {"Authorization": f"Bearer {token.strip()}"} if theirs else {}


def published_sha256(url: str, etags: list[str]) -> str:
    """The file's SHA-256 in lower case, or "". It stands in OpenAI's address, in Hugging Face's answer before
    it redirects to the server that has the bytes, or in ModelScope's list of files."""
    for candidate in url.split("/") + [etag.removeprefix("W/").strip('"') for etag in etags]:
        if re.fullmatch("[0-9a-fA-F]{64}", candidate):
            return candidate.lower()
    address, _, name = url.partition("/repo?Revision=master&FilePath=")
    if not name:
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # a list of another form
        files = requests.get(f"{address}/repo/files?Revision=master", timeout=TIMEOUT).json()["Data"]["Files"]
        return next((file["Sha256"].lower() for file in files if file["Path"] == name), "")
    return ""


def blocks(remote: Remote, start: int):
    """Yield the bytes from `start` to the end, in order. Several requests run at once. What came
    before an error is yielded before it is raised: a ConnectionError of requests, if another try may bring
    more."""
    if not remote.ranges:
        with requests.get(remote.url, headers=remote.headers, stream=True, timeout=TIMEOUT) as response:
            have = 0
            if response.status_code != 200:
                raise requests.ConnectionError(f"the server says {response.status_code}")
            for chunk in response.iter_content(CHUNK):
                yield chunk[max(0, start - have) :]
                have += len(chunk)
        return
    enough, waiting, stop = threading.Event(), collections.deque(), remote.size
    with ThreadPoolExecutor(TOGETHER) as pool:
        try:
            firsts = iter(range(start, stop, BLOCK))
            while True:
                while len(waiting) < TOGETHER and (first := next(firsts, None)) is not None:
                    waiting.append(pool.submit(read_range, remote, first, min(first + BLOCK, stop), enough))
                if not waiting:
                    return
                got, error = waiting.popleft().result()
                yield got
                if error:
                    raise error
        finally:
            enough.set()
            pool.shutdown(cancel_futures=True)


def read_range(remote: Remote, start: int, stop: int, enough: threading.Event):
    """One request -> (the bytes from `start` on, as far as they came, and the error that ended them or
    None)."""
    got, headers = bytearray(), remote.headers | {"Range": f"bytes={start}-{stop - 1}"}
    try:
        with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            expected = f"bytes {start}-{stop - 1}/{remote.size}"
            if response.status_code != 206 or response.headers.get("Content-Range") != expected:
                raise requests.ConnectionError(f"asked for byte {start:,}, but the server says "
                                               f"{response.status_code} and sends another part")
            for chunk in response.iter_content(CHUNK):
                got += chunk
                if enough.is_set():
                    break
        if len(got) < stop - start:
            raise requests.ConnectionError(f"it ended at byte {start + len(got):,}")
    except BROKEN as error:
        return got[: stop - start], error
    return got[: stop - start], None


def persist(url: str, attempt, came=lambda: 0, tries: int = TRIES):
    """The result of attempt(), which is repeated while connections break, with growing pauses. HostError
    after `tries` in a row that did not raise the number of bytes that came."""
    failed, furthest = 0, came()
    while True:
        try:
            return attempt()
        except BROKEN as error:
            failed = 1 if came() > furthest else failed + 1
            furthest = max(furthest, came())
            reason = str(error).rsplit(": ", 1)[-1].strip("')(\" ")[:120]  # the innermost error
            reason += ")" * (reason.count("(") - reason.count(")"))
            if failed >= tries:
                raise HostError(f"{url}: nothing came in {tries} tries ({reason})") from None
            pause = 2 ** (failed - 1)
            print(f"{reason}; next try in {pause} s, from byte {furthest:,}", file=sys.stderr)
            time.sleep(pause)


def download(url: str, path: str, tries: int = TRIES):
    """The file at `url` under the name `path`, once it is complete and right. HostError if it cannot be had;
    what came is kept, unless it is wrong."""
    part = path + ".part"
    before = size_of(part)
    remote = persist(url, lambda: transfer(url, part), lambda: size_of(part), tries)
    if not remote.sha256:
        print(f"{url}: its host publishes no SHA-256, so the file is not checked", file=sys.stderr)
    if message := fault_of(part, remote):
        os.remove(part)
        if not before:
            raise HostError(f"{url}: {message}; what came was removed. Repeat the command; if it happens "
                            "again, the mirror is wrong")
        print(f"{url}: {message}; what was there before does not fit, starting again", file=sys.stderr)
        return download(url, path, tries)  # what was there is of another version, or of another host
    return os.replace(part, path)


def fault_of(part: str, remote: Remote) -> str:
    """What shows that the file `part` is not the remote one, or ""."""
    if remote.size not in (None, size_of(part)):
        return f"{size_of(part):,} bytes, expected {remote.size:,}"
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if remote.sha256 else ""
    return f"SHA-256 is {found}, expected {remote.sha256}" if found != remote.sha256 else ""


def transfer(url: str, part: str) -> Remote:
    """Append to `part` what is missing of the file at `url`."""
    remote, have = ask(url), size_of(part)
    with open(part, "ab") as file, tqdm(total=remote.size, initial=have, unit="B", unit_scale=True,
                                        desc=os.path.basename(part)) as bar:
        for data in blocks(remote, have):
            file.write(data)
            bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
    return remote


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


class Readable(io.RawIOBase):
    """A file of `size` bytes that can be read and sought, for zipfile; a subclass has bytes_at."""

    def __init__(self, size: int):
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self.size - self.position)
        data = self.bytes_at(self.position, count) if count > 0 else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def bytes_at(self, position: int, count: int) -> bytes:
        """At least one and at most `count` bytes from `position` on."""


class RemoteFile(Readable):
    """A file on a host that knows ranges. To read on costs one request a block; to jump begins another row of
    blocks. HostError if the host does not, or the file changes."""

    def __init__(self, url: str):
        self.url, self.row, self.block, self.block_start = url, None, b"", 0
        self.remote = persist(url, lambda: ask(url), tries=2)
        if not self.remote.ranges:
            raise HostError(f"{url}: its host sends no parts of files; download it whole, by hand")
        super().__init__(self.remote.size)

    def bytes_at(self, position: int, count: int) -> bytes:
        while not 0 <= position - self.block_start < len(self.block):
            persist(self.url, lambda: self.read_on(position))
        start = position - self.block_start
        return self.block[start : start + count]

    def read_on(self, position: int):
        """Take the next block of the row, or the first of a new row if the position is not just ahead."""
        end = self.block_start + len(self.block)
        if self.row is None or not end <= position <= end + TOGETHER * BLOCK:
            self.end_row()
            remote, end = ask(self.url), position
            if (remote.size, remote.sha256) != (self.size, self.remote.sha256):
                raise HostError(f"{self.url}: the file changed while it was read; repeat the command")
            self.row = blocks(remote, end)
        self.block, self.block_start = b"", end
        try:
            self.block = next(self.row)
        except BROKEN:
            self.row = None
            raise

    def end_row(self):
        if self.row:
            self.row.close()
        self.row = None

    def close(self):
        self.end_row()
        super().close()
