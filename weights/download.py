"""
Published weights by name: each file is downloaded once, resumed if the connection breaks, and checked.

    python -m tools.weights download ViT-B-16  # into ~/.cache/zhclip/ViT-B-16/

If two processes want the same file, one waits for the other. ZHCLIP_HUB=modelscope asks ModelScope before
Hugging Face; of two hosts that have a file, the other one is asked if the first does not answer. HF_ENDPOINT
and MODELSCOPE_DOMAIN name mirrors. How the bytes come: weights/transfer.py.
"""

import contextlib
import os
import sys

import filelock

from weights.names import WeightsError
from weights.transfer import TRIES, USER_CACHE, HostError, ask, download

CACHE = os.path.join(USER_CACHE, "zhclip")
HUBS = ("huggingface", "modelscope")

# name -> owner/repository/file on Hugging Face, or a whole address. The first five are the released Chinese
# CLIPs (paper, table 1) in the repositories that cn_clip 1.6.0 names; the next four, of the same sizes, are
# QA-CLIP's (Tencent, Apache-2.0). The others initialise towers (app. A.2): OpenAI's addresses are from its
# clip package, LAION's is from open_clip, and the last three are HFL's.
OPENAI = "https://openaipublic.azureedge.net/clip/models"
SOURCES = {
    "RN50": "OFA-Sys/chinese-clip-rn50/clip_cn_rn50.pt",
    "ViT-B-16": "OFA-Sys/chinese-clip-vit-base-patch16/clip_cn_vit-b-16.pt",
    "ViT-L-14": "OFA-Sys/chinese-clip-vit-large-patch14/clip_cn_vit-l-14.pt",
    "ViT-L-14-336": "OFA-Sys/chinese-clip-vit-large-patch14-336px/clip_cn_vit-l-14-336.pt",
    "ViT-H-14": "OFA-Sys/chinese-clip-vit-huge-patch14/clip_cn_vit-h-14.pt",
    "qa-RN50": "TencentARC/QA-CLIP/QA-CLIP-RN50.pt",
    "qa-ViT-B-16": "TencentARC/QA-CLIP/QA-CLIP-base.pt",
    "qa-ViT-L-14": "TencentARC/QA-CLIP/QA-CLIP-large.pt",
    "qa-ViT-L-14-336": "TencentARC/QA-CLIP/QA-CLIP-large-336.pt",
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
COMPLETE = (*RELEASED, *(name for name in SOURCES if name.startswith("qa-")))  # with both towers


def addresses(source: str) -> list[str]:
    """A value of SOURCES, or the like of a data set -> its URLs, the one to try first in front."""
    if "://" in source:
        return [source]
    first = os.environ.get("ZHCLIP_HUB") or HUBS[0]
    if first not in HUBS:
        raise WeightsError(f"ZHCLIP_HUB is {first!r}; expected one of {', '.join(HUBS)}")
    repository, file = source.rsplit("/", 1)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    urls = {"huggingface": f"{endpoint}/{repository}/resolve/main/{file}"}
    owner, name = repository.rsplit("/", 1)
    if owner == "OFA-Sys":  # the released Chinese CLIPs; of the others and of data sets ModelScope has none
        domain = (os.environ.get("MODELSCOPE_DOMAIN") or "modelscope.cn").rstrip("/")
        domain = domain if "://" in domain else f"https://{domain}"
        where = f"{domain}/api/v1/models/AI-ModelScope/{name}"
        urls["modelscope"] = f"{where}/repo?Revision=master&FilePath={file}"
    return sorted(urls.values(), key=lambda url: url != urls.get(first))


def fetch(name: str, root: str = "") -> str:
    """The path of a published file, which is downloaded if it is not there: root/name/file, where `root` is
    CACHE by default. A whole model is also found at root/file, where cn_clip puts it. WeightsError if there
    is no such file and none can be downloaded."""
    path = place_of(name, root or CACHE)
    fetch_file(SOURCES[name], path)
    return path


def place_of(name: str, root: str) -> str:
    file_name = SOURCES[name].rsplit("/", 1)[-1]
    path, official = (os.path.join(root, *parts) for parts in ((name, file_name), (file_name,)))
    return official if name in COMPLETE and os.path.isfile(official) and not os.path.isfile(path) else path


def to_fetch(name: str) -> int | None:
    """The bytes that `fetch` would download: 0 if the file is there, None if no host says."""
    return 0 if os.path.isfile(place_of(name, CACHE)) else size_at_host(SOURCES[name])


def size_at_host(source: str) -> int | None:
    for url in addresses(source):
        with contextlib.suppress(HostError, OSError):
            return ask(url).size
    return None


def fetch_file(source: str, path: str):
    """Download a value of SOURCES to `path` if it is not there, from the first host that has it."""
    if os.path.isfile(path):
        return None
    *others, last = addresses(source)
    errors = []
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with filelock.FileLock(path + ".lock"):  # the system releases it if its holder is killed
            for url in (*others, last):
                if os.path.isfile(path):  # another process may have downloaded it while this one waited
                    return None
                print(f"{url} -> {path}", file=sys.stderr)
                try:
                    return download(url, path, TRIES if url == last else 2)
                except HostError as error:
                    errors.append(str(error))
                    if url != last:
                        print(f"{error}; trying the next host", file=sys.stderr)
    except OSError as error:  # of the disk, or of requests for a wrong address, which no repetition helps
        raise WeightsError(f"{last} -> {path}: {error.strerror or error}; check HF_ENDPOINT and HTTPS_PROXY, "
                           "or make room (what came is kept), or use another folder, by XDG_CACHE_HOME or by "
                           "`python -m tools.weights download NAME --to FOLDER`") from None
    raise WeightsError(f"{'; '.join(errors)}; what came is kept, and the same command continues. If this "
                       f"machine is offline, put the file yourself at {path}; behind a firewall, set "
                       "HTTPS_PROXY, HF_ENDPOINT to a mirror, or ZHCLIP_HUB=modelscope")
