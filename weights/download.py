"""
Published weights by name: each file is downloaded once, resumed if the connection breaks, and checked.

    python -m tools.weights download ViT-B-16  # into ~/.cache/zhclip/ViT-B-16/

An unfinished file is called NAME.part, and the next download continues it. If two processes want the same
file, one waits for the other. The host publishes the checksum: OpenAI's addresses contain it, and Hugging
Face sends it as X-Linked-ETag. A file gets its name only when the checksum is right.
"""

import hashlib
import os
import re
import sys
import time

import filelock
import requests
from tqdm import tqdm

from weights.names import WeightsError

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "zhclip")

# name -> owner/repository/file on Hugging Face, or a whole address. The first five are the released Chinese
# CLIPs (paper, table 1) in the repositories that cn_clip 1.6.0 names. The others initialise towers (app.
# A.2): OpenAI's addresses are from its clip package, LAION's is from open_clip, and the last three are HFL's.
OPENAI = "https://openaipublic.azureedge.net/clip/models"
SOURCES = {
    "RN50": "OFA-Sys/chinese-clip-rn50/clip_cn_rn50.pt",
    "ViT-B-16": "OFA-Sys/chinese-clip-vit-base-patch16/clip_cn_vit-b-16.pt",
    "ViT-L-14": "OFA-Sys/chinese-clip-vit-large-patch14/clip_cn_vit-l-14.pt",
    "ViT-L-14-336": "OFA-Sys/chinese-clip-vit-large-patch14-336px/clip_cn_vit-l-14-336.pt",
    "ViT-H-14": "OFA-Sys/chinese-clip-vit-huge-patch14/clip_cn_vit-h-14.pt",
    "openai-RN50":
        f"{OPENAI}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "openai-ViT-B-32":
        f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "openai-ViT-B-16":
        f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "openai-ViT-L-14":
        f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "openai-ViT-L-14-336":
        f"{OPENAI}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
    "laion-ViT-H-14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model.bin",
    "chinese-roberta-wwm-ext": "hfl/chinese-roberta-wwm-ext/pytorch_model.bin",
    "chinese-roberta-wwm-ext-large": "hfl/chinese-roberta-wwm-ext-large/pytorch_model.bin",
    "rbt3": "hfl/rbt3/pytorch_model.bin",
}
RELEASED = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")

TIMEOUT = (10, 30)  # seconds: to connect, and between two bytes
TRIES = 5  # in a row that bring no byte
CHUNK = 1 << 20  # bytes


def address(name: str) -> str:
    """A name of SOURCES -> its URL. HF_ENDPOINT takes the place of Hugging Face's host."""
    source = SOURCES[name]
    if "://" in source:
        return source
    owner, repository, file = source.split("/")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{owner}/{repository}/resolve/main/{file}"


def fetch(name: str, root: str = "") -> str:
    """The path of a published file, which is downloaded if it is not there: root/name/file, where `root` is
    CACHE by default. A released model is also found at root/file, where cn_clip puts it. WeightsError if
    there is no such file and none can be downloaded."""
    url = address(name)
    folder, file_name = os.path.join(root or CACHE, name), url.rsplit("/", 1)[-1]
    path, official = os.path.join(folder, file_name), os.path.join(root or CACHE, file_name)
    if os.path.isfile(path):
        return path
    if name in RELEASED and os.path.isfile(official):
        return official
    try:
        os.makedirs(folder, exist_ok=True)
        with filelock.FileLock(path + ".lock"):  # the system releases it if its holder is killed
            if not os.path.isfile(path):  # another process may have downloaded it while this one waited
                print(f"{name}: {url} -> {path}", file=sys.stderr)
                fetch_part(url, path)
    except OSError as error:  # of the disk, or of requests for a wrong address, which no repetition helps
        raise WeightsError(f"{url} -> {path}: {error.strerror or error}; check HF_ENDPOINT and HTTPS_PROXY, "
                           "or make room (what came is kept), or use another folder, by XDG_CACHE_HOME or by "
                           "`python -m tools.weights download NAME --to FOLDER`") from None
    return path


def fetch_part(url: str, path: str):
    """Download `url` to path.part in as many requests as it takes, and rename it once its checksum is
    right."""
    part, tries, furthest, sha256 = path + ".part", 0, size_of(path + ".part"), None
    while sha256 is None:
        try:
            sha256 = transfer(url, part)
        except (requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as error:
            tries = 1 if size_of(part) > furthest else tries + 1
            furthest = max(furthest, size_of(part))
            reason = str(error).rsplit(": ", 1)[-1].strip("')(\" ")[:120]  # the innermost error
            reason += ")" * (reason.count("(") - reason.count(")"))
            if tries >= TRIES:
                raise WeightsError(
                    f"{url}: nothing came in {TRIES} tries ({reason}); {size_of(part):,} bytes are kept, and "
                    "the same command continues. If this machine is offline, put the file yourself at "
                    f"{path}; behind a firewall, set HTTPS_PROXY, or HF_ENDPOINT to a mirror") from None
            pause = 2 ** (tries - 1)
            print(f"{reason}; next try in {pause} s, from byte {size_of(part):,}", file=sys.stderr)
            time.sleep(pause)
    if not sha256:
        print(f"{url}: its host publishes no SHA-256, so the file is not checked", file=sys.stderr)
    else:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            os.remove(part)
            raise WeightsError(f"{url}: SHA-256 is {found}, expected {sha256}; what came was removed. "
                               "Repeat the command; if it happens again, the mirror is wrong")
    os.replace(part, path)


def transfer(url: str, part: str) -> str:
    """Append to `part` by one request -> the SHA-256 that the host publishes, or "". ConnectionError of
    requests if another request may bring more."""
    have = size_of(part)
    # identity: no compression on the way, so that lengths and ranges are those of the file
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if status == 416 and content_range.endswith(f"/{have}"):  # nothing is left to send
            return published_sha256(url, response)
        if have and (status == 416 or status == 206 and not content_range.startswith(f"bytes {have}-")):
            os.remove(part)
            raise requests.ConnectionError(f"asked for byte {have:,}, another one came; starting again")
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"the server says {status}")
        if status not in (200, 206) or response.headers.get("Content-Type", "").startswith("text/html"):
            raise WeightsError(f"{url}: the server says {status} {response.reason}, or sends a web page; is "
                               "HF_ENDPOINT a mirror of Hugging Face, and does this network ask for a login?")
        if status == 200:  # the whole file, also from a server that does not know ranges
            have = 0
        total = have + int(response.headers.get("Content-Length", 0)) or None
        with open(part, "ab" if have else "wb") as file, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(part)) as bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        return published_sha256(url, response)


def published_sha256(url: str, response: requests.Response) -> str:
    """The file's SHA-256 in lower case, or "". It stands in OpenAI's address, or in Hugging Face's answer
    before it redirects to the server that has the bytes."""
    etags = [answer.headers.get("X-Linked-ETag", "") for answer in [*response.history, response]]
    for candidate in url.split("/") + [etag.removeprefix("W/").strip('"') for etag in etags]:
        if re.fullmatch("[0-9a-fA-F]{64}", candidate):
            return candidate.lower()
    return ""


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0
