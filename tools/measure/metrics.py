"""
The rarer measures as formulas: predictions, measures of classification (Table 11, in percent), and the cosine
above which enough pairs are right. Recall and accuracy are in eval.py.

Shapes: Q queries, G gallery items, P positive pairs, N pictures, C classes, E joint width. Features have unit
length, so the product of two is their cosine.
"""

import torch

from common import rank, sum_over_ranks, world_size
from eval import TILE, cosines, hits

BINS = 2000  # bins of cosines from -1 to 1, each 0.001 wide
ENOUGH = 30  # With fewer pairs above a threshold its precision is chance: the highest cosine is often right.


def nearest(queries: torch.Tensor, gallery: torch.Tensor, k: int) -> torch.LongTensor:
    """The k nearest gallery items [Q, k] of each query, best first; all of them if there are fewer than k."""
    rows = max(1, min(TILE, 2**24 // len(gallery)))  # so that at most 64 MB of scores exist at a time
    return torch.cat([cosines(some, gallery).topk(min(k, len(gallery))).indices
                      for some in queries.split(rows)])


def mean_per_class(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of the classes' accuracies: a rare class weighs as much as a common one. Scores [N, C], labels
    [N]. Classes without pictures are left out."""
    counts = labels.bincount(minlength=scores.shape[1])
    right = labels[hits(scores, labels)].bincount(minlength=scores.shape[1])
    return 100 * (right[counts > 0] / counts[counts > 0]).mean().item()


def roc_auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve: how often a picture of class 1 scores higher than one of class 0, where a tie
    counts half. Scores [N] of class 1, labels [N] of 0 and 1. Computed as the rank sum of Mann and Whitney,
    in N log N."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)  # [N], [distinct scores]
    middle = counts.cumsum(0) - (counts - 1) / 2  # the mean rank, from 1, of those that share a score
    rank_sum = middle.double()[place][labels.bool()].sum().item()
    return 100 * (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def map_11(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean over the classes of VOC-2007's average precision: the best precision at a recall of at least
    0, 0.1 ... 1, averaged over these 11. Scores [N, C], labels [N, C] of 0 and 1, each class at least once.

    ELEVATER's toolkit takes the precision at recall 0 to be 1, so its figure is up to 9 points higher for a
    useless model. It equals this one if the first picture of every class is right."""
    parts = [average_precision_11(*columns) for columns in zip(scores.T, labels.T)]
    return 100 * sum(parts) / len(parts)


def average_precision_11(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """One class of map_11, 0 to 1: scores [N], labels [N]. Pictures with the same score come together."""
    scores, order = scores.sort(descending=True)
    found = labels[order].cumsum(0)  # [N], the right ones among the first n
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # thresholds lie between scores
    found, taken = found[last], torch.arange(1, len(scores) + 1)[last]
    precision = found.double() / taken
    # recall >= t / 10 in whole numbers, because 0.3 * 10 is not 3
    return sum(precision[10 * found >= t * found[-1]].max().item() for t in range(11)) / 11


# ------------------------------------------------------------------------------------------------------------
# the worth of a cosine


def calibrate(queries, gallery, positives, precision: float, prior: float = 0.5) -> dict:
    """`threshold_for` unit features [Q, E] and [G, E] with positives [P, 2], and what it was computed from.
    Pairs that are not positives count as wrong, even if they fit, so the true precision is a little better.
    prior: the share of right pairs among those one will meet; 0 means that of the split."""
    right, wrong = right_and_wrong(queries, gallery, positives)
    prior = prior or (right.sum() / (right.sum() + wrong.sum())).item()
    return {"wanted_precision": precision, "prior": prior, "right_pairs": int(right.sum()),
            "wrong_pairs": int(wrong.sum()), **threshold_for(right, wrong, precision, prior)}


def at_threshold(queries, gallery, positives, threshold: float, prior: float) -> dict:
    """The precision and recall, 0 to 1, of a threshold on other pairs than those it was chosen on."""
    _, precisions, recalls = upwards(*right_and_wrong(queries, gallery, positives), prior)
    first = round((threshold + 1) * BINS / 2)
    return {"precision": precisions[first].item(), "recall": recalls[first].item()}


def right_and_wrong(queries, gallery, positives, rows: int = TILE // 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines of all pairs of queries and gallery items, counted in bins: those of the positives [BINS],
    and all others [BINS]. Processes share the work, so all of them must call this."""
    right, wrong = (torch.zeros(BINS, dtype=torch.long, device=queries.device) for _ in range(2))
    positives = positives.unique(dim=0)
    for start in range(0, len(queries), rows)[rank() :: world_size()]:
        bins = ((cosines(queries[start : start + rows], gallery) + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        here, items = positives[(start <= positives[:, 0]) & (positives[:, 0] < start + rows)].T
        mine = bins[here - start, items].bincount(minlength=BINS)
        right += mine
        wrong += bins.flatten().bincount(minlength=BINS) - mine
    return sum_over_ranks(right), sum_over_ranks(wrong)


def threshold_for(right: torch.Tensor, wrong: torch.Tensor, precision: float, prior: float) -> dict:
    """The lowest cosine at and above which at least `precision` (0 to 1) of the pairs are right, that
    precision, and the recall, which is the share of right pairs that it keeps; all None if there is no such
    cosine. right, wrong: counts [BINS]. A threshold with fewer than ENOUGH pairs above it does not count."""
    counted, precisions, recalls = upwards(right, wrong, prior)
    enough = ((precisions >= precision) & (counted >= ENOUGH)).nonzero().flatten().tolist()
    if not enough:
        return {"threshold": None, "precision": None, "recall": None}
    return {"threshold": 2 * enough[0] / BINS - 1, "precision": precisions[enough[0]].item(),
            "recall": recalls[enough[0]].item()}


def upwards(right: torch.Tensor, wrong: torch.Tensor, prior: float) -> tuple[torch.Tensor, ...]:
    """Of the pairs in each bin and all above it: their number, precision and recall [BINS], if a share
    `prior` of the pairs that one will meet is right."""
    weights = prior * right.double() / right.sum(), (1 - prior) * wrong.double() / wrong.sum()
    counted, right, wrong = (x.flip(0).cumsum(0).flip(0) for x in (right + wrong, *weights))
    return counted, torch.where(right > 0, right / (right + wrong), 0), right / right[0]
