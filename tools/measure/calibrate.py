"""
What is a cosine worth? The threshold that gives a wanted precision, on one's own data.

All texts of a split meet all its pictures. Pairs that the data name are right, all others count as wrong,
even if they fit, so the true precision is a little better than the measured one.
"""

import torch

from tools.measure.metrics import BINS, right_and_wrong, shares, threshold_for

WHY = """\
Why cosines lie near 0.3 to 0.6 and not at 1: the loss compares a cosine only with the others of its batch,
and multiplies it by up to 100. A lead of 0.1 over the wrong pictures is then a factor of e^10, and more gains
nothing. Pictures and texts also stay in two separate regions of the space. A cosine therefore orders the
answers to one query, but its own worth must be measured, for one model and one kind of data.
"""
STEP = 0.05  # of cosine, between two rows of the table


def calibrate(
    text_features: torch.Tensor, image_features: torch.Tensor, positives: torch.Tensor, precision: float,
    prior: float = 0.5,
) -> dict:
    """The lowest cosine at and above which `precision` (0 to 1) of the pairs are right, the share of right
    pairs that it keeps ("recall"), and how often each cosine is right. Unit features [N_text, E] and
    [N_image, E], positives [P, 2]. prior: the share of right pairs among those one will meet; 0 means that
    of the split."""
    right, wrong = right_and_wrong(text_features, image_features, positives)
    prior = prior or (right.sum() / (right.sum() + wrong.sum())).item()
    found = threshold_for(right, wrong, precision, prior) or (None, None, None)
    return {"wanted_precision": precision, "prior": prior, "right_pairs": int(right.sum()),
            "wrong_pairs": int(wrong.sum()), "median_right": median(right), "median_wrong": median(wrong),
            "threshold": found[0], "precision": found[1], "recall": found[2],
            "reliability": reliability(right, wrong, prior)}


def at_threshold(text_features, image_features, positives, threshold: float, prior: float) -> dict:
    """The precision and recall, 0 to 1, of a threshold on other pairs than those it was chosen on."""
    first = round((threshold + 1) * BINS / 2)
    right, wrong = shares(*right_and_wrong(text_features, image_features, positives), prior)
    kept, taken = right[first:].sum(), (right + wrong)[first:].sum()
    return {"precision": (kept / taken).item() if taken else 0.0, "recall": (kept / right.sum()).item()}


def median(counts: torch.Tensor) -> float:
    """The median of cosines counted in bins [BINS], to 0.001."""
    return 2 * int((counts.cumsum(0) >= counts.sum() / 2).nonzero()[0]) / BINS - 1


def reliability(right: torch.Tensor, wrong: torch.Tensor, prior: float) -> list[dict]:
    """How often pairs are right, for each STEP of cosine that occurs. right, wrong: counts [BINS]."""
    steps = [counts.unflatten(0, (-1, round(STEP * BINS / 2))).sum(dim=1)  # [BINS] -> [steps]
             for counts in (right, wrong, *shares(right, wrong, prior))]
    return [{"from": round(-1 + k * STEP, 2), "to": round(-1 + (k + 1) * STEP, 2), "right": int(r),
             "wrong": int(w), "share_right": (a / (a + b)).item()}
            for k, (r, w, a, b) in enumerate(zip(*steps)) if r + w]


def calibration_table(result: dict) -> str:
    """A result of `calibrate` as lines of text."""
    lines = ["{right_pairs:,} right pairs (median cosine {median_right:.2f}) against {wrong_pairs:,} wrong "
             "ones ({median_wrong:.2f}); {0:.2g} % of the pairs to judge are right".format(
                 100 * result["prior"], **result),
             "", "cosine             right        wrong  how often right"]
    lines += ["{from:5.2f} to {to:5.2f} {right:>10,} {wrong:>12,} {0:9.1f} %".format(
        100 * row["share_right"], **row) for row in result["reliability"]]
    wanted = 100 * result["wanted_precision"]
    if result["threshold"] is None:
        return "\n".join([*lines, "", f"no cosine gives a precision of {wanted:g} % here; ask for less, or "
                          "judge pairs that are more often right (--prior)"])
    return "\n".join([*lines, "", "from {threshold:.3f} on {0:.1f} % of the pairs are right ({1:g} wanted); "
                      "it keeps {2:.1f} % of the right ones".format(
                          100 * result["precision"], wanted, 100 * result["recall"], **result)])
