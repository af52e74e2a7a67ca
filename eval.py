"""
How good is it? The paper's measurements, as commands and as functions.

    python eval.py retrieval --model out/stage2/best.safetensors --data path/to/MUGE --split valid
    python eval.py zeroshot  --model ViT-B-16 --data path/to/cifar-100 --labels cifar-100
    python eval.py prompts   --model ViT-B-16 --data path/to/cifar-100 --labels cifar-100    # or --negation
    python eval.py calibrate --model ViT-B-16 --data path/to/MUGE --precision 0.9
    python eval.py reproduce table2 --model ViT-B-16 --data muge=path/to/MUGE

Retrieval (paper, sec. 3.1) is one matrix product and a count: how often is a right answer among the K
nearest? Zero-shot classification (sec. 3.2) is retrieval with class names, in sentences, as the answers. A
table is printed, beside the paper's figures where model and data are the paper's, and with --out written as
JSON. The formulas are in tools/measure/metrics.py; then read tools/measure/kept.py, sources/classes.py, tools/measure/zeroshot.py.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import sys
import time

import torch

import model
from tools.measure import page
from tools.measure import published
from tools.measure import zeroshot
from tools.measure.calibrate import WHY, at_threshold, calibrate, calibration_table
from sources.classes import TEMPLATES, elevaters_pictures, open_classes, read_templates
from weights.download import RELEASED
from tools.measure.kept import encode_images, encode_texts, pair_features  # the first two also for python -m tools.curate, training/report.py
from common import join_processes, leave_processes, lost_process, rank
from tools.measure.metrics import KS, nearest, ranks, recall
from sources.pairs import DataError, Pairs, open_image
from sources.layouts import FolderPairs, open_pairs
from common import replace_text, write_json
from weights.read import WeightsError
from tools.measure.zeroshot import zero_shot  # also for training/report.py


# ------------------------------------------------------------------------------------------------------------
# retrieval


def retrieval(clip, pairs: Pairs, context_length: int = 52) -> dict[str, dict[str, float]]:
    """Recall in both directions over a whole split, from one relation of positives. `mean_recall` is the mean
    of all six, by which train.py chooses its best checkpoint; the paper's MR is the mean of one direction's
    three in Table 2, of all six in Table 10."""
    image_features, text_features = pair_features(clip, pairs, context_length)
    return recalls(*ranks_on(clip.logit_scale.device, text_features, image_features, pairs.positives))


def ranks_on(device, text_features, image_features, positives) -> tuple[torch.Tensor, torch.Tensor]:
    """metrics.ranks of texts [N_text] and of pictures [N_image], computed on the model's device."""
    found = ranks(*(x.to(device) for x in (text_features, image_features, positives)))
    return found[0].cpu(), found[1].cpu()


def recalls(text_ranks: torch.Tensor, image_ranks: torch.Tensor) -> dict[str, dict[str, float]]:
    t2i, i2t = recall(text_ranks), recall(image_ranks)
    return {"text_to_image": t2i, "image_to_text": i2t, "mean_recall": (t2i["mean"] + i2t["mean"]) / 2}


def recall_table(rows: dict[str, dict]) -> str:
    """Name -> result of `retrieval`, as lines of text."""
    width = max(20, *(len(name) for name in rows))
    lines = [f"{'':{width}}  mean | text to image: R@1  R@5 R@10 | image to text: R@1  R@5 R@10"]
    for name, result in rows.items():
        t2i, i2t = ("  ".join(f"{result[way][f'R@{k}']:5.1f}"[:5] for k in KS)
                    for way in ("text_to_image", "image_to_text"))
        lines.append(f"{name:{width}} {result['mean_recall']:5.1f} |          {t2i} |          {i2t}")
    return "\n".join(lines)


def write_predictions(args, pairs: Pairs, ids: dict[str, list], features: dict[str, torch.Tensor]):
    """The --top-k nearest of every query as JSON lines, atomically, in one of two formats. "official" is what
    the official evaluation.py and evaluation_tr.py read: {"text_id", "image_ids"} and {"image_id",
    "text_ids"}. "muge" is what MUGE's task takes: {"query_id", "query_text", "item_ids"}, where a query that
    is a picture has no text."""
    query, _, item = args.direction.split("-")  # "text" and "image", or the other way round
    names = ("query_id", "item_ids") if args.format == "muge" else (f"{query}_id", f"{item}_ids")
    lines = []
    for row, items in enumerate(nearest(features[query], features[item], args.top_k).tolist()):
        line = {names[0]: ids[query][row]}
        if args.format == "muge" and query == "text":
            line["query_text"] = pairs.text(row)
        line[names[1]] = [ids[item][number] for number in items]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    replace_text(args.predictions, "".join(lines))
    print(f"{args.predictions}: the {args.top_k} nearest of {len(lines):,} queries, {args.direction}")


def ids_to_predict(args, pairs: Pairs) -> dict[str, list]:
    """{"text": ids of the captions, "image": of the pictures}: those of the official layout, as numbers where
    they are such, which the official scripts want; a folder's file names; otherwise rows, from 0. DataError,
    before anything is encoded, if the set is too small for --top-k or an id stands for two."""
    images = pairs.names if isinstance(pairs, FolderPairs) else [
        str(pairs.image_id(row)) for row in range(pairs.image_count)]
    ids = {"text": [pairs.text_id(row) for row in range(len(pairs.texts))],
           "image": [int(i) if i.isdecimal() and str(int(i)) == i else i for i in images]}
    choices = len(ids[args.direction.split("-")[2]])
    if choices < args.top_k:
        raise DataError(f"--top-k {args.top_k}: every query of --predictions gets so many answers, but "
                        f"{args.direction} has only {choices} to choose from")
    for what, some in ids.items():
        twice = [i for i, times in collections.Counter(map(str, some)).items() if times > 1]
        if twice:
            raise DataError(f"{args.data} {args.split}: the {what} id {twice[0]} stands there twice; "
                            "--predictions names by ids, so each must be another")
    return ids


# ------------------------------------------------------------------------------------------------------------
# the commands: (arguments, model) -> what goes into the JSON file


def run_retrieval(args, clip) -> dict:
    pairs = open_pairs(args.data, args.split, answers=not args.predictions)
    print(f"{args.data} {args.split}: {pairs.image_count:,} images, {len(pairs.texts):,} texts, "
          f"{len(pairs.positives):,} pairs")
    if args.page and not len(pairs.positives):
        raise DataError(f"--page: {args.data} {args.split} has no answers, so there is nothing to show")
    ids = ids_to_predict(args, pairs) if args.predictions else {}
    image_features, text_features = pair_features(clip, pairs, args.context_length, args.features)
    if args.predictions and rank() == 0:
        write_predictions(args, pairs, ids, {"text": text_features, "image": image_features})
    if not len(pairs.positives):
        print(f"{args.data} {args.split}: no answers in it, so nothing to measure")
        return {}
    found = ranks_on(clip.logit_scale.device, text_features, image_features, pairs.positives)
    result = recalls(*found)
    lines = recall_table({args.split: result})
    print(lines)
    if args.page and rank() == 0:
        page.write_retrieval(args.page, f"{args.model} on {args.data} {args.split}", lines, pairs,
                             text_features, image_features, *found)
    table, data, setup = paper_figures(args, args.data, published.RETRIEVAL)
    if table and (args.published or args.split == published.read_paper()[table].get("split", "test")):
        columns = published.retrieval_columns(result, table)
        result["published"] = published.compare(columns, table, data, setup, row_of(args.model, clip))
        print(published.comparison_table(result["published"]))
    return result


def run_zeroshot(args, clip) -> dict:
    classes, get_image, labels, templates = open_classification(args.data, args.labels, args.templates)
    if args.submission and not classes.numbered:
        raise DataError(f"--submission: ELEVATER numbers the classes of {args.labels} otherwise; expected "
                        f"{os.path.join(args.data, 'label.txt')}, an English class name a line, in its order")
    rows = elevaters_pictures(args.data, len(labels)) if args.submission else []
    cosines, single = zeroshot.zero_shot_cosines(clip, classes.chinese, get_image, len(labels), templates)
    result = zeroshot.report(clip, cosines, single, labels, templates, classes.metric)
    line = classification_line(result)
    print(line)
    if args.page and rank() == 0:
        page.write_zeroshot(
            args.page, f"{args.model} on {args.data}", line, classes.chinese, get_image, cosines, labels)
    if args.submission and rank() == 0:
        data = args.labels or os.path.basename(os.path.abspath(args.data))
        write_json(args.submission, zeroshot.submission(clip, data, cosines[rows]))
        print(f"{args.submission}: the predictions as ELEVATER takes them")
    table, data, setup = paper_figures(args, args.labels or args.data, published.CLASSIFICATION)
    if table:
        measured = {data: result[classes.metric]}
        result["published"] = published.compare(measured, table, data, setup, row_of(args.model, clip))
        print(published.comparison_table(result["published"]))
    return result


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


def run_calibrate(args, clip) -> dict:
    pairs = open_pairs(args.data, args.split)
    test = open_pairs(args.data, args.test) if args.test else None  # before anything is encoded
    image_features, text_features = pair_features(clip, pairs, args.context_length, args.features)
    result = calibrate(text_features, image_features, pairs.positives, args.precision, args.prior)
    print(calibration_table(result))
    if test and result["threshold"] is not None:
        image_features, text_features = pair_features(clip, test, args.context_length)
        result["test"] = at_threshold(
            text_features, image_features, test.positives, result["threshold"], result["prior"])
        print("on {}: {precision:.1%} right, {recall:.1%} of the right ones kept".format(
            args.test, **result["test"]))
    print("\n" + WHY)
    return result


def run_reproduce(args, clip) -> dict:
    """One of the paper's tables, for the data that are given by NAME=PATH."""
    table, paper = args.table, published.read_paper()[args.table]
    setup = "finetune" if table == "table10" else args.setup
    ours, rows = args.row or row_of(args.model, clip), []
    for data, folder in args.data.items():
        print(f"{data}: {folder}")
        if table in published.RETRIEVAL:
            pairs = open_pairs(folder, args.split or paper.get("split", "test"))
            # app. A.4: the long texts of ICR get 128 tokens
            result = retrieval(clip, pairs, 128 if table == "table10" else 52)
            measured = published.retrieval_columns(result, table)
        else:
            classes, get_image, labels, templates = open_classification(folder, data)
            result = zero_shot(clip, classes.chinese, get_image, labels, templates, classes.metric)
            measured = {data: result[classes.metric]}
        rows += published.compare(measured, table, data, setup, ours)
    if table == "table12" and len(args.data) == len(published.data_of(table)):
        average = {"average": sum(row["measured"] for row in rows) / len(rows)}
        rows += published.compare(average, table, "average", setup, ours)
    print(f"{paper['title']}: {ours or args.model}, {setup}\n" + published.comparison_table(rows))
    return {"title": paper["title"], "row": ours, "setup": setup, "rows": rows}


def data_folders(table: str, items: list[str]) -> dict[str, str]:
    """NAME=PATH of `reproduce --data` -> the table's name of the data set -> its folder."""
    wanted, folders = published.data_of(table), {}
    for item in items:
        name, _, folder = item.partition("=")
        data = next((data for data in wanted if published.plain(data) == published.plain(name)), "")
        if not folder or not data:
            raise DataError(f"--data {item}: expected NAME=PATH with a NAME of {table}: {', '.join(wanted)}")
        folders[data] = folder
    if not folders:
        raise DataError(f"{table} is measured on {', '.join(wanted)}: say where, --data {wanted[0]}=PATH ...")
    return folders


def open_classification(data: str, labels: str, templates: str = ""):
    """-> (classes, get_image, labels, templates): those of the file `templates` if there is one, else the
    data set's own, and where it is one of objects the general ones after them."""
    classes, paths, numbers = open_classes(data, labels)
    sentences = read_templates(templates) if templates else list(classes.templates)
    if not templates and not classes.alone:
        sentences = list(dict.fromkeys([*sentences, *read_templates(TEMPLATES)]))
    return classes, functools.partial(open_row, paths), numbers, sentences


def open_row(paths: list[str], row: int):
    return open_image(paths[row])


def classification_line(result: dict) -> str:
    names = {"accuracy": "", "mean-per-class": " mean per class", "roc-auc": " area under the ROC curve",
             "map-11": " mean average precision (11 points)"}
    return ("{value:.1f} %{name} of {images:,} images in {classes} classes with {templates} templates, "
            "{single:.1f} % with the first alone, {chance:.1f} % by chance".format(
                value=result[result["metric"]], single=result[f"{result['metric']}_single_template"],
                name=names[result["metric"]], **result))


def row_of(name_or_path: str, clip) -> str:
    """The paper's name of this model, by its name or by its shape; "" if it is none of the five."""
    by_shape = [name for name in RELEASED if model.MODELS[name] == clip.config]
    return name_or_path if name_or_path in RELEASED else by_shape[0] if by_shape else ""


def paper_figures(args, name: str, tables: tuple[str, ...]) -> tuple[str, str, str]:
    """-> (table, data, setup) of the paper that an evaluation is compared with: as --published says, or for a
    released model by the name of the data; otherwise "", for other weights might be finetuned or not."""
    if args.published:
        found = published.parse(args.published)
        if found[0] not in tables:
            raise DataError(f"--published {args.published}: its figures are of another task than {args.task}")
        return found
    table, data = published.table_of(os.path.splitext(os.path.basename(os.path.abspath(name)))[0])
    return (table, data, "zero-shot") if args.model in RELEASED and table in tables else ("", "", "")


# ------------------------------------------------------------------------------------------------------------
# command line


TASKS = {
    "retrieval": (run_retrieval, "Recall@K from text to image and from image to text"),
    "zeroshot": (run_zeroshot, "classification by class names, with the data set's own measure"),
    "prompts": (run_prompts, "every template alone and all together, ranked; or is 'no X' understood?"),
    "calibrate": (run_calibrate, "the cosine from which on a wanted share of pairs is right"),
    "reproduce": (run_reproduce, "a table of the paper, beside the paper's figures"),
}


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser("eval.py", description=__doc__.strip().split("\n\n")[0])
    commands = parser.add_subparsers(dest="task", required=True, metavar="COMMAND")
    add = {task: commands.add_parser(
        task, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for task, (_, text) in TASKS.items()}
    for task, p in add.items():
        p.add_argument("--model", required=True,
                       help="a weights file, or a released name: " + ", ".join(RELEASED))
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights: "
                       "bfloat16 halves the memory, and large models' time where the CPU has it")
        p.add_argument("--out", default="", metavar="FILE", help="also write the result to this JSON file")
    for task in ("retrieval", "calibrate"):
        p = add[task]
        p.add_argument("--data", required=True, help="what train.py --data takes: a folder of pairs, tar "
                       "shards, scenes-zh, scenes-en")
        p.add_argument("--split", default="valid", help="train, valid, test")
        p.add_argument("--context-length", type=int, default=52, help="tokens a caption")
        p.add_argument("--features", default="", metavar="DIR", help="keep the features there as .npy, and "
                       "use those that are there if they are of this model and data; all processes see it")
    for task in ("zeroshot", "prompts"):
        p = add[task]
        p.add_argument("--data", required=task == "zeroshot", default="", help="a folder with test/000 ... "
                       "or test/NAME ..., or pictures listed in test.txt (see sources/classes.py)")
        p.add_argument("--labels", default="", help="names, measure and templates: a file, or a data set of "
                       "labels/ such as cifar-100, in the order of label.txt or label_cn.txt in --data; "
                       "without it the names of that label_cn.txt, and accuracy")
        p.add_argument("--templates", default="", metavar="FILE", help="these sentences alone, one a line, "
                       "{} for the class name; without it the data set's own, and after them those of "
                       "labels/templates.txt, unless labels/ says `templates: alone`")
    for task in ("retrieval", "zeroshot"):
        add[task].add_argument("--page", default="", metavar="FILE", help="also write a page to look at: "
                               "curve or confusion matrix, the worst failures as pictures")
        add[task].add_argument(
            "--published", default="", metavar="'DATA SETUP'", help="compare with the paper's figures, as "
            "'MUGE finetune'; a released model on data of the paper's name is compared anyway")
    p = add["retrieval"]
    p.add_argument("--predictions", default="", metavar="FILE", help="write the nearest of each query to "
                   "this file; the split may then come without answers")
    p.add_argument("--direction", default="text-to-image", choices=("text-to-image", "image-to-text"),
                   help="of --predictions")
    p.add_argument("--format", default="official", choices=("official", "muge"), help="of --predictions: for "
                   "the official evaluation.py and evaluation_tr.py, or as MUGE's server takes them")
    p.add_argument("--top-k", type=int, default=10, help="answers a query in --predictions; the official "
                   "scripts and MUGE want 10")
    add["zeroshot"].add_argument("--submission", default="", metavar="FILE",
                                 help="write the predictions as ELEVATER's server takes them")
    add["prompts"].add_argument("--negation", action="store_true",
                                help="instead, on drawn scenes: 'X' against 'no X' and other wordings")
    p = add["calibrate"]
    p.add_argument("--precision", type=float, default=0.9, help="wanted share of right pairs, 0 to 1")
    p.add_argument("--prior", type=float, default=0.5, help="share of right pairs among those you will "
                   "judge; 0: as in this split, where every text meets every picture")
    p.add_argument("--test", default="", metavar="SPLIT", help="try the threshold on this split too")
    p = add["reproduce"]
    p.add_argument("table", choices=(*published.RETRIEVAL, *published.CLASSIFICATION))
    p.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH", help="the table's data sets, as "
                   "muge=path/to/MUGE or cifar-10=path")
    p.add_argument("--setup", default="zero-shot", choices=published.SETUPS, help="the paper's rows to "
                   "compare with; table10 has only finetuned ones")
    p.add_argument("--row", default="", choices=("", *RELEASED), help="the paper's model to compare with, if "
                   "--model is a file and its shape does not say")
    p.add_argument("--split", default="", help="another split than the table's")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None):
    parser, args = parse(argv)
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {args.device}: expected cpu, or cuda on a machine where torch finds a GPU")
    if not 2 <= getattr(args, "context_length", 52) <= 512:
        parser.error(f"--context-length {args.context_length}: expected 2 to 512")
    if getattr(args, "top_k", 1) < 1:
        parser.error(f"--top-k {args.top_k}: expected at least 1")
    if args.task == "calibrate" and not (0 < args.precision <= 1 and 0 <= args.prior < 1):
        parser.error("--precision and --prior are shares: expected 0 to 1")
    for flag in ("out", "page", "predictions", "submission"):  # before anything is computed
        if os.path.isdir(getattr(args, flag, "")):
            parser.error(f"--{flag} {getattr(args, flag)}: a folder; expected the name of a file")
    start = time.time()
    if args.task == "reproduce":  # before anything is downloaded
        args.data = data_folders(args.table, args.data)
    device = join_processes(args.device)
    with contextlib.redirect_stdout(sys.stdout if rank() == 0 else None):
        clip, _ = model.load(args.model, device, dtype=args.dtype)
        result = TASKS[args.task][0](args, clip)
        if args.out and rank() == 0:
            write_json(args.out, vars(args) | result)
        print(f"{time.time() - start:.0f} s" + (f", written to {args.out}" if args.out else ""))
    leave_processes()


if __name__ == "__main__":
    try:
        main()
    except (DataError, WeightsError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory ({str(error).splitlines()[0][:120]}); --dtype bfloat16 takes half")
    except RuntimeError as error:
        if not lost_process(error):
            raise
        sys.exit("error: another process is gone, see its message")
    except KeyboardInterrupt:
        sys.exit("stopped")
