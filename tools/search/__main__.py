"""
Search your own photos in Chinese. A picture is encoded once, and nothing leaves this machine.

    python -m tools.search ~/Pictures "雪山下的湖"               # the ten nearest, with their cosines
    python -m tools.search ~/Pictures "./cat.jpg + 雪地 - 2*人"   # pictures, sums, differences, weights
    python -m tools.search ~/Pictures --serve                    # a page to search with
"""

import argparse
import contextlib
import datetime
import json
import os
import sys
import warnings

import torch
from PIL import Image
from tqdm import tqdm

import model
from common import Flags, UserError, one_line_errors
from sources.layouts import open_pairs
from sources.pairs import open_image
from tools.measure.kept import kept_features
from tools.measure.metrics import calibrate
from tools.search.index import Index, shown
from tools.search.query import Search, picture_feature
from tools.search.server import serve
from training.report import contact_sheet
from weights.download import CACHE


def folders_and_query(words: list[str], wants_query: bool) -> tuple[list[bytes], str]:
    """-> (paths of folders, query). The query comes last; without one, the folders are only indexed."""
    paths = [os.path.realpath(os.path.expanduser(os.fsencode(word))) for word in words]
    query = words[-1] if wants_query and not os.path.isdir(paths[-1]) else ""
    folders = paths[:-1] if query else paths
    for word, folder in zip(words, folders or paths):
        if not os.path.isdir(folder):
            raise UserError(f"{word}: no such folder; expected folders, and last what to look for, in quotes")
    return folders, query


def least_cosine(args, clip) -> float:
    """The cosine from which --precision of the texts and pictures of --calibrate-on belong together."""
    images, texts = kept_features(clip, pairs := open_pairs(args.calibrate_on, "valid"), 52, "")
    least = calibrate(texts, images, pairs.positives, args.precision)["threshold"]
    if least is None:
        raise UserError(f"--precision {args.precision:g}: no cosine reaches that on {args.calibrate_on}")
    print(f"marked: from {least:.3f} on; of such pairs in {args.calibrate_on} {args.precision:.0%} are right")
    return least


def main(argv: list[str] | None = None):
    parser = Flags("python -m tools.search", description=__doc__,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="+", metavar="FOLDER... QUERY", help="where to look, sub-folders too, and what for")
    add("--like", default="", metavar="FILE", help="search by this picture, instead of a query")
    add("--model", default="ViT-B-16", help="name or file (default: ViT-B-16)")
    add("--index", default=os.path.join(CACHE, "search"), metavar="DIR", help="where features are kept")
    add("--top", type=int, default=10, help="pictures to find (default: 10)")
    add("--folder", default="", help="only pictures below this one")
    add("--since", default="", metavar="DATE", help="2024, 2024-05 or 2024-05-01; by the camera or the file")
    add("--until", default="", metavar="DATE", help="the last year, month or day")
    add("--alike", type=float, default=0.99, help="such a cosine makes pictures one (default: 0.99; 2: none)")
    add("--precision", type=float, default=0.0, help="mark what is right so often, 0 to 1")
    add("--calibrate-on", default="", metavar="DATA", help="pairs whose split `valid` tells --precision")
    add("--json", action="store_true", help="print JSON")
    add("--paths", action="store_true", help="print paths alone")
    add("--sheet", default="", metavar="FILE.png", help="write the pictures side by side")
    add("--serve", action="store_true", help="serve a page instead")
    add("--port", type=int, default=8000, help="of the page (default: 8000)")
    add("--host", default="127.0.0.1", help="0.0.0.0: other machines too, which need the printed token")
    args = parser.parse_args(argv)
    if args.top < 1 or not 0 <= args.precision < 1 or bool(args.precision) != bool(args.calibrate_on):
        parser.error("expected --top from 1 on, and --precision, from 0 to 1, with --calibrate-on")
    roots, query = folders_and_query(args.words, not (args.serve or args.like))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice that size Pillow refuses
    device = "cuda" if torch.cuda.is_available() else "cpu"
    units = torch.cpu.get_capabilities() if device == "cpu" else {}
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for what is found
        clip = model.load(args.model, device)[0]
        index = Index(args.index, clip)  # one for these weights, in whichever precision they compute
        if any(units.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")):
            clip = model.load(args.model, device, dtype="bfloat16")[0]
        least = least_cosine(args, clip) if args.precision else 2.0
        search = Search(clip, index, roots, args.alike, paths=not args.serve)
    if args.serve:
        return serve(search, args.host, args.port, least)
    with tqdm(desc="indexing", unit=" pictures", leave=False, delay=1) as bar:
        def progress(done: int, total: int):
            bar.total = total
            bar.update(done - bar.n)
        line = index.update(clip, roots, progress)
    print(line, file=sys.stderr)
    search.refresh()
    if args.like:
        query, search.dropped["#like"] = "#like", picture_feature(clip, args.like)
    hits = search.ranking(query, args.folder, args.since, args.until).first(args.top) if query else []
    found = [{
        "path": shown(hit.path), "cosine": round(hit.score, 4), "match": hit.score >= least,
        "date": datetime.datetime.fromtimestamp(hit.date).isoformat(" ", "seconds"),
        "alike": [shown(index.path(number)[0] or b"") for number in hit.alike]} for hit in hits]
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    for one in [] if args.json else found:
        line = f"{one['cosine']:.3f}{'*' if one['match'] else ' '} {one['path']}"
        more = f"  and {len(one['alike'])} alike" * bool(one["alike"])
        print(one["path"] if args.paths else line + more)
    if args.sheet and hits:
        pictures = [(open_image(os.fsdecode(hit.path)), hit.score >= least) for hit in hits]
        contact_sheet(args.sheet, [(query if at == 0 else "", [pictures[at : at + 5]])
                                   for at in range(0, len(hits), 5)])


if __name__ == "__main__":
    with one_line_errors():
        main()
