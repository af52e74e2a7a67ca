"""
The measures, as formulas: tensors in, percentages out. Nothing here knows a model or a file. What is measured
on all pairs of two sides runs where its features are and is shared by the processes that torchrun started:
all of them must ask, with the same features.

Retrieval: recall_at_k (paper, sec. 3.1). Classification, by data set (Table 11): accuracy, mean_per_class,
roc_auc, map_11. Scores one can use: right_and_wrong, threshold_for.

Shapes: Q queries, G gallery items, N pictures, C classes, P positive pairs, E joint width. Features have unit
length, so that a product of two is a cosine.
"""

import torch
from tqdm import tqdm

from common import rank, sum_over_ranks, world_size
from sources.pairs import DataError

KS = (1, 5, 10)
TILE = 1024  # rows and columns of a tile of scores: 4 MB, which a core's cache holds
TIE = 1e-6  # cosines closer than this are equal: float32 sums differ by some 1e-7 with the shape of a product
BINS = 2000  # of cosines from -1 to 1, each 0.001 wide
ENOUGH = 30  # pairs above a threshold, or its precision is chance: the highest cosine alone is often right


# ------------------------------------------------------------------------------------------------------------
# retrieval


def recall_at_k(
    queries: torch.Tensor, gallery: torch.Tensor, positives: torch.Tensor, tile: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of queries, in percent, with at least one right answer among their K nearest, and the mean over K
    = 1, 5, 10: for queries among the gallery, and for the gallery's items, as queries, among the queries.
    Arguments as of `ranks`; queries without any right answer are left out."""
    query_ranks, item_ranks = ranks(queries, gallery, positives, tile)
    return recall(query_ranks), recall(item_ranks)


def recall(ranks: torch.Tensor) -> dict[str, float]:
    """Ranks [Q] as `ranks` counts them -> {"R@1", "R@5", "R@10", "mean"} in percent."""
    ranks = ranks[ranks >= 0]
    found = {f"R@{k}": 100 * (ranks < k).sum().item() / len(ranks) for k in KS}
    return found | {"mean": sum(found.values()) / len(KS)}


def ranks(
    queries: torch.Tensor, gallery: torch.Tensor, positives: torch.Tensor, tile: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of every query's best right answer [Q], and of every gallery item's [G] when it is the query:
    the number of wrong answers that score at least as high, so 0 is best, and -1 where nothing is right. A
    tie counts against us, so collapsed features score nothing.

    queries [Q, E] and gallery [G, E] of unit norm; positives [P, 2], rows (query, gallery item) that belong
    together. Holds tile x tile scores at a time (tile 0: TILE, on a GPU 16 of them), and computes each of
    them once for both directions."""
    tile = tile or (TILE if queries.device.type == "cpu" else 16 * TILE)
    if not len(positives):
        raise DataError("no query has a right answer, so recall is not defined")
    bars = [best - TIE for best in best_right(queries, gallery, positives)]  # [Q], [G]
    found = [torch.zeros_like(bar) for bar in bars]
    for rows, columns, scores, right in score_tiles(queries, gallery, positives, tile):
        scores[right] = -torch.inf  # right answers do not compete with each other
        found[0][rows] += reached(scores, bars[0][rows, None]).sum(dim=1)
        found[1][columns] += reached(scores, bars[1][columns]).sum(dim=0)
    return tuple(torch.where(bar > -torch.inf, sum_over_ranks(count), -1).long()
                 for bar, count in zip(bars, found))


def reached(scores: torch.Tensor, bar: torch.Tensor) -> torch.Tensor:
    """scores >= bar as 0. and 1., whose sums are several times as fast as those of bools, and exact below
    2^24: a rank beyond that is no less hopeless."""
    return torch.ge(scores, bar, out=torch.empty_like(scores))


def best_right(queries, gallery, positives) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the score of the best right answer of every query [Q] and of every gallery item [G], -inf without
    one."""
    best = [torch.full((len(side),), -torch.inf, dtype=torch.float32, device=side.device)
            for side in (queries, gallery)]
    for some in positives.split(1 << 14):
        scores = (queries[some[:, 0]] * gallery[some[:, 1]]).sum(dim=1).float()  # [some]
        for column, best_of in enumerate(best):
            best_of.scatter_reduce_(0, some[:, column], scores, "amax")
    return best


def score_tiles(queries, gallery, positives, tile: int):
    """The score matrix [Q, G] tile by tile, of many processes every one its share. Yields (rows, columns:
    slices; scores [tile, tile]; right: the positives in it, as an index into the tile). A bar appears when it
    takes longer than two seconds."""
    across = -(-len(gallery) // tile)
    tile_of = positives[:, 0] // tile * across + positives[:, 1] // tile  # [P], number of the tile
    tile_of, order = tile_of.sort()
    places = (positives % tile)[order]  # [P, 2], row and column in the tile
    numbers = torch.arange(-(-len(queries) // tile) * across + 1, device=tile_of.device)
    ends = torch.searchsorted(tile_of, numbers).tolist()
    mine = list(enumerate(zip(ends, ends[1:])))[rank() :: world_size()]
    for number, (start, end) in tqdm(mine, "comparing", delay=2, leave=False, unit=" tiles",
                                     disable=None if rank() == 0 else True):
        rows, columns = (slice(k * tile, (k + 1) * tile) for k in divmod(number, across))
        yield rows, columns, cosines(queries[rows], gallery[columns]), tuple(places[start:end].T)


def cosines(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """[q, E] and [g, E] -> [q, g], to the digits that TIE needs: TF32, to which train.py lets a GPU round the
    products of its loss, moves a cosine by 1e-3, and some of equal features would be ahead of others."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return (queries @ gallery.T).float()
    finally:
        torch.set_float32_matmul_precision(allowed)


def nearest(queries: torch.Tensor, gallery: torch.Tensor, k: int, tile: int = TILE) -> torch.LongTensor:
    """The k nearest gallery items [Q, k] of each query, best first. Holds tile x 16 tile scores at a time."""
    found = []
    for some in queries.split(tile):
        scores, items = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long)
        for start in range(0, len(gallery), 16 * tile):
            more = cosines(some, gallery[start : start + 16 * tile]).topk(min(k, len(gallery) - start))
            scores, items = torch.cat([scores, more[0]], 1), torch.cat([items, more[1] + start], 1)
            scores, places = scores.topk(min(k, scores.shape[1]))
            items = items.gather(1, places)
        found.append(items)
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------------------
# classification


def hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Scores [N, C] and labels [N] -> [N] bool: the label alone scores highest; a tie with another class is
    wrong."""
    own = scores.gather(1, labels[:, None])
    return (scores >= own - TIE).sum(dim=1) == 1


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures, in percent, whose best class is their label. Scores [N, C], labels [N]."""
    return 100 * hits(scores, labels).float().mean().item()


def mean_per_class(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of the classes' accuracies, in percent, which gives a rare class the weight of a common one.
    Classes without pictures have none and are left out."""
    counts = labels.bincount(minlength=scores.shape[1])
    right = labels[hits(scores, labels)].bincount(minlength=scores.shape[1])
    return 100 * (right[counts > 0] / counts[counts > 0]).mean().item()


def roc_auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve, in percent: how often a picture of class 1 scores higher than one of class 0,
    a tie counting half. Scores [N] (of class 1), labels [N] of 0 and 1. It is the rank sum of Mann and
    Whitney, in N log N."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise DataError("one of the two classes has no pictures, so the area under the curve is not defined")
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)  # place: the distinct score's
    middle = counts.cumsum(0) - (counts - 1) / 2  # [distinct], mean rank, from 1, of those that share it
    rank_sum = middle.double()[place][labels.bool()].sum().item()
    return 100 * (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def map_11(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes of VOC-2007's average precision, in percent: for recall of at least 0, 0.1 ... 1
    the best precision there is, averaged over these 11. Scores [N, C], labels [N, C] of 0 and 1, several 1 in
    a row allowed; pictures with the same score come together. A class that no picture shows is left out.

    ELEVATER's toolkit takes the precision at recall 0 for 1 whatever the scores, so its figure may be up to
    9 points higher for a useless model, and equals this one where each class's first picture is right."""
    labels = labels.bool()
    shown = labels.any(dim=0).nonzero().flatten().tolist()
    if not shown:
        raise DataError("no picture shows any class, so average precision is not defined")
    return 100 * sum(average_precision_11(scores[:, c], labels[:, c]) for c in shown) / len(shown)


def average_precision_11(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """One class of map_11, 0 to 1. Scores [N], labels [N]."""
    scores, order = scores.sort(descending=True)
    found = labels[order].cumsum(0)  # [N], right ones among the first n
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # thresholds lie between scores
    found, taken = found[last], torch.arange(1, len(scores) + 1)[last]
    precision = found.double() / taken
    # in whole numbers: 0.3 * 10 is not 3
    return sum(precision[10 * found >= t * found[-1]].max().item() for t in range(11)) / 11


# ------------------------------------------------------------------------------------------------------------
# scores one can use


def right_and_wrong(
    queries: torch.Tensor, gallery: torch.Tensor, positives: torch.Tensor, tile: int = TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all pairs of queries [Q, E] and gallery items [G, E], counted in bins of 0.001 from -1 to 1
    -> (of the positives [BINS], of all others [BINS])."""
    right, wrong = (torch.zeros(BINS, dtype=torch.long, device=queries.device) for _ in range(2))
    for _, _, scores, own in score_tiles(queries, gallery, positives.unique(dim=0), tile):
        bins = ((scores + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        mine = bins[own].bincount(minlength=BINS)
        right += mine
        wrong += bins.flatten().bincount(minlength=BINS) - mine
    return sum_over_ranks(right), sum_over_ranks(wrong)


def shares(right: torch.Tensor, wrong: torch.Tensor, prior: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [BINS] of right and wrong pairs -> their weights if a share `prior` (0 to 1) of all pairs that
    one meets is right, whatever it is in the sample."""
    return prior * right.double() / right.sum(), (1 - prior) * wrong.double() / wrong.sum()


def threshold_for(
    right: torch.Tensor, wrong: torch.Tensor, precision: float, prior: float
) -> tuple[float, float, float] | None:
    """Counts [BINS] of right and wrong pairs -> (the lowest cosine from which on at least `precision`, 0 to
    1, of the pairs are right; that precision; the share of the right pairs that it keeps), or None.
    Thresholds with fewer than ENOUGH pairs above them do not count."""
    counted = (right + wrong).flip(0).cumsum(0).flip(0)  # from here on upwards, as all below
    right, wrong = (weights.flip(0).cumsum(0).flip(0) for weights in shares(right, wrong, prior))
    precisions = torch.where(right > 0, right / (right + wrong), 0)
    enough = ((precisions >= precision) & (counted >= ENOUGH)).nonzero().flatten().tolist()
    if not enough:
        return None
    first = enough[0]
    return 2 * first / BINS - 1, precisions[first].item(), (right[first] / right[0]).item()
