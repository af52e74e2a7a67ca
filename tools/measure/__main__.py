"""
The rarer measurements, the paper's tables, and files for others to read; docs/measuring.md explains them all.

    python -m tools.measure zeroshot  --model ViT-B-16 --data path/to/voc-2007 --labels voc-2007
    python -m tools.measure zeroshot  --model ViT-B-16 --data goods --shots some-goods --per-class 4
    python -m tools.measure reproduce table2 --models ViT-B-16
"""

import collections
import csv
import io
import json
import os
import shlex
import sys

import torch
from PIL import Image

from common import Flags, one_line_errors, rank, replace_text, sum_over_ranks, write_json
from eval import (
    FAILURES, command_flags, encode_images, ensemble, places, retrieval, run_command, sentence_features)
from sources.classes import NAMES, class_lines, open_classes, read_classes, templates_for
from sources.layouts import open_pairs
from sources.named import at_hand
from sources.pairs import PICTURES, DataError, Pairs, open_image, pictures_below
from tools import onnx
from tools.measure import page, published, zeroshot
from tools.measure.kept import kept_features
from tools.measure.metrics import at_threshold, calibrate, nearest
from tools.measure.reproduce import row_of, run_reproduce
from tools.measure.shots import open_shots
from training.report import recall_table
from weights.download import RELEASED

# ------------------------------------------------------------------------------------------------------------
# retrieval


def run_retrieval(args, load) -> tuple[dict, str]:
    pairs = open_pairs(args.data, args.split, answers=not args.predictions)
    title = f"{args.data} {args.split}"
    print(f"{title}: {pairs.image_count:,} images, {len(pairs.texts):,} texts")
    table, *where = published.figures_for(args.published, args.model, args.data, published.RETRIEVAL)
    ids = ids_to_predict(args, pairs) if args.predictions else {}
    features = kept_features(clip := load(), pairs, args.context_length, args.features)
    if args.predictions and rank() == 0:
        write_predictions(args, pairs, ids, dict(zip(("image", "text"), features)))
    if not len(pairs.positives):
        print(f"{title}: no answers in it, so nothing to measure")
        return {"positives": 0}, ""
    result = retrieval(clip, pairs, features=features)
    lines = recall_table({args.split: result})
    print(lines)
    if args.page:
        sides = (*reversed(features), pairs.positives)  # texts, images, and which belong together
        found = places(*(x.to(clip.logit_scale.device) for x in sides))  # every process has a share
        if rank() == 0:
            page.write_retrieval(args.page, f"{args.model} on {title}", lines, pairs, *sides[:2], found)
    if args.published or (table and args.split == published.read_paper()[table].get("split", "test")):
        measured = published.retrieval_columns(result, table)
        result["published"] = published.compare(measured, table, *where, row_of(clip))
        print(published.comparison_table(result["published"]))
    return result, f"next: open {args.page} in a browser" if args.page else FAILURES.format(args.typed)


def ids_to_predict(args, pairs: Pairs) -> dict[str, list]:
    """The ids of the captions ("text") and of the pictures ("image"): those of the official layout, which the
    official scripts expect as numbers if they are such; file names of a folder or keys of shards, if none
    occurs twice; else rows. DataError, before anything is encoded, if the set is too small for --top-k or an
    id occurs twice."""
    ids = {"text": [pairs.text_id(row) for row in range(len(pairs.texts))],
           "image": [pairs.image_id(row) for row in range(pairs.image_count)]}
    if len(set(map(str, ids["image"]))) < pairs.image_count:  # as in shards that each count from 0
        ids["image"] = list(range(pairs.image_count))
    if (choices := len(ids[args.direction.split("-")[2]])) < args.top_k:
        raise DataError(f"--top-k {args.top_k}: every query of --predictions gets that many answers, but "
                        f"{args.direction} has only {choices} to choose from")
    for what, some in ids.items():
        if twice := [i for i, times in collections.Counter(map(str, some)).items() if times > 1]:
            raise DataError(f"{args.data} {args.split}: the {what} id {twice[0]} occurs twice; --predictions "
                            "needs ids that differ")
    return ids


def write_predictions(args, pairs: Pairs, ids: dict[str, list], features: dict):
    """The --top-k nearest of every query as JSON lines. The official evaluation.py and evaluation_tr.py read
    {"text_id", "image_ids"} and {"image_id", "text_ids"}. MUGE's server reads {"query_id", "query_text",
    "item_ids"}; a query that is a picture has no text."""
    query, _, item = args.direction.split("-")  # "text" and "image", or the other way round
    id_key, items_key = ("query_id", "item_ids") if args.format == "muge" else (f"{query}_id", f"{item}_ids")
    lines = []
    for row, items in enumerate(nearest(features[query], features[item], args.top_k).tolist()):
        text = {"query_text": pairs.text(row)} if args.format == "muge" and query == "text" else {}
        line = {id_key: ids[query][row], **text, items_key: [ids[item][number] for number in items]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    replace_text(args.predictions, "".join(lines))
    print(f"{args.predictions}: the {args.top_k} nearest of {len(lines):,} queries, {args.direction}")


def run_calibrate(args, load) -> tuple[dict, str]:
    pairs = open_pairs(args.data, args.split)
    test = open_pairs(args.data, args.test) if args.test else None  # before anything is encoded
    images, texts = kept_features(clip := load(), pairs, args.context_length, args.features)
    result = calibrate(texts, images, pairs.positives, args.precision, args.prior)
    if result["threshold"] is None:
        print(f"no cosine gives a precision of {100 * args.precision:g} % here; ask for less, or judge pairs "
              "that are more often right (--prior)")
        return result, ""
    print(f"from {result['threshold']:.3f} on {100 * result['precision']:.1f} % of the pairs are right "
          f"({100 * args.precision:g} wanted); it keeps {100 * result['recall']:.1f} % of the right ones")
    if test:
        images, texts = kept_features(clip, test, args.context_length, "")
        result["test"] = at_threshold(texts, images, test.positives, result["threshold"], result["prior"])
        print("on {}: {precision:.1%} right, {recall:.1%} of the right ones kept".format(
            args.test, **result["test"]))
    if args.data.startswith("scenes-"):  # drawn scenes are not filtered
        return result, ""
    keep = shlex.join(["python", "-m", "tools.curate", "filter", args.data, "NEW", "--model", args.model])
    return result, f"next, a set without what is below: {keep} --min-score {result['threshold']:.3f}"


# ------------------------------------------------------------------------------------------------------------
# classification, and the paper's tables


def run_zeroshot(args, load) -> tuple[dict, str]:
    classes, paths, labels = open_classes(args.data, args.labels, args.names)
    get_image, templates = lambda row: open_image(paths[row]), templates_for(classes, args.templates)
    shots = args.shots and open_shots(args.shots, args.labels, classes, paths, args.per_class, args.seed)
    data = args.labels or os.path.abspath(args.data)
    table, *where = published.figures_for(args.published, args.model, data, ("table12",))
    if args.submission and not classes.numbered:
        raise DataError(f"--submission: ELEVATER numbers the classes of {data} differently; expected "
                        f"label.txt in {args.data}, with ELEVATER's English class name on each line")
    rows = zeroshot.elevaters_pictures(at_hand(args.data), len(labels)) if args.submission else []
    result, scores = zeroshot.own_zero_shot(clip := load(), classes, get_image, labels, templates, shots)
    value = result[classes.metric]
    line = "{0:.1f} % {metric} of {images:,} images in {classes} classes with {templates} templates".format(
        value, **result)
    if few := result.get("few_shots"):
        count = " to ".join(map(str, sorted(set(few["shots"]))))  # "4", or "3 to 4"
        line += (f"\nzero-shot {value:.1f} %, with {count} shots of each class {few[classes.metric]:.1f} % "
                 f"(weight {few['weight']:g})")
    print(line, *class_lines((few or result)["by_class"]), sep="\n")
    if args.page and rank() == 0:
        page.write_zeroshot(
            args.page, f"{args.model} on {args.data}", line, classes.chinese, get_image, scores, labels)
    if args.submission and rank() == 0:
        write_json(args.submission, zeroshot.submission(clip, os.path.basename(data), scores[rows]))
        print(f"{args.submission}: the predictions as ELEVATER takes them")
    if table:
        result["published"] = published.compare({where[0]: value}, table, *where, row_of(clip))
        print(published.comparison_table(result["published"]))
    return result, f"next: open {args.page} in a browser" if args.page else FAILURES.format(args.typed)


def run_classify(args, load) -> tuple[dict, str]:
    """Writes a CSV: each picture below --data, its most likely class, and the probability of that class among
    all. Pictures that cannot be decoded have an empty class, and stderr names them."""
    args.data = at_hand(args.data)
    own = os.path.join(args.data, "label_cn.txt")
    if not args.labels and not os.path.isfile(own):
        raise DataError(f"{own}: not there; expected --labels, a file of class names or one of labels/")
    classes = read_classes(args.labels or own).usually_named(args.names == "usual")
    templates = templates_for(classes, args.templates)
    folder = os.fsencode(args.data)
    files = sorted(os.fsdecode(os.path.relpath(path, folder)) for path in pictures_below([folder])[0])
    if not files:
        raise DataError(f"{args.data}: no pictures in it; expected files that end in {', '.join(PICTURES)}")
    broken = torch.zeros(len(files), dtype=torch.long)  # 1 for each picture that cannot be decoded

    def image_or_dot(row: int) -> Image.Image:
        try:
            return open_image(os.path.join(args.data, files[row]))
        except DataError as error:
            print(error, file=sys.stderr)
            broken[row] = 1
            return Image.new("RGB", (1, 1))

    images = encode_images(clip := load(), image_or_dot, len(files))  # [N, E]
    cosines = images @ ensemble(sentence_features(clip, classes.chinese, templates)).T  # [N, C]
    scores, best = zeroshot.probabilities(cosines, clip.logit_scale.exp().item()).max(dim=1)  # [N], [N]
    rows = [("file", "class", "score")]
    for name, bad, c, score in zip(files, sum_over_ranks(broken).tolist(), best.tolist(), scores.tolist()):
        name = os.fsencode(name).decode(errors="replace")  # which may be in GBK
        rows.append((name, "", "") if bad else (name, classes.chinese[c], f"{score:.4f}"))
    csv.writer(table := io.StringIO(), lineterminator="\n").writerows(rows)
    if rank() == 0:
        replace_text(args.out, "\ufeff" + table.getvalue())  # by this mark Excel knows UTF-8
    print(f"{args.out}: {len(files):,} pictures, {int(broken.sum())} of which cannot be decoded")
    return {}, f"next: open {args.out} in a spreadsheet and sort it by score, the doubtful ones first"


def run_prompts(args, load) -> tuple[dict, str]:
    if args.negation:
        found = zeroshot.negation(load())
        print("is it there? percent right, of drawn scenes; 50 is guessing     there  absent    mean roc-auc")
        for wording, right in found.items():
            print(f"{wording:16} {zeroshot.ABSENT[wording]:40}"
                  + "".join(f"{value:8.1f}" for value in right.values()))
        return {"negation": found}, ""
    if not args.data:
        raise DataError("--data: not given; expected a folder of classes, or --negation, which needs none")
    classes, paths, labels = open_classes(args.data, args.labels, args.names)
    templates = templates_for(classes, args.templates)
    found = zeroshot.prompts(load(), classes, lambda row: open_image(paths[row]), labels, templates)
    print(f"{classes.metric} in percent, {len(templates)} templates alone and all together, best first")
    for template, value in found.items():
        print(f"{value:6.1f}  {template}")
    then = "next: write the best into a file, one on each line, and measure zeroshot with --templates FILE"
    return {"metric": classes.metric, "prompts": found}, then


RUN = {"retrieval": run_retrieval, "zeroshot": run_zeroshot, "classify": run_classify, "prompts": run_prompts,
       "calibrate": run_calibrate, "reproduce": run_reproduce}


def main(argv: list[str] | None = None):
    """eval.py's two commands with more flags, and four more."""
    parser = Flags("python -m tools.measure", description=__doc__.strip().split("\n\n")[0])
    commands = parser.add_subparsers(dest="task", required=True, metavar="COMMAND")
    file = dict(default="", metavar="FILE")

    def command(name: str, data: str, text: str) -> Flags:
        return commands.add_parser(name, parents=[command_flags(data)], conflict_handler="resolve", help=text)

    add = command("retrieval", "pairs", "Recall@K, and files of predictions").add_argument
    add("--predictions", **file, help="write each query's nearest; the split needs no answers")
    add("--direction", default="text-to-image", choices=("text-to-image", "image-to-text"),
        help="of --predictions (default: text-to-image)")
    add("--format", default="official", choices=("official", "muge"), help="of them (default: official)")
    add("--top-k", type=int, default=10, help="answers to each query (default: 10, as the scripts want it)")
    add = command("zeroshot", "classes", "classification by the data set's own measure").add_argument
    add("--submission", **file, help="write the predictions as ELEVATER's server takes them")
    add("--shots", default="", metavar="FOLDER", help="also use these other pictures, sorted like --data")
    add("--per-class", type=int, default=0, metavar="K", help="of --shots, only K of each class (0: all)")
    add("--seed", type=int, default=0, help="which K (default: 0)")
    for p in (commands.choices["retrieval"], commands.choices["zeroshot"]):
        p.add_argument("--page", **file, help="write a page to look at: curve or confusion matrix, failures")
        p.add_argument("--published", default="", metavar="'DATA SETUP'", help="compare with the paper's "
                       "figures, such as 'MUGE finetune'; a released model on such data is compared anyway")
    add = command("classify", "classes", "the class of each picture below a folder, as a table").add_argument
    add("--data", required=True, help="a folder of pictures, in sub-folders too")
    add("--out", required=True, metavar="FILE.csv", help="the table: file, class, score (0 to 1)")
    add = command("prompts", "classes", "every template alone and all together").add_argument
    add("--data", default="", help="a folder as for zeroshot; --negation needs none")
    add("--negation", action="store_true", help="instead, on drawn scenes: is 'no X' understood?")
    add = command("calibrate", "pairs", "the cosine that gives a wanted precision").add_argument
    add("--precision", type=float, default=0.9, help="the wanted share of right pairs, 0 to 1 (default: 0.9)")
    add("--prior", type=float, default=0.5, help="the share of right pairs among those you will judge "
        "(default: 0.5); 0: that of this split, where every text meets every picture")
    add("--test", default="", metavar="SPLIT", help="also try the threshold on this split")
    for p in (commands.choices["retrieval"], commands.choices["calibrate"]):
        p.add_argument("--features", default="", metavar="DIR", help="keep the features there as .npy, or "
                       "use those that are there; all processes must see the folder")
    add = command("reproduce", "", "a table of the paper, beside the paper's figures").add_argument
    add("table", choices=(*published.RETRIEVAL, *published.CLASSIFICATION))
    add("--models", "--model", nargs="+", default=list(RELEASED), help="files, or published names such as "
        "qa-ViT-B-16 (default: the paper's five)")
    add("--data", nargs="*", default=[], metavar="NAME[=PATH]", help="some of its data sets, and where they "
        "are: muge=path/to/MUGE (default: all, fetched by name)")
    add("--setup", default="zero-shot", choices=published.SETUPS, help="rows (default: zero-shot)")
    add("--train", action="store_true", help="of --setup finetune: run the paper's recipe first")
    add("--names", default="theirs", choices=NAMES, help="as in zeroshot (default: theirs)")
    add("--templates", **file, help="sentences to use, with {} for the class name (default: ours)")
    add("--into", default="reproduced", metavar="FOLDER", help="of tables and features (default: reproduced)")
    args = parser.parse_args(argv)
    args.typed = shlex.join(sys.argv[1:] if argv is None else argv)
    if getattr(args, "top_k", 1) < 1:
        parser.error(f"--top-k {args.top_k}: expected at least 1")
    if getattr(args, "per_class", 0) < 0:
        parser.error(f"--per-class {args.per_class}: expected at least 1, or 0 for all")
    if getattr(args, "per_class", 0) and not args.shots:
        parser.error(f"--per-class {args.per_class}: of which pictures? name a folder by --shots")
    if getattr(args, "shots", "") and args.submission:
        parser.error("--shots: --submission writes what no shots have helped; leave one of them out")
    if args.task == "calibrate" and not (0 < args.precision <= 1 and 0 <= args.prior < 1):
        parser.error(f"--precision {args.precision:g}, --prior {args.prior:g}: expected shares, from 0 to 1")
    run_command(parser, args, RUN[args.task], onnx.load)


if __name__ == "__main__":
    with one_line_errors():
        main()
