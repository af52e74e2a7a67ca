"""
How good is a model? Recall@K of retrieval and accuracy of zero-shot classification.

Recall@K (paper, sec. 3.1): sort the gallery by its cosine with a query. The place of the query is the number
of wrong answers before its best right answer; a wrong answer with the same cosine counts as before it.
Recall@K is the share of queries whose place is below K. Zero-shot classification (sec. 3.2) is retrieval too:
the query is a picture, and the gallery has one text feature for each class.

    python eval.py retrieval --model out/stage2/best.safetensors --data path/to/MUGE --split valid
    python eval.py zeroshot --model ViT-B-16 --data path/to/cifar-100 --labels cifar-100

Shapes: Q queries, G gallery items, P pairs that belong together, N pictures, C classes, S sentences for each
class, E joint width. All features have unit length, so a product of two is their cosine. Under torchrun every
process computes a share, and all get the whole result. tools/measure has the rarer measures.
"""

import contextlib
import os
import shlex
import sys

import torch
from tqdm import tqdm

import model
from common import (Flags, join_processes, leave_processes, one_line_errors, rank, sum_over_ranks,
                    wait_for_all, world_size, write_json)
from data import squash, to_pixels, tokenize
from sources.classes import NAMES, by_class, class_lines, open_classes, templates_for
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs, ahead, open_image

KS = (1, 5, 10)
TILE = 1024  # The scores of 1024 x 1024 pairs take 4 MB, which fits into the cache of a core.
TIE = 1e-6  # Cosines closer than this count as equal: sums in float32 differ by 1e-7 with their order.
FAILURES = "next, to see the failures: python -m tools.measure {} --page page.html"

# ------------------------------------------------------------------------------------------------------------
# features


@torch.inference_mode()
def encode(clip, function, items, batch_size: int, what: str, get=None) -> torch.Tensor:
    """Unit features [N, E] of N items, in float32, on the CPU. `function` makes features [b, E] of a list: of
    items or, with `get`, of get(item) for each. Processes take turns at the batches; all return the whole."""
    features = torch.zeros(len(items), clip.config.embed_dim)
    starts = range(0, len(items), batch_size)[rank() :: world_size()]
    batches = [items[start : start + batch_size] for start in starts]
    bar = tqdm(starts, what, leave=False, delay=2, disable=None if rank() == 0 else True)
    for start, batch in zip(bar, ahead(get, batches) if get else batches):
        with model.autocast(clip):
            features[start : start + batch_size] = model.normalise(function(batch))
    wait_for_all()
    sum_over_ranks(features)  # the rows of other processes are still 0 in this one
    if bad := int((~features.isfinite()).any(dim=1).sum()):
        raise DataError(f"{what}: {bad} of {len(features)} features are not finite numbers")
    return features


def encode_images(clip, get_image, count: int, batch_size: int = 0) -> torch.Tensor:
    """Unit features [count, E] of the pictures get_image(0) ... get_image(count - 1). batch_size 0: 64 on a
    GPU; 2^19 pixels on a CPU, where RN50 takes a third longer with 64."""
    device, resolution = clip.logit_scale.device, clip.config.visual.resolution
    batch_size = batch_size or (64 if device.type == "cuda" else max(1, 2**19 // resolution**2))
    return encode(clip, lambda pictures: clip.encode_image(to_pixels(torch.stack(pictures).to(device))),
                  range(count), batch_size, "encoding images", lambda row: squash(get_image(row), resolution))


def encode_texts(clip, texts: list[str], context_length: int = 52, batch_size: int = 256) -> torch.Tensor:
    """Unit features [N, E] of N captions. Captions of similar length share a batch, to pad little."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    features = encode(clip, lambda batch: clip.encode_text(tokenize(batch, context_length)),
                      [texts[row] for row in order], batch_size, "encoding texts")
    return features[torch.tensor(order).argsort()]  # back in the order of `texts`


def pair_features(clip, pairs: Pairs, context_length: int = 52) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of all pictures [N_image, E] and captions [N_text, E]. DataError if one is not text."""
    texts = [text if isinstance(text, str) else pairs.text(row) for row, text in enumerate(pairs.texts)]
    return encode_images(clip, pairs.image, pairs.image_count), encode_texts(clip, texts, context_length)


# ------------------------------------------------------------------------------------------------------------
# recall


def recall_at_k(queries, gallery, positives, tile: int = 0) -> tuple[dict[str, float], ...]:
    """{"R@1", "R@5", "R@10", "mean"} in percent, in both directions: each query searches the gallery, and
    each gallery item searches the queries. The arguments are those of `places`."""
    results = []
    for found in places(queries, gallery, positives, tile):
        counted = found[found >= 0]  # a query without a right answer does not count
        shares = {f"R@{k}": 100 * (counted < k).sum().item() / len(counted) for k in KS}
        results.append(shares | {"mean": sum(shares.values()) / len(KS)})
    return tuple(results)


def places(queries, gallery, positives, tile: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of every query [Q] and, with the roles exchanged, of every gallery item [G]; -1 without a
    right answer. As ties count against us, a model that gives everything the same feature scores nothing.

    queries [Q, E], gallery [G, E]; positives [P, 2] are the pairs (query, item) that belong together. In one
    piece: scores = queries @ gallery.T; scores[positives[:, 0], positives[:, 1]] = -inf; places = (scores >=
    best_right[:, None] - TIE).sum(dim=1). Here tile by tile, for both directions, shared by all processes."""
    if not len(positives):
        raise DataError("no query has a right answer, so recall is not defined")
    tile = tile or (TILE if queries.device.type == "cpu" else 16 * TILE)
    thresholds = [best - TIE for best in best_right(queries, gallery, positives)]  # [Q], [G]
    query_places, item_places = (torch.zeros_like(x, dtype=torch.long) for x in thresholds)
    across, down = -(-len(gallery) // tile), -(-len(queries) // tile)
    tile_of = positives[:, 0] // tile * across + positives[:, 1] // tile  # [P], tiles counted row by row
    for number in tqdm(range(across * down)[rank() :: world_size()], "comparing", leave=False, delay=2,
                       unit=" tiles", disable=None if rank() == 0 else True):
        rows, columns = (slice(k * tile, (k + 1) * tile) for k in divmod(number, across))
        scores = cosines(queries[rows], gallery[columns])  # [tile, tile]
        right = positives[tile_of == number] % tile  # [p, 2], those in this tile, counted from its corner
        scores[right[:, 0], right[:, 1]] = -torch.inf  # right answers do not compete with each other
        query_places[rows] += (scores >= thresholds[0][rows, None]).sum(dim=1)
        item_places[columns] += (scores >= thresholds[1][columns]).sum(dim=0)
    return tuple(torch.where(threshold > -torch.inf, sum_over_ranks(count), -1).cpu()
                 for threshold, count in zip(thresholds, (query_places, item_places)))


def best_right(queries, gallery, positives) -> list[torch.Tensor]:
    """The score of the best right answer of every query [Q] and every gallery item [G]; -inf without one."""
    best = [queries.new_full((len(side),), -torch.inf, dtype=torch.float32) for side in (queries, gallery)]
    for some in positives.split(1 << 14):
        scores = (queries[some[:, 0]] * gallery[some[:, 1]]).sum(dim=1).float()  # [some]
        for side, numbers in zip(best, some.T):
            side.scatter_reduce_(0, numbers, scores, "amax")
    return best


def cosines(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """queries @ gallery.T [Q, G] in full float32. train.py allows a GPU the faster TF32 for its loss, which
    moves a cosine by 1e-4, and then equal features no longer tie."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    scores = (queries @ gallery.T).float()
    torch.set_float32_matmul_precision(allowed)
    return scores


def retrieval(clip, pairs: Pairs, context_length: int = 52, features=None) -> dict:
    """Recall in both directions over a whole split; features: its `pair_features`, if they are known already.
    train.py chooses its best checkpoint by "mean_recall", the mean of all six figures."""
    image_features, text_features = features or pair_features(clip, pairs, context_length)
    device = clip.logit_scale.device
    t2i, i2t = recall_at_k(text_features.to(device), image_features.to(device), pairs.positives.to(device))
    return {"text_to_image": t2i, "image_to_text": i2t, "mean_recall": (t2i["mean"] + i2t["mean"]) / 2}


# ------------------------------------------------------------------------------------------------------------
# zero-shot classification


def sentence_features(clip, names: list[str], templates: list[str]) -> torch.Tensor:
    """Unit features [C, S, E] of the sentences that templates with a {} make of class names."""
    sentences = [template.replace("{}", name) for name in names for template in templates]
    return encode_texts(clip, sentences).unflatten(0, (len(names), len(templates)))  # [C*S, E] -> [C, S, E]


def ensemble(sentences: torch.Tensor) -> torch.Tensor:
    """Prompt ensembling (CLIP paper, sec. 3.1.4): the mean over the sentences [C, E], normalised again."""
    return model.normalise(sentences.mean(dim=1))


def hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] bool: the label [N] of a picture scores highest in its row of [N, C]. A tie is wrong."""
    return (scores >= scores.gather(1, labels[:, None]) - TIE).sum(dim=1) == 1


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * hits(scores, labels).float().mean().item()


def zero_shot(clip, names: list[str], get_image, labels: torch.Tensor, templates: list[str]) -> dict:
    """The accuracy, in percent, on the pictures get_image(0) ... get_image(N - 1) with labels [N]: with all
    templates, with the first alone, and by class. Beside it stand the sizes and what guessing gives."""
    image_features = encode_images(clip, get_image, len(labels))  # [N, E]
    sentences = sentence_features(clip, names, templates)  # [C, S, E]
    scores = image_features @ ensemble(sentences).T  # [N, C]
    return {"accuracy": accuracy(scores, labels),
            "accuracy_single_template": accuracy(image_features @ sentences[:, 0].T, labels),
            "metric": "accuracy", "classes": len(names), "images": len(labels), "templates": len(templates),
            "chance": 100 / len(names), "by_class": by_class(names, labels, hits(scores, labels))}


# ------------------------------------------------------------------------------------------------------------
# commands


def run_retrieval(args, load) -> tuple[dict, str]:
    pairs = open_pairs(args.data, args.split)
    print(f"{args.data} {args.split}: {pairs.image_count:,} images, {len(pairs.texts):,} texts")
    result = retrieval(load(), pairs, args.context_length)
    for way in ("text_to_image", "image_to_text"):
        print(f"{way.replace('_', ' ')}: " + ", ".join(f"{k} {v:.1f}" for k, v in result[way].items()))
    return result, FAILURES.format(args.typed)


def run_zeroshot(args, load) -> tuple[dict, str]:
    classes, paths, labels = open_classes(args.data, args.labels, args.names)
    templates = templates_for(classes, args.templates)
    if labels.ndim == 2:
        raise DataError(f"{args.data}: there is no accuracy for pictures of several classes, but "
                        f"`python -m tools.measure {args.typed}` measures {classes.metric}")
    result = zero_shot(load(), classes.chinese, lambda row: open_image(paths[row]), labels, templates)
    print("{accuracy:.1f} % of {images:,} images in {classes} classes with {templates} templates, "
          "{accuracy_single_template:.1f} % with the first alone, {chance:.1f} % by chance".format(**result))
    print(*class_lines(result["by_class"]), sep="\n")
    other = f"this set's own measure is {classes.metric}; " if classes.metric != "accuracy" else ""
    return result, other + FAILURES.format(args.typed)


def command_flags(data: str) -> Flags:
    """The flags that all commands share, and those for `data`: "pairs", "classes" or none."""
    flags = Flags(add_help=False)
    add = flags.add_argument
    add("--model", required=True, help="a weights file, or one of " + ", ".join(model.available_models()))
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights (default: float32)")
    add("--out", default="", metavar="FILE", help="also write the result to this JSON file")
    if data == "pairs":
        add("--data", required=True, help="what train.py --data takes, such as a folder of pairs")
        add("--split", default="valid", help="train, valid (default) or test")
        add("--context-length", type=int, default=52, help="tokens of a caption (default: 52)")
    elif data == "classes":
        add("--data", required=True, help="a folder with a folder of pictures for each class, or test.txt")
        add("--labels", default="", help="names: a file or one of labels/ (default: label_cn.txt in --data)")
        add("--names", default="ours", choices=NAMES, help="of labels/: ours (default), as people write them "
            "even with [UNK] in them (usual), or instead those of the set's own label_cn.txt (theirs)")
        add("--templates", default="", metavar="FILE", help="sentences to use, with {} for the class name")
    return flags


def run_command(parser, args, run, load=model.load):
    """Call run(args, load) -> (result, what to do next), and write the result to --out. A run opens its data
    before it calls load(), which fetches the model: a fault in the data need not wait for that."""
    for flag in ("out", "page", "predictions", "submission"):  # before anything is computed
        if os.path.isdir(path := getattr(args, flag, "")):
            parser.error(f"--{flag}: {path} is a folder; expected the name of a file")
    if not 2 <= getattr(args, "context_length", 2) <= 512:
        parser.error(f"--context-length {args.context_length}: expected 2 to 512")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    device = join_processes(args.device)
    with contextlib.redirect_stdout(sys.stdout if rank() == 0 else None):
        result, then = run(args, lambda: load(args.model, device, dtype=args.dtype)[0])
        if result and args.out and rank() == 0:
            write_json(args.out, vars(args) | {"device": device.type} | result)
            print(f"The result is in {args.out}")
        if then:
            print(then)
    leave_processes()


def main(argv: list[str] | None = None):
    parser = Flags("python eval.py", description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="task", required=True, metavar="COMMAND")
    commands.add_parser("retrieval", parents=[command_flags("pairs")], help="Recall@K in both directions")
    commands.add_parser("zeroshot", parents=[command_flags("classes")], help="accuracy by names of classes")
    args = parser.parse_args(argv)
    args.typed = shlex.join(sys.argv[1:] if argv is None else argv)
    run_command(parser, args, {"retrieval": run_retrieval, "zeroshot": run_zeroshot}[args.task])


if __name__ == "__main__":
    with one_line_errors():
        main()
