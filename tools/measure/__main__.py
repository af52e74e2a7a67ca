"""
The rarer measurements, the paper's tables, and files for others to read.

    python -m tools.measure retrieval --model ViT-B-16 --data path/to/MUGE --predictions valid.jsonl
    python -m tools.measure zeroshot  --model ViT-B-16 --data path/to/voc-2007 --labels voc-2007
    python -m tools.measure prompts   --model ViT-B-16 --data path/to/cifar-100 --labels cifar-100
    python -m tools.measure prompts   --model ViT-B-16 --negation
    python -m tools.measure calibrate --model ViT-B-16 --data path/to/MUGE --precision 0.9
    python -m tools.measure reproduce table2 --model ViT-B-16 --data muge=path/to/MUGE

`zeroshot` uses the data set's own measure (Table 11). A released model on a data set of the paper's name is
compared with the paper's figures.
"""

import argparse
import collections
import json
import os

import model
from common import one_line_errors, rank, replace_text, write_json
from eval import build_parser, ranks, retrieval, run_command, zero_shot_cosines
from sources.classes import bare_name, open_classes, templates_for
from sources.layouts import FolderPairs, open_pairs
from sources.pairs import DataError, Pairs, open_image
from tools.measure import page, published, zeroshot
from tools.measure.calibrate import WHY, at_threshold, calibrate, calibration_table
from tools.measure.kept import kept_features
from tools.measure.metrics import nearest
from training.report import recall_table
from weights.download import RELEASED

NAMES = {"accuracy": "", "mean-per-class": " mean per class", "roc-auc": " area under the ROC curve",
         "map-11": " mean average precision (11 points)"}


# ------------------------------------------------------------------------------------------------------------
# retrieval


def run_retrieval(args, clip) -> dict:
    pairs = open_pairs(args.data, args.split, answers=not args.predictions)
    title = f"{args.data} {args.split}"
    print(f"{title}: {pairs.image_count:,} images, {len(pairs.texts):,} texts, "
          f"{len(pairs.positives):,} pairs")
    if args.page and not len(pairs.positives):
        raise DataError(f"--page: {title} has no answers, so there is nothing to show")
    ids = ids_to_predict(args, pairs) if args.predictions else {}
    features = kept_features(clip, pairs, args.context_length, args.features)
    if args.predictions and rank() == 0:
        write_predictions(args, pairs, ids, dict(zip(("image", "text"), features)))
    if not len(pairs.positives):
        print(f"{title}: no answers in it, so nothing to measure")
        return {}
    result = retrieval(clip, pairs, features=features)
    table = recall_table({args.split: result})
    print(table)
    if args.page:
        sides = (*reversed(features), pairs.positives)  # texts, images, and which belong together
        found = ranks(*(x.to(clip.logit_scale.device) for x in sides))  # every process has a share
        if rank() == 0:
            page.write_retrieval(args.page, f"{args.model} on {title}", table, pairs, *sides[:2], *found)
    paper, data = paper_data(args, args.data, published.RETRIEVAL)
    if args.published or (paper and args.split == published.read_paper()[paper].get("split", "test")):
        beside_the_paper(args, clip, result, published.retrieval_columns(result, paper), paper, data)
    return result


def ids_to_predict(args, pairs: Pairs) -> dict[str, list]:
    """The ids of the captions ("text") and of the pictures ("image"): those of the official layout, which the
    official scripts expect as numbers if they are such; file names of a folder; otherwise rows from 0.
    DataError, before anything is encoded, if the set is too small for --top-k or an id occurs twice."""
    images = pairs.names if isinstance(pairs, FolderPairs) else [
        str(pairs.image_id(row)) for row in range(pairs.image_count)]
    ids = {"text": [pairs.text_id(row) for row in range(len(pairs.texts))],
           "image": [int(i) if i.isdecimal() and str(int(i)) == i else i for i in images]}
    choices = len(ids[args.direction.split("-")[2]])
    if choices < args.top_k:
        raise DataError(f"--top-k {args.top_k}: every query of --predictions gets that many answers, but "
                        f"{args.direction} has only {choices} to choose from")
    for what, some in ids.items():
        twice = [i for i, times in collections.Counter(map(str, some)).items() if times > 1]
        if twice:
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


def run_calibrate(args, clip) -> dict:
    pairs = open_pairs(args.data, args.split)
    test = open_pairs(args.data, args.test) if args.test else None  # before anything is encoded
    image_features, text_features = kept_features(clip, pairs, args.context_length, args.features)
    result = calibrate(text_features, image_features, pairs.positives, args.precision, args.prior)
    print(calibration_table(result))
    if test and result["threshold"] is not None:
        image_features, text_features = kept_features(clip, test, args.context_length, "")
        result["test"] = at_threshold(
            text_features, image_features, test.positives, result["threshold"], result["prior"])
        print("on {}: {precision:.1%} right, {recall:.1%} of the right ones kept".format(
            args.test, **result["test"]))
    print("\n" + WHY)
    return result


# ------------------------------------------------------------------------------------------------------------
# classification


def run_zeroshot(args, clip) -> dict:
    classes, get_image, labels, templates = open_classification(args.data, args.labels, args.templates)
    if args.submission and not classes.numbered:
        label_txt = os.path.join(args.data, "label.txt")
        raise DataError(f"--submission: ELEVATER numbers the classes of {args.labels} differently; expected "
                        f"{label_txt}, with ELEVATER's English class name on each line")
    rows = zeroshot.elevaters_pictures(args.data, len(labels)) if args.submission else []
    cosines, single = zero_shot_cosines(clip, classes.chinese, get_image, len(labels), templates)
    result = zeroshot.own_zero_shot(clip, cosines, single, labels, templates, classes.metric)
    line = ("{value:.1f} %{name} of {images:,} images in {classes} classes with {templates} templates, "
            "{single:.1f} % with the first alone, {chance:.1f} % by chance".format(
                value=result[classes.metric], single=result[f"{classes.metric}_single_template"],
                name=NAMES[classes.metric], **result))
    print(line)
    if args.page and rank() == 0:
        page.write_zeroshot(
            args.page, f"{args.model} on {args.data}", line, classes.chinese, get_image, cosines, labels)
    if args.submission and rank() == 0:
        data = args.labels or os.path.basename(os.path.abspath(args.data))
        write_json(args.submission, zeroshot.submission(clip, data, cosines[rows]))
        print(f"{args.submission}: the predictions as ELEVATER takes them")
    table, data = paper_data(args, args.labels or args.data, published.CLASSIFICATION)
    if table:
        beside_the_paper(args, clip, result, {data: result[classes.metric]}, table, data)
    return result


def open_classification(data: str, labels: str, templates: str = ""):
    """A folder of classes -> (classes, get_image, labels, templates)."""
    classes, paths, numbers = open_classes(data, labels)
    return classes, lambda row: open_image(paths[row]), numbers, templates_for(classes, templates)


def run_prompts(args, clip) -> dict:
    if args.negation:
        found = zeroshot.negation(clip)
        print("is it there? percent right, of drawn scenes; 50 is guessing     there  absent    mean roc-auc")
        for wording, right in found.items():
            print(f"{wording:16} {zeroshot.ABSENT[wording]:40}"
                  + "".join(f"{value:8.1f}" for value in right.values()))
        return {"negation": found}
    if not args.data:
        raise DataError("--data: not given; expected a folder of classes, or --negation, which needs none")
    classes, get_image, labels, templates = open_classification(args.data, args.labels, args.templates)
    found = zeroshot.prompts(clip, classes.chinese, get_image, labels, templates, classes.metric)
    print(f"{classes.metric} in percent, {len(templates)} templates alone and all together, best first")
    for template, value in found.items():
        print(f"{value:6.1f}  {template}")
    return {"metric": classes.metric, "prompts": found}


# ------------------------------------------------------------------------------------------------------------
# the paper's figures


def paper_data(args, path: str, tables: tuple[str, ...]) -> tuple[str, str]:
    """The paper's table and data set to compare with: what --published names, or for a released model what
    the data at `path` are called. Otherwise "", because other weights may be finetuned or not."""
    if args.published:
        table, data, _ = published.figures_named(args.published)
        if table not in tables:
            raise DataError(f"--published {args.published}: these are not figures of {args.task}")
        return table, data
    table, data = published.table_of(os.path.splitext(os.path.basename(os.path.abspath(path)))[0])
    return (table, data) if args.model in RELEASED and table in tables else ("", "")


def beside_the_paper(args, clip, result: dict, measured: dict[str, float], table: str, data: str):
    """Print the measured figures beside the paper's, and add them to the result."""
    setup = args.published.rpartition(" ")[2] or "zero-shot"
    result["published"] = published.compare(measured, table, data, setup, row_of(args.model, clip))
    print(published.comparison_table(result["published"]))


def row_of(name_or_path: str, clip) -> str:
    """The paper's name of this model, by its name or its shape; "" if it is none of the five."""
    if name_or_path in RELEASED:
        return name_or_path
    return next((name for name in RELEASED if model.MODELS[name] == clip.config), "")


def run_reproduce(args, clip) -> dict:
    """One of the paper's tables, for the data sets given by NAME=PATH."""
    table, paper = args.table, published.read_paper()[args.table]
    setup = "finetune" if table == "table10" else args.setup
    ours, rows = args.row or row_of(args.model, clip), []
    for data, folder in args.data.items():
        print(f"{data}: {folder}")
        if table in published.RETRIEVAL:
            pairs = open_pairs(folder, args.split or paper.get("split", "test"))
            # the long texts of ICR get 128 tokens (app. A.4)
            result = retrieval(clip, pairs, 128 if table == "table10" else 52)
            measured = published.retrieval_columns(result, table)
        else:
            classes, get_image, labels, templates = open_classification(folder, data)
            cosines, single = zero_shot_cosines(clip, classes.chinese, get_image, len(labels), templates)
            result = zeroshot.own_zero_shot(clip, cosines, single, labels, templates, classes.metric)
            measured = {data: result[classes.metric]}
        rows += published.compare(measured, table, data, setup, ours)
    if table == "table12" and len(args.data) == len(published.data_of(table)):
        average = {"average": sum(row["measured"] for row in rows) / len(rows)}
        rows += published.compare(average, table, "average", setup, ours)
    print(f"{paper['title']}: {ours or args.model}, {setup}\n" + published.comparison_table(rows))
    return {"title": paper["title"], "row": ours, "setup": setup, "rows": rows}


def data_folders(table: str, items: list[str]) -> dict[str, str]:
    """The folders of `reproduce --data NAME=PATH ...` by the table's names of the data sets."""
    wanted, folders = published.data_of(table), {}
    names = {bare_name(data): data for data in wanted}
    for item in items:
        name, _, folder = item.partition("=")
        if not folder or bare_name(name) not in names:
            raise DataError(f"--data {item}: expected NAME=PATH with a NAME of {table}: {', '.join(wanted)}")
        folders[names[bare_name(name)]] = folder
    if not folders:
        raise DataError(f"{table} is measured on {', '.join(wanted)}: say where, --data {wanted[0]}=PATH ...")
    return folders


# ------------------------------------------------------------------------------------------------------------
# command line


RUN = {"retrieval": run_retrieval, "zeroshot": run_zeroshot, "prompts": run_prompts,
       "calibrate": run_calibrate, "reproduce": run_reproduce}


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """eval.py's two commands with more flags, and three more."""
    parser, commands, flags = build_parser("python -m tools.measure", __doc__.strip().split("\n\n")[0])
    pairs, classes = commands.choices["retrieval"], commands.choices["zeroshot"]

    def like(other: argparse.ArgumentParser, name: str, text: str) -> argparse.ArgumentParser:
        """A command with the flags that `other` has so far."""
        return commands.add_parser(
            name, help=text, parents=[other], add_help=False, conflict_handler="resolve")

    file = dict(default="", metavar="FILE")
    prompts = like(classes, "prompts", "every template alone and all together")
    prompts.add_argument("--data", default="", help="a folder as for zeroshot; --negation needs none")
    prompts.add_argument("--negation", action="store_true",
                         help="instead, on drawn scenes: is 'no X' understood, or another wording?")
    pairs.add_argument("--features", default="", metavar="DIR", help="keep the features there as .npy, or "
                       "use those of this model and data that are there; all processes must see the folder")
    p = like(pairs, "calibrate", "the cosine that gives a wanted precision")
    p.add_argument("--precision", type=float, default=0.9, help="the wanted share of right pairs, 0 to 1 "
                   "(default: 0.9)")
    p.add_argument("--prior", type=float, default=0.5, help="the share of right pairs among those you will "
                   "judge (default: 0.5); 0: that of this split, where every text meets every picture")
    p.add_argument("--test", default="", metavar="SPLIT", help="also try the threshold on this split")
    pairs.add_argument("--predictions", **file, help="write each query's nearest; the split needs no answers")
    pairs.add_argument("--direction", default="text-to-image", choices=("text-to-image", "image-to-text"),
                       help="of --predictions")
    pairs.add_argument("--format", default="official", choices=("official", "muge"), help="of --predictions: "
                       "for the official evaluation.py and evaluation_tr.py, or for MUGE's server")
    pairs.add_argument("--top-k", type=int, default=10, help="answers to each query in --predictions; the "
                       "official scripts and MUGE want 10")
    classes.add_argument("--submission", **file, help="write the predictions as ELEVATER's server takes them")
    for p in (pairs, classes):
        p.add_argument("--page", **file, help="write a page to look at: curve or confusion matrix, failures")
        p.add_argument("--published", default="", metavar="'DATA SETUP'", help="compare with the paper's "
                       "figures, such as 'MUGE finetune'; a released model on such data is compared anyway")
    p = like(flags, "reproduce", "a table of the paper, beside the paper's figures")
    p.add_argument("table", choices=(*published.RETRIEVAL, *published.CLASSIFICATION))
    p.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH",
                   help="the table's data sets, such as muge=path/to/MUGE or cifar-10=path")
    p.add_argument("--setup", default="zero-shot", choices=published.SETUPS,
                   help="the paper's rows to compare with; table10 has only finetuned ones")
    p.add_argument("--row", default="", choices=("", *RELEASED),
                   help="the paper's model to compare with, if --model is a file whose shape does not tell")
    p.add_argument("--split", default="", help="another split than the table's")
    args = parser.parse_args(argv)
    for flag in ("page", "predictions", "submission"):  # before anything is computed
        if os.path.isdir(getattr(args, flag, "")):
            parser.error(f"--{flag} {getattr(args, flag)}: a folder; expected the name of a file")
    if getattr(args, "top_k", 1) < 1:
        parser.error(f"--top-k {args.top_k}: expected at least 1")
    if args.task == "calibrate" and not (0 < args.precision <= 1 and 0 <= args.prior < 1):
        parser.error("--precision and --prior are shares: expected 0 to 1")
    if args.task == "reproduce":  # before anything is downloaded
        args.data = data_folders(args.table, args.data)
    return parser, args


def main(argv: list[str] | None = None):
    parser, args = parse(argv)
    run_command(parser, args, RUN[args.task])


if __name__ == "__main__":
    with one_line_errors():
        main()
