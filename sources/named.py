"""
Published data sets by name. They are downloaded once, into the cache folder, and opened where they lie.

    muge, flickr30k-cn, coco-cn   pairs: zips of the official layout, released with the official code
    cifar-10, dtd, ...            classes: the 20 data sets of ELEVATER (paper, Table 11), an archive of 37 GB
                                  with a zip for each, of which only what is asked for is fetched

ImageNet-1K's pictures cannot be fetched by name; labels/imagenet-1k.txt has names for its classes.
"""

import contextlib
import io
import os
import re
import sys
import zipfile

import filelock

from sources.archives import inside, open_zip, unpack
from sources.pairs import DataError
from weights import download
from weights.transfer import HostError, RemoteFile

RELEASE = "datasets/OFA-Sys/chinese-clip-eval"
PAIRS = {"muge": "MUGE.zip", "flickr30k-cn": "Flickr30k-CN.zip", "coco-cn": "COCO-CN.zip"}
ELEVATER = "ELEVATER_all.zip"
OTHERWISE = {  # ELEVATER's names, where they differ in more than case and marks
    "eurosat": "eurosat_clip", "fgvc-aircraft": "fgvc-aircraft-2013b-variants102",
    "oxford-flowers-102": "oxford-flower-102", "resisc-45": "resisc45_clip",
    "voc-2007": "voc-2007-classification"}
CLASSES = (
    "caltech-101", "cifar-10", "cifar-100", "country-211", "dtd", "eurosat", "fer-2013", "fgvc-aircraft",
    "food-101", "gtsrb", "hateful-memes", "kitti-distance", "mnist", "oxford-flowers-102", "oxford-iiit-pets",
    "patch-camelyon", "rendered-sst2", "resisc-45", "stanford-cars", "voc-2007")


def bare_name(name: str) -> str:
    """Apple_pie, apple-pie -> applepie, since folders spell names freely."""
    return "".join(c for c in name.lower() if c.isalnum()) or name


def is_published(name: str) -> bool:
    """Whether this is the name of a data set below, and no path here."""
    return name.lower() in (*PAIRS, *CLASSES) and not os.path.exists(name)


def at_hand(name_or_path: str, root: str = "") -> str:
    """The folder of a published data set, which is downloaded if it is not in `root`, by default the cache
    folder. Anything else, and what is a path here, stays as it is. DataError or WeightsError if it cannot be
    had."""
    if not is_published(name_or_path) and not root:
        return name_or_path
    name = name_or_path.lower()
    folder = os.path.join(root or download.CACHE, name)
    if not os.path.isdir(folder):
        try:
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            with filelock.FileLock(folder + ".lock"):  # the system releases it if its holder is killed
                if not os.path.isdir(folder):  # another process may have unpacked it while this one waited
                    unpack_pairs(name, folder) if name in PAIRS else unpack_classes(name, folder)
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror or error}; make room (what came is kept), or use "
                            "another folder, by XDG_CACHE_HOME") from None
    return folder


def unpack_pairs(name: str, folder: str):
    """Download an archive whole, which its checksum needs, unpack it, and remove it."""
    path = os.path.join(os.path.dirname(folder), PAIRS[name])
    download.fetch_file(f"{RELEASE}/{PAIRS[name]}", path)
    with open_zip(path, path) as archive:
        unpack(archive, path, folder)
    os.remove(path)


def unpack_classes(name: str, folder: str):
    """One data set of ELEVATER, from ELEVATER_all.zip if it lies in the cache folder, else read where it is
    published: a list of members, then only the pictures to test on, each straight into its file. The list has
    a CRC-32 of each. What is there to train on stays behind."""
    with elevater(os.path.dirname(folder)) as (outer, where):
        print(f"{name}: {where} -> {folder}", file=sys.stderr)
        member = member_of(outer, where, name)
        with inside(outer, member, where) as archive:
            unpack(archive, f"{where}, {member.filename}", folder, lambda path: path.split("/")[0] != "train")


@contextlib.contextmanager
def elevater(root: str):
    """The archive of ELEVATER's archives, and where it is."""
    path = os.path.join(root, ELEVATER)
    where = path if os.path.isfile(path) else download.addresses(f"{RELEASE}/{ELEVATER}")[0]
    try:
        file = open(path, "rb") if where == path else io.BufferedReader(RemoteFile(where), 1 << 16)
        with file, open_zip(file, where) as outer:
            yield outer, where
    except HostError as error:
        raise DataError(f"{error}; what came is kept, and the same command continues; or put {ELEVATER} "
                        f"yourself at {path}") from None


def member_of(outer: zipfile.ZipFile, where: str, name: str) -> zipfile.ZipInfo:
    """The archive of the data set of this name. DataError if it is not there."""
    members = {bare_name(re.sub(r".*/|\.zip$", "", member.filename)): member
               for member in outer.infolist() if member.filename.endswith(".zip")}
    found = {bare_name(name), bare_name(OTHERWISE.get(name, name))} & members.keys()
    if not found:
        raise DataError(f"{where}: no archive for {name}; there are {', '.join(sorted(members))}")
    return members[found.pop()]


def to_fetch(names: list[str]) -> dict[str, int | None]:
    """By name, the bytes that `at_hand` would download, at most: 0 if it is there, None if no host says."""
    sizes = {name: 0 if os.path.isdir(os.path.join(download.CACHE, name)) else None for name in names}
    absent = [name for name in names if sizes[name] is None]
    sizes |= {name: download.size_at_host(f"{RELEASE}/{PAIRS[name]}") for name in absent if name in PAIRS}
    if classes := [name for name in absent if name in CLASSES]:
        with contextlib.suppress(DataError), elevater(download.CACHE) as found:
            sizes |= {name: member_of(*found, name).compress_size for name in classes}
    return sizes
