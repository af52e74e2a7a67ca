"""
Few shots: what some labelled pictures of each class add to zero-shot classification, without training.

Gaussian discriminant analysis sees the features of a class as a Gaussian around the class's mean, with one
covariance for all classes. It has a closed form, and Wang et al. ("A Hard-to-Beat Baseline for Training-free
CLIP-based Adaptation", ICLR 2024) add its scores to those of the class names.

Shapes: n shots, N pictures, C classes, E joint width.
"""

import hashlib
import random

import torch

from eval import hits
from sources.classes import Classes, open_classes
from sources.pairs import DataError, open_image

WEIGHTS = (30, 10, 3, 1, 0.3, 0.1, 0)  # of the shots' scores, for held-out shots to choose from
LONE_WEIGHT = 0.1  # where none can be held out; larger ones did harm (docs/measuring.md)


def open_shots(folder: str, labels: str, classes: Classes, taken: list[str], per_class: int, seed: int):
    """-> (get_image, class numbers [n] in ascending order): of each class `per_class` pictures, which `seed`
    picks, or all if that is 0. DataError if a class has too few, or a picture is one of those `taken`."""
    if classes.metric == "map-11":
        raise DataError(f"{folder}: shots need one class each, but {labels} has pictures of several")
    own, paths, numbers = open_classes(folder, labels)
    if len(set(classes.usual)) < len(classes.usual):
        raise DataError(f"{folder}: shots are matched by names of classes, and two classes have the same one")
    rows_of = {name: [] for name in own.usual}
    for row, number in enumerate(numbers.tolist()):
        rows_of[own.usual[number]].append(row)
    picked, shown, rng = [], [], random.Random(seed)
    for number, name in enumerate(classes.usual):
        rows = rows_of.get(name, [])
        if len(rows) < max(1, per_class):
            raise DataError(f"{folder}: {len(rows)} pictures of the class {name}, expected at least "
                            f"{max(1, per_class)}; every class needs its shots")
        picked += rng.sample(rows, per_class or len(rows))
        shown += [number] * (per_class or len(rows))
    known = {content_of(paths[row]): paths[row] for row in picked}
    if twice := [known[content] for content in map(content_of, taken) if content in known]:
        raise DataError(f"{twice[0]}: in --shots and in --data; what is measured must be other pictures")
    return lambda row: open_image(paths[picked[row]]), torch.tensor(shown)


def content_of(path: str) -> bytes:
    """A digest of a file, for a picture may be there twice under two names."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).digest()


def discriminant(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, C] and biases [C], in float64, that score x by x . P m - m . P m / 2 for each class mean m:
    the logarithm of its Gaussian at x, less what all classes share. Classes count as equally likely.

    features [n, E] are those of the shots, with labels [n] from 0 to C - 1. S is the covariance around the
    class means, v = tr(S) / E the mean variance, s = E / (E + n - 1), and P = ((1 - s) S / v + s I)^-1. It is
    the paper's estimate of S^-1, E * ((n - 1) S + tr(S) I)^-1 (Kubokawa and Srivastava, 2008), but for a
    factor that makes scores comparable with cosines. With one shot of each class S is 0 and P a multiple of
    I, so the nearest mean scores highest."""
    features, (n, E) = features.double(), features.shape
    means = torch.stack([features[labels == c].mean(dim=0) for c in labels.unique()])  # [C, E]
    apart = features - means[labels]  # [n, E]
    covariance = apart.T @ apart / n
    variance = (covariance.trace() / E).clamp(min=1e-12)  # equal shots of a class differ by rounding alone
    shrinkage = E / (E + n - 1)
    shrunk = (1 - shrinkage) * covariance / variance + shrinkage * torch.eye(E, dtype=features.dtype)
    weights = torch.linalg.solve(shrunk, means.T)
    return weights, -(means.T * weights).sum(dim=0) / 2


def few_shots(images, class_features, shots, labels) -> tuple[torch.Tensor, float]:
    """Scores [N, C] of pictures, their cosines with the classes' sentences plus `weight` times their scores
    by `discriminant`; and that weight. All features have unit length: images [N, E], class_features [C, E],
    shots [n, E] with labels [n] in ascending order. The weight is the one of WEIGHTS that gets most shots
    right when a quarter of them at a time (of very few, a third or half) is judged by the rest; the largest
    of several, because all shots together are worth more. If a class has a single shot, none can be held
    out, and the weight is LONE_WEIGHT."""
    def parts(of, fitted) -> tuple[torch.Tensor, torch.Tensor]:
        weights, biases = discriminant(shots[fitted], labels[fitted])
        return of.double() @ class_features.double().T, of.double() @ weights + biases

    counts, weight = labels.bincount(), LONE_WEIGHT
    if (folds := min(4, counts.min().item())) > 1:
        fold = torch.cat([torch.arange(count) % folds for count in counts.tolist()])  # [n]
        judged = [(*parts(shots[fold == f], fold != f), labels[fold == f]) for f in range(folds)]
        weight = max(WEIGHTS, key=lambda w: sum(
            hits(cosines + w * scores, answers).sum().item() for cosines, scores, answers in judged))
    cosines, scores = parts(images, slice(None))
    return cosines + weight * scores, weight
