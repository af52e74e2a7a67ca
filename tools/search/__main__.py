"""
Search your own photos in Chinese. A picture is encoded once, and nothing leaves this machine.

    python -m tools.search ~/Pictures "雪山下的湖"               # the ten nearest, with their cosines
    python -m tools.search ~/Pictures "./cat.jpg + 雪地 - 2*人"   # pictures, sums, differences, weights
    python -m tools.search ~/Pictures --serve                    # a page to search with
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import sys
import warnings

import torch
from PIL import Image
from tqdm import tqdm

from common import Flags, UserError, one_line_errors
from sources.layouts import open_pairs
from sources.pairs import open_image
from tools import onnx
from tools.measure.kept import kept_features
from tools.measure.metrics import calibrate
from tools.search.index import Index, shown
from tools.search.query import Search
from tools.search.server import serve
from training.recipes import cpu_has_bfloat16
from training.report import contact_sheet
from weights.download import CACHE


def least_cosine(args, clip) -> float:
    """The lowest cosine at which the wanted share of the caption-picture pairs is right."""
    images, texts = kept_features(clip, pairs := open_pairs(args.calibrate_on, "valid"), 52, "")
    least = calibrate(texts, images, pairs.positives, args.precision)["threshold"]
    if least is None:
        raise UserError(f"--precision {args.precision:g}: no cosine reaches that on {args.calibrate_on}")
    print(f"matches: from {least:.3f} on, {args.precision:.0%} of the pairs in {args.calibrate_on} are right")
    return least


def flags() -> Flags:
    parser = Flags("python -m tools.search", description=__doc__, usage="%(prog)s FOLDER... QUERY [flags]",
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="+", metavar="FOLDER... QUERY", help="where to look, in sub-folders too, and what for")
    add("--like", default="", metavar="FILE", help="search by this picture, instead of a query")
    add("--model", default="ViT-B-16", help="name or file (default: ViT-B-16)")
    add("--index", default=os.path.join(CACHE, "search"), metavar="DIR", help="where features are kept")
    add("--top", type=int, default=10, help="pictures to find (default: 10)")
    add("--folder", default="", help="only pictures below this one")
    add("--since", default="", metavar="DATE", help="2024, 2024-05 or 2024-05-01; by the camera or the file")
    add("--until", default="", metavar="DATE", help="the last year, month or day")
    add("--alike", type=float, default=0.99, help="pictures with this cosine or more count as one (default: "
        "0.99; 2: none)")
    add("--precision", type=float, default=0.0, help="mark matches of this precision, 0 to 1")
    add("--calibrate-on", default="", metavar="DATA", help="pairs whose split `valid` tells --precision")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--json", action="store_true", help="print JSON")
    either("--paths", action="store_true", help="print paths alone")
    add("--sheet", default="", metavar="FILE.png", help="write the pictures side by side")
    add("--serve", action="store_true", help="serve a page instead")
    add("--port", type=int, default=8000, help="port of the page (default: 8000)")
    add("--host", default="127.0.0.1", help="0.0.0.0: other machines too, which need the printed token")
    return parser


def main(argv: list[str] | None = None):
    args = (parser := flags()).parse_intermixed_args(argv)
    words = args.words
    has_query = not (args.serve or args.like or os.path.isdir(os.path.expanduser(words[-1])))
    query = words.pop() if has_query else ""
    roots = [os.path.realpath(os.path.expanduser(os.fsencode(word))) for word in words]
    lost = [word for word, root in zip(words, roots) if not os.path.isdir(root)] or [query] * (not words)
    folder, ending = os.path.split(args.sheet)
    for wrong, text in (
        (lost, f"{', '.join(lost)}: no such folder; folders come first, then what to look for, in quotes"),
        (has_query and not query.strip(), "the query is empty; write what to look for, in quotes"),
        (len(roots) > 500, "more than 500 folders; name one above them"),
        (args.top < 1, f"--top {args.top}: expected at least 1"),
        (not 0 <= args.port < 2**16, f"--port {args.port}: expected 0 to 65535"),
        (not 0 <= args.precision < 1, f"--precision {args.precision:g}: expected a share, such as 0.9"),
        (bool(args.precision) != bool(args.calibrate_on), "--precision and --calibrate-on need each other"),
        (args.sheet and not (ending.endswith((".png", ".jpg")) and os.path.isdir(folder or ".")),
         f"--sheet {args.sheet}: expected a name with .png or .jpg, in a folder that is there"),
    ):
        if wrong:
            parser.error(text)
    warnings.filterwarnings("ignore", module="PIL")  # what it cannot read it refuses, and that is counted
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for what is found
        clip = onnx.load(args.model, device)[0]
        index = Index(args.index, clip, roots)  # one for these weights, in whichever precision they compute
        if device.type == "cpu" and cpu_has_bfloat16():
            clip = onnx.load(args.model, device, dtype="bfloat16")[0]
        least = least_cosine(args, clip) if args.precision else 2.0
        if not args.serve:
            with tqdm(desc="indexing", unit=" pictures", leave=False, delay=1) as bar:
                def progress(done: int, total: int):
                    bar.total = total
                    bar.update(done - bar.n)
                line = index.update(clip, progress)
            print(line)
    search = Search(clip, index, args.alike, paths=not args.serve)
    if args.serve:
        return serve(search, args.host, args.port, least)
    if args.like:
        query = search.drop(open_image(args.like))
    if not query:
        print("to search, write behind the folders what to look for, in quotes, or --serve", file=sys.stderr)
        return
    ranking = search.ranking(query, args.folder, args.since, args.until)
    if not ranking.total:
        print("no picture is there, below --folder and from --since to --until", file=sys.stderr)
    found = [(hit.path, ranking.by_text and hit.score >= least, {
        "path": shown(hit.path), "cosine": round(hit.score, 4),
        "date": datetime.datetime.fromtimestamp(hit.date).isoformat(" ", "seconds"),
        "alike": [shown(index.path(number) or b"") for number in hit.alike]})
        for hit in ranking.first(args.top)]
    if args.json:
        print(json.dumps([one | {"match": match} for _, match, one in found], ensure_ascii=False, indent=1))
    for path, match, one in [] if args.json else found:
        more = f"  and {len(one['alike'])} alike" * bool(one["alike"])
        line = f"{one['cosine']:.3f}{'*' if match else ' '} {one['path']}{more}".encode()
        sys.stdout.buffer.write((path if args.paths else line) + b"\n")
    if args.sheet and found:
        pictures = [(Image.open(io.BytesIO(index.thumb(path))), match) for path, match, _ in found]
        with contextlib.redirect_stdout(sys.stderr):
            contact_sheet(args.sheet, [(args.like or query if at == 0 else "", [pictures[at : at + 5]])
                                       for at in range(0, len(pictures), 5)])


if __name__ == "__main__":
    with one_line_errors(then="; the same command goes on"):
        main()
