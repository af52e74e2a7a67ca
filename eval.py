"""
How good is a model? Recall@K of retrieval and accuracy of zero-shot classification, as formulas and commands.

Recall@K (paper, sec. 3.1): put the gallery in order of its cosine with a query. The rank of the query is the
number of wrong answers before its best right answer; a wrong answer with the same cosine counts as before it.
Recall@K is the share of queries whose rank is below K. Zero-shot classification (sec. 3.2) is retrieval too:
the query is a picture, the gallery holds one text feature for each class.

    python eval.py retrieval --model out/stage2/best.safetensors --data path/to/MUGE --split valid
    python eval.py zeroshot --model ViT-B-16 --data path/to/cifar-100 --labels cifar-100

Shapes: Q queries, G gallery items, P pairs that belong together, N pictures, C classes, S sentences for each
class, E joint width. All features have unit length, so the product of two is their cosine. Under torchrun
every process computes a share, with the same result. tools/measure has the rarer measures.
"""

import argparse
import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

import model
from common import join_processes, lost_process, rank, sum_over_ranks, wait_for_all, world_size, write_json
from data import squash, to_pixels, tokenize
from sources.classes import open_classes, templates_for
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs, open_image
from weights.download import RELEASED
from weights.read import WeightsError

FILE = {"default": "", "metavar": "FILE"}  # of a flag that names a file
KS = (1, 5, 10)
TILE = 1024  # The scores of 1024 x 1024 pairs take 4 MB, which fits into the cache of a core.
TIE = 1e-6  # Closer cosines are equal: float32 sums differ by about 1e-7 with the shape of the product.


# ------------------------------------------------------------------------------------------------------------
# features


@torch.inference_mode()
def encode(function, items, batch_size: int, width: int, what: str, get=None) -> torch.Tensor:
    """Unit features [N, E = width] of N items, float32, on the CPU. `function` turns a list of items, or with
    `get` a list of get(item), into features [b, E]. Processes take turns at the batches, so that no process
    gets all long captions, and each returns all features. DataError if one is not finite."""
    features = torch.zeros(len(items), width)
    starts = range(0, len(items), batch_size)[rank() :: world_size()]
    batches = [items[start : start + batch_size] for start in starts]
    bar = tqdm(starts, what, leave=False, delay=2, disable=None if rank() == 0 else True)
    for start, batch in zip(bar, ahead(get, batches) if get else batches):
        features[start : start + batch_size] = model.normalise(function(batch))
    wait_for_all()
    sum_over_ranks(features)  # the rows of other processes are still 0 in this one
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(dim=1)).sum())
        raise DataError(f"{what}: {bad} of {len(features)} features are not finite numbers")
    return features


def ahead(get, batches: list):
    """Yield [get(item) for item in batch] for each batch while threads prepare the next one. Pillow releases
    Python's lock while it decodes, so a GPU does not wait for a single core."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the share of this process
    with ThreadPoolExecutor(max(1, min(8, cores))) as pool:
        coming = []
        for batch in [*batches, []]:
            waiting, coming = coming, pool.map(get, batch)  # starts at once
            if waiting:
                yield list(waiting)


def encode_images(clip, get_image, count: int, batch_size: int = 0) -> torch.Tensor:
    """Unit features [count, E] of the pictures get_image(0) ... get_image(count - 1), which threads ask for.
    batch_size 0 is 64 on a GPU and 2^19 pixels on a CPU, where RN50 takes a third longer with 64."""
    device, resolution = clip.logit_scale.device, clip.config.visual.resolution
    batch_size = batch_size or (64 if device.type == "cuda" else max(1, 2**19 // resolution**2))

    def features(pictures):
        with model.autocast(device):
            return clip.encode_image(to_pixels(torch.stack(pictures).to(device)))

    return encode(features, range(count), batch_size, clip.config.embed_dim, "encoding images",
                  get=lambda row: squash(get_image(row), resolution))


def encode_texts(clip, texts: list[str], context_length: int = 52, batch_size: int = 256) -> torch.Tensor:
    """Unit features [N, E] of N captions. Captions of similar length share a batch, to pad little."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))

    def features(rows):
        with model.autocast(clip.logit_scale.device):
            return clip.encode_text(tokenize([texts[row] for row in rows], context_length))

    sorted_features = encode(features, order, batch_size, clip.config.embed_dim, "encoding texts")
    return sorted_features[torch.tensor(order).argsort()]  # back in the order of `texts`


def pair_features(clip, pairs: Pairs, context_length: int = 52) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of all pictures [N_image, E] and of all captions [N_text, E] of a split."""
    # pairs.text(row) raises the error that says where a caption is not text
    texts = [text if isinstance(text, str) else pairs.text(row) for row, text in enumerate(pairs.texts)]
    return encode_images(clip, pairs.image, pairs.image_count), encode_texts(clip, texts, context_length)


# ------------------------------------------------------------------------------------------------------------
# recall


def recall_at_k(queries, gallery, positives, tile: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """`recall` of the queries, and of the gallery's items as queries; the arguments are those of `ranks`."""
    query_ranks, item_ranks = ranks(queries, gallery, positives, tile)
    return recall(query_ranks), recall(item_ranks)


def recall(ranks: torch.Tensor) -> dict[str, float]:
    """Ranks [Q] -> {"R@1", "R@5", "R@10", "mean"} in percent. Rank -1, no right answer, does not count."""
    counted = ranks[ranks >= 0]
    shares = {f"R@{k}": 100 * (counted < k).sum().item() / len(counted) for k in KS}
    return shares | {"mean": sum(shares.values()) / len(KS)}


def ranks(queries, gallery, positives, tile: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of every query [Q], and of every gallery item as a query among the queries [G]: the number of
    wrong answers that score at least as high as the best right one, or -1 if there is no right one. Since a
    tie counts against us, a model that gives everything the same feature scores nothing.

    queries [Q, E], gallery [G, E]; positives [P, 2] holds pairs (query, gallery item) that belong together.
    Each score is computed once for both directions, in tiles of `tile` x `tile` (0: TILE, on a GPU 16 TILE),
    on the device of the features. Processes share the tiles, so all of them must call this."""
    tile = tile or (TILE if queries.device.type == "cpu" else 16 * TILE)
    if not len(positives):
        raise DataError("no query has a right answer, so recall is not defined")
    query_bar, item_bar = (best - TIE for best in best_right(queries, gallery, positives))  # [Q], [G]
    query_ranks, item_ranks = torch.zeros_like(query_bar), torch.zeros_like(item_bar)
    for rows, columns, scores, right in score_tiles(queries, gallery, positives, tile):
        scores[right] = -torch.inf  # right answers do not compete with each other
        # The plain formula is (scores >= bar).sum(). Writing the comparison into float32, as 0.0 and 1.0,
        # takes a fifth of its time and saves a seventh of the whole; it is exact up to a rank of 2^24.
        reached = torch.empty_like(scores)
        query_ranks[rows] += torch.ge(scores, query_bar[rows, None], out=reached).sum(dim=1)
        item_ranks[columns] += torch.ge(scores, item_bar[columns], out=reached).sum(dim=0)
    return tuple(torch.where(bar > -torch.inf, sum_over_ranks(count), -1).long().cpu()
                 for bar, count in ((query_bar, query_ranks), (item_bar, item_ranks)))


def best_right(queries, gallery, positives) -> list[torch.Tensor]:
    """The score of the best right answer of every query [Q] and every gallery item [G]; -inf without one."""
    best = [torch.full((len(side),), -torch.inf, dtype=torch.float32, device=side.device)
            for side in (queries, gallery)]
    for some in positives.split(1 << 14):
        scores = (queries[some[:, 0]] * gallery[some[:, 1]]).sum(dim=1).float()  # [some]
        for side, numbers in zip(best, some.T):
            side.scatter_reduce_(0, numbers, scores, "amax")
    return best


def score_tiles(queries, gallery, positives, tile: int):
    """Yield this process's share of the score matrix [Q, G] in tiles: (rows and columns as slices, scores
    [tile, tile], the places of the positives in the tile as an index)."""
    across, down = -(-len(gallery) // tile), -(-len(queries) // tile)
    # The plain way searches all P positives for those of each tile, which would add 14 % to the time for
    # P = 100,000. Sorted by tile once, they lie together.
    tile_of = positives[:, 0] // tile * across + positives[:, 1] // tile  # [P]
    counts = tile_of.bincount(minlength=across * down).tolist()
    places = (positives % tile)[tile_of.argsort()].split(counts)  # for each tile [p, 2]
    for number in tqdm(range(across * down)[rank() :: world_size()], "comparing", leave=False, delay=2,
                       unit=" tiles", disable=None if rank() == 0 else True):
        rows, columns = (slice(k * tile, (k + 1) * tile) for k in divmod(number, across))
        yield rows, columns, cosines(queries[rows], gallery[columns]), tuple(places[number].T)


def cosines(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """queries @ gallery.T [Q, G] in full float32. train.py allows a GPU the faster TF32 for its loss, which
    moves a cosine by 1e-3, so that equal features would no longer tie."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return (queries @ gallery.T).float()
    finally:
        torch.set_float32_matmul_precision(allowed)


def retrieval(clip, pairs: Pairs, context_length: int = 52, features=None) -> dict:
    """Recall in both directions over a whole split. "mean_recall" is the mean of all six figures, by which
    train.py chooses its best checkpoint. features: those of `pair_features`, if they are known already."""
    image_features, text_features = features or pair_features(clip, pairs, context_length)
    sides = (x.to(clip.logit_scale.device) for x in (text_features, image_features, pairs.positives))
    t2i, i2t = recall_at_k(*sides)
    return {"text_to_image": t2i, "image_to_text": i2t, "mean_recall": (t2i["mean"] + i2t["mean"]) / 2}


def recall_table(rows: dict[str, dict]) -> str:
    """Results of `retrieval` by name, as a table of text."""
    width = max(20, *map(len, rows))
    lines = [f"{'':{width}}  mean | text to image: R@1  R@5 R@10 | image to text: R@1  R@5 R@10"]
    for name, result in rows.items():
        t2i, i2t = ("  ".join(f"{result[way][f'R@{k}']:5.1f}" for k in KS)
                    for way in ("text_to_image", "image_to_text"))
        lines.append(f"{name:{width}} {result['mean_recall']:5.1f} |          {t2i} |          {i2t}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# zero-shot classification


def sentence_features(clip, names: list[str], templates: list[str]) -> torch.Tensor:
    """Unit features [C, S, E] of the sentences that templates with a {} make of class names."""
    sentences = [template.replace("{}", name) for name in names for template in templates]
    return encode_texts(clip, sentences).unflatten(0, (len(names), len(templates)))  # [C*S, E] -> [C, S, E]


def ensemble(sentences: torch.Tensor) -> torch.Tensor:
    """One unit feature for each class [C, E]: the mean of its sentences' unit features [C, S, E], normalised
    again (prompt ensembling: CLIP paper, sec. 3.1.4)."""
    return model.normalise(sentences.mean(dim=1))


def zero_shot_cosines(clip, names, get_image, count: int, templates) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [N, C] of `count` pictures with the classes: with all templates, and with the first alone."""
    image_features = encode_images(clip, get_image, count)  # [N, E]
    sentences = sentence_features(clip, names, templates)  # [C, S, E]
    return image_features @ ensemble(sentences).T, image_features @ sentences[:, 0].T


def hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] bool: the label [N] of a picture scores highest in its row of [N, C]. A tie is wrong."""
    return (scores >= scores.gather(1, labels[:, None]) - TIE).sum(dim=1) == 1


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * hits(scores, labels).float().mean().item()


def zero_shot(clip, names: list[str], get_image, labels: torch.Tensor, templates: list[str]) -> dict:
    """The accuracy, in percent, on the pictures get_image(0) ... get_image(N - 1) with labels [N]: with all
    templates and with the first alone. Beside it stand the sizes and what guessing gives."""
    cosines, single = zero_shot_cosines(clip, names, get_image, len(labels), templates)
    return {"accuracy": accuracy(cosines, labels), "accuracy_single_template": accuracy(single, labels),
            "metric": "accuracy", "classes": len(names), "images": len(labels), "templates": len(templates),
            "chance": 100 / len(names)}


# ------------------------------------------------------------------------------------------------------------
# commands


def run_retrieval(args, clip) -> dict:
    pairs = open_pairs(args.data, args.split)
    print(f"{args.data} {args.split}: {pairs.image_count:,} images, {len(pairs.texts):,} texts, "
          f"{len(pairs.positives):,} pairs")
    result = retrieval(clip, pairs, args.context_length)
    print(recall_table({args.split: result}))
    return result


def run_zeroshot(args, clip) -> dict:
    classes, paths, labels = open_classes(args.data, args.labels)
    other = f"`python -m tools.measure zeroshot` with the same flags measures {classes.metric}"
    if labels.ndim == 2:
        raise DataError(f"{args.data}: there is no accuracy for pictures of several classes; {other}")
    result = zero_shot(clip, classes.chinese, lambda row: open_image(paths[row]), labels,
                       templates_for(classes, args.templates))
    print(classification_line(result))
    if classes.metric != "accuracy":
        print(f"The measure of {args.labels} is not accuracy: {other}")
    return result


def classification_line(result: dict, name: str = "") -> str:
    return ("{value:.1f} %{name} of {images:,} images in {classes} classes with {templates} templates, "
            "{single:.1f} % with the first alone, {chance:.1f} % by chance".format(
                value=result[result["metric"]], single=result[f"{result['metric']}_single_template"],
                name=name, **result))


def add_command(commands, name: str, text: str, data: str = "", required: bool = True):
    """A sub-command with the flags that all have, and those for `data`: "pairs", "classes" or none."""
    p = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    p.add_argument("--model", required=True, help="a weights file, or one of " + ", ".join(RELEASED))
    p.add_argument("--device", default=devices[0], choices=devices, help="cuda if torch finds a GPU")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                   help="of the weights; bfloat16 takes half the memory, and often less time")
    p.add_argument("--out", **FILE, help="also write the result to this JSON file")
    if data == "pairs":
        p.add_argument("--data", required=True, help="what train.py --data takes, such as a folder of pairs")
        p.add_argument("--split", default="valid", help="train, valid or test")
        p.add_argument("--context-length", type=int, default=52, help="tokens of each caption")
    if data == "classes":
        p.add_argument("--data", required=required, default="", help="a folder with pictures in test/000 "
                       "..., in test/NAME ..., or listed in test.txt (see sources/classes.py)")
        p.add_argument("--labels", default="", help="a data set of labels/, such as cifar-100, or a file "
                       "like those; without it the folder's label_cn.txt")
        p.add_argument("--templates", **FILE, help="sentences with {} for the class name, one on each line; "
                       "without it those of the labels, then the general ones if they fit")
    return p


def measure(parser, args, run):
    """Check the flags, load the model, call run(args, model) and write its result to --out."""
    if not 2 <= getattr(args, "context_length", 52) <= 512:
        parser.error(f"--context-length {args.context_length}: expected 2 to 512")
    for flag in ("out", "page", "predictions", "submission"):  # tools/measure has the last three
        if os.path.isdir(getattr(args, flag, "")):
            parser.error(f"--{flag} {getattr(args, flag)}: a folder; expected the name of a file")
    start, device = time.time(), join_processes(args.device)
    with contextlib.redirect_stdout(sys.stdout if rank() == 0 else None):
        clip, _ = model.load(args.model, device, dtype=args.dtype)
        result = run(args, clip)
        if args.out and rank() == 0:
            write_json(args.out, vars(args) | result)
        print(f"{time.time() - start:.0f} s" + (f", written to {args.out}" if args.out else ""))
    if world_size() > 1:
        dist.destroy_process_group()


def end_in_one_line(main):
    """Call main(). If the user, the memory or another process stops it, exit with code 1 and one line."""
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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        "eval.py", description="Recall@K of retrieval, and the accuracy of zero-shot classification.",
        epilog="python -m tools.measure has other measures, the paper's tables, pages and submissions.")
    commands = parser.add_subparsers(dest="task", required=True, metavar="COMMAND")
    add_command(commands, "retrieval", "Recall@K from text to image and from image to text", "pairs")
    add_command(commands, "zeroshot", "accuracy of classification by class names in sentences", "classes")
    args = parser.parse_args(argv)
    measure(parser, args, {"retrieval": run_retrieval, "zeroshot": run_zeroshot}[args.task])


if __name__ == "__main__":
    end_in_one_line(main)
