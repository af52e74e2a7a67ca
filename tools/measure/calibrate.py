"""
What a cosine is worth: which threshold gives the precision that one wants, on one's own data.

Measured on all texts times all pictures of a split: the pairs that the data name are right, all others wrong
(those that nobody named but that fit as well count as wrong, so the truth is a little better).
"""

import torch

from tools.measure.metrics import BINS, right_and_wrong, shares, threshold_for

WHY = """\
Why cosines sit near 0.3 to 0.6 and not at 1: the loss sees a cosine only in comparison with the others of its
batch, times a temperature of up to 100, so a lead of 0.1 over the wrong pictures is a factor of e^10 and
nothing is to be gained by more. Pictures and texts stay in two separate regions of the space. So a cosine
orders answers to one query; what it is worth in itself must be looked up, for one model and one kind of data.
"""
STEP = 0.05  # of the reliability table


def calibrate(
    text_features: torch.Tensor, image_features: torch.Tensor, positives: torch.Tensor, precision: float,
    prior: float = 0.5,
) -> dict:
    """Unit features [N_text, E], [N_image, E], positives [P, 2] -> the lowest cosine from which on
    `precision` (0 to 1) of the pairs are right, what share of the right ones it keeps ("recall"), and a table
    of what each cosine is worth. prior: the share of right pairs among those one will meet, 0 for that of the
    split."""
    right, wrong = right_and_wrong(text_features, image_features, positives)
    prior = prior or (right.sum() / (right.sum() + wrong.sum())).item()
    found = threshold_for(right, wrong, precision, prior)
    result = {"wanted_precision": precision, "prior": prior, "right_pairs": int(right.sum()),
              "wrong_pairs": int(wrong.sum()), "median_right": median(right), "median_wrong": median(wrong),
              "threshold": None, "precision": None, "recall": None}
    if found:
        result |= dict(zip(("threshold", "precision", "recall"), found))
    return result | {"reliability": reliability(right, wrong, prior)}


def at_threshold(
    text_features: torch.Tensor, image_features: torch.Tensor, positives: torch.Tensor, threshold: float,
    prior: float,
) -> dict[str, float]:
    """Precision and recall, 0 to 1, of a threshold on other pairs than it was chosen on."""
    first = round((threshold + 1) * BINS / 2)
    right, wrong = shares(*right_and_wrong(text_features, image_features, positives), prior)
    kept, taken = right[first:].sum(), (right + wrong)[first:].sum()
    return {"precision": (kept / taken).item() if taken else 0.0, "recall": (kept / right.sum()).item()}


def median(counts: torch.Tensor) -> float:
    """Of cosines counted in bins [BINS], to 0.001."""
    return 2 * int((counts.cumsum(0) >= counts.sum() / 2).nonzero()[0]) / BINS - 1


def reliability(right: torch.Tensor, wrong: torch.Tensor, prior: float) -> list[dict]:
    """Counts [BINS] -> a row for each STEP of cosine that any pair has: from, to, pairs, how often right."""
    per_step = round(STEP * BINS / 2)
    columns = [counts.unflatten(0, (-1, per_step)).sum(dim=1) for counts in (right, wrong)]
    weights = [part.unflatten(0, (-1, per_step)).sum(dim=1) for part in shares(right, wrong, prior)]
    return [{"from": round(-1 + k * STEP, 2), "to": round(-1 + (k + 1) * STEP, 2), "right": int(r),
             "wrong": int(w), "share_right": (a / (a + b)).item()}
            for k, (r, w, a, b) in enumerate(zip(*columns, *weights)) if r + w]


def calibration_table(result: dict) -> str:
    """A result of `calibrate` as lines of text."""
    lines = [f"{result['right_pairs']:,} right pairs (median cosine {result['median_right']:.2f}) against "
             f"{result['wrong_pairs']:,} wrong ones ({result['median_wrong']:.2f}); of the pairs to judge, "
             f"{100 * result['prior']:.2g} % right",
             "", "cosine             right        wrong  how often right"]
    for row in result["reliability"]:
        lines.append(f"{row['from']:5.2f} to {row['to']:5.2f} {row['right']:>10,} {row['wrong']:>12,} "
                     f"{100 * row['share_right']:9.1f} %")
    wanted = 100 * result["wanted_precision"]
    lines.append("")
    if result["threshold"] is None:
        lines.append(f"no cosine gives a precision of {wanted:g} % here; ask for less, or judge likelier "
                     "pairs (--prior)")
    else:
        lines.append(f"from {result['threshold']:.3f} on {100 * result['precision']:.1f} % of the pairs are "
                     f"right ({wanted:g} wanted); it keeps {100 * result['recall']:.1f} % of the right ones")
    return "\n".join(lines)
