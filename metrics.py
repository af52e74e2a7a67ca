"""
The measures, as formulas: tensors in, percentages out. Nothing here knows a model or a file.

Retrieval: recall_at_k (paper, sec. 3.1). Classification, by data set (Table 11): accuracy, mean_per_class,
roc_auc, map_11. Scores one can use: right_and_wrong, threshold_for.

Shapes: Q queries, G gallery items, N pictures, C classes, P positive pairs, E joint width. Features have unit
length, so that a product of two is a cosine.
"""

import torch

from pairs import DataError

KS = (1, 5, 10)
TIE = 1e-6  # cosines closer than this are equal: float32 sums differ by some 1e-7 with the shape of a product
BINS = 2000  # of cosines from -1 to 1, each 0.001 wide
ENOUGH = 30  # pairs above a threshold, or its precision is chance: the highest cosine alone is often right


# ------------------------------------------------------------------------------------------------------------
# retrieval


def recall_at_k(
    queries: torch.Tensor, gallery: torch.Tensor, positives: torch.Tensor, tile: int = 1024
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of queries, in percent, with at least one right answer among their K nearest, and the mean over K
    = 1, 5, 10: for queries among the gallery, and for the gallery's items, as queries, among the queries.

    queries [Q, E] and gallery [G, E] of unit norm; positives [P, 2], rows (query, gallery item) that belong
    together. The rank of a query is the number of wrong answers that score at least as high as its best right
    one: a tie counts against us, so collapsed features score nothing. Queries without any right answer are
    left out. Holds tile x tile scores at a time, and computes each of them once for both directions."""
    if not len(positives):
        raise DataError("no query has a right answer, so recall is not defined")
    best_of_query, best_of_item = best_right(queries, gallery, positives)  # [Q], [G]
    query_ranks, item_ranks = (torch.zeros(len(side), dtype=torch.long) for side in (queries, gallery))
    for rows, columns, scores, right in score_tiles(queries, gallery, positives, tile):
        scores[right] = -torch.inf  # right answers do not compete with each other
        query_ranks[rows] += (scores >= best_of_query[rows, None] - TIE).sum(dim=1)
        item_ranks[columns] += (scores >= best_of_item[columns] - TIE).sum(dim=0)
    return recall(query_ranks[positives[:, 0].unique()]), recall(item_ranks[positives[:, 1].unique()])


def recall(ranks: torch.Tensor) -> dict[str, float]:
    """Ranks [Q], counted from 0 -> {"R@1", "R@5", "R@10", "mean"} in percent."""
    found = {f"R@{k}": 100 * (ranks < k).sum().item() / len(ranks) for k in KS}
    return found | {"mean": sum(found.values()) / len(KS)}


def best_right(queries, gallery, positives) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the score of the best right answer of every query [Q] and of every gallery item [G], -inf without
    one."""
    best = [torch.full((len(x),), -torch.inf, dtype=torch.float32) for x in (queries, gallery)]
    for some in positives.split(1 << 16):
        scores = (queries[some[:, 0]] * gallery[some[:, 1]]).sum(dim=1).float()  # [some]
        for side, scored in enumerate(best):
            scored.scatter_reduce_(0, some[:, side], scores, "amax")
    return best


def score_tiles(queries, gallery, positives, tile: int):
    """The score matrix [Q, G] tile by tile. Yields (rows, columns: slices; scores [tile, tile]; right: the
    positives in it, as an index into the tile)."""
    across = -(-len(gallery) // tile)
    tile_of = positives[:, 0] // tile * across + positives[:, 1] // tile  # [P], number of the tile
    tile_of, order = tile_of.sort()
    places = (positives % tile)[order]  # [P, 2], row and column in the tile
    ends = torch.searchsorted(tile_of, torch.arange(-(-len(queries) // tile) * across + 1)).tolist()
    for number, (start, end) in enumerate(zip(ends, ends[1:])):
        rows, columns = (slice(k * tile, (k + 1) * tile) for k in divmod(number, across))
        scores = (queries[rows] @ gallery[columns].T).float()
        yield rows, columns, scores, tuple(places[start:end].T)


def nearest(queries: torch.Tensor, gallery: torch.Tensor, k: int, tile: int = 1024) -> torch.LongTensor:
    """The k nearest gallery items [Q, k] of each query, best first. Holds tile x 16 tile scores at a time."""
    found = []
    for some in queries.split(tile):
        scores, items = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long)
        for start in range(0, len(gallery), 16 * tile):
            more = (some @ gallery[start : start + 16 * tile].T).float().topk(min(k, len(gallery) - start))
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
    queries: torch.Tensor, gallery: torch.Tensor, positives: torch.Tensor, tile: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all pairs of queries [Q, E] and gallery items [G, E], counted in bins of 0.001 from -1 to 1
    -> (of the positives [BINS], of all others [BINS])."""
    right, wrong = torch.zeros(BINS, dtype=torch.long), torch.zeros(BINS, dtype=torch.long)
    for _, _, scores, own in score_tiles(queries, gallery, positives.unique(dim=0), tile):
        bins = ((scores + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        mine = bins[own].bincount(minlength=BINS)
        right += mine
        wrong += bins.flatten().bincount(minlength=BINS) - mine
    return right, wrong


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
    reached = torch.where(right > 0, right / (right + wrong), 0)
    enough = ((reached >= precision) & (counted >= ENOUGH)).nonzero().flatten().tolist()
    if not enough:
        return None
    first = enough[0]
    return 2 * first / BINS - 1, reached[first].item(), (right[first] / right[0]).item()
