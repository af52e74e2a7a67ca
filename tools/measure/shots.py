"""
Few shots: what some labelled pictures of each class add to zero-shot classification, without training.

Gaussian discriminant analysis sees the features of a class as a Gaussian around the class's mean, with one
covariance for all classes. It has a closed form, and Wang et al. ("A Hard-to-Beat Baseline for Training-free
CLIP-based Adaptation", ICLR 2024) add its scores to those of the class names.

Shapes: n shots, N pictures, C classes, E joint width.
"""

import os
import random

import torch

from eval import hits
from sources.classes import Classes, open_classes
from sources.pairs import DataError, open_image

WEIGHTS = (0, 0.1, 0.3, 1, 3, 10, 30)  # of the shots' scores, for the held-out shots to choose from


def open_shots(folder: str, labels: str, classes: Classes, taken: list[str], per_class: int, seed: int):
    """-> (get_image, class numbers [n] in ascending order): of each class `per_class` pictures, which `seed`
    picks, or all if that is 0. DataError if a class has too few, or a picture is one of those `taken`."""
    if classes.metric == "map-11":
        raise DataError(f"{folder}: shots need one class each, but {labels} has pictures of several")
    own, paths, numbers = open_classes(folder, labels)
    rows_of = {name: [] for name in own.chinese}
    for row, number in enumerate(numbers.tolist()):
        rows_of[own.chinese[number]].append(row)
    picked, shown, rng = [], [], random.Random(seed)
    for number, name in enumerate(classes.chinese):
        rows = rows_of.get(name, [])
        if len(rows) < max(1, per_class):
            raise DataError(f"{folder}: {len(rows)} pictures of the class {name}, expected at least "
                            f"{max(1, per_class)}; every class needs its shots")
        picked += rng.sample(rows, per_class or len(rows))
        shown += [number] * (per_class or len(rows))
    if twice := {os.path.realpath(paths[row]) for row in picked} & set(map(os.path.realpath, taken)):
        raise DataError(f"{min(twice)}: in --shots and in --data; what is measured must be other pictures")
    return lambda row: open_image(paths[picked[row]]), torch.tensor(shown)


def discriminant(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, C] and biases [C], in float64, that score x by x . P m - m . P m / 2 for each class mean m:
    the logarithm of its Gaussian at x, less what all classes share. Classes count as equally likely.

    features [n, E] are those of the shots, with labels [n] from 0 to C - 1. S is the covariance around the
    class means, v = tr(S) / E the mean variance, and P = (I + (n - 1) / E * S / v)^-1. That is v times the
    paper's estimate of S^-1, E * ((n - 1) S + tr(S) I)^-1 (Kubokawa and Srivastava, 2008), which shrinks S by
    E / (E + n - 1) towards v I. The factor keeps the scores in the unit of a cosine. With one shot of each
    class S is 0, so P is I, and the nearest mean scores highest."""
    features, (n, E) = features.double(), features.shape
    means = torch.stack([features[labels == c].mean(dim=0) for c in labels.unique()])  # [C, E]
    apart = features - means[labels]  # [n, E]
    covariance = apart.T @ apart / n
    variance = (covariance.trace() / E).clamp(min=1e-12)  # equal shots of a class differ by rounding alone
    eye = torch.eye(E, dtype=features.dtype)
    weights = torch.linalg.solve(eye + (n - 1) / E * covariance / variance, means.T)
    return weights, -(means.T * weights).sum(dim=0) / 2


def few_shots(images, class_features, shots, labels) -> tuple[torch.Tensor, float]:
    """Scores [N, C] of pictures, their cosines with the classes' sentences plus `weight` times their scores by
    `discriminant`; and that weight. All features have unit length: images [N, E], class_features [C, E], and
    shots [n, E] with labels [n] in ascending order. Two halves of the shots are each judged with the other
    half fitted, and the weight is the one of WEIGHTS that gets most of them right, the smallest of several.
    If a class has a single shot, none can be held out, and the weight is 1."""
    def parts(of, fitted) -> tuple[torch.Tensor, torch.Tensor]:
        weights, biases = discriminant(shots[fitted], labels[fitted])
        return of.double() @ class_features.double().T, of.double() @ weights + biases

    counts = labels.bincount()
    fold = torch.cat([torch.arange(count) % 2 for count in counts.tolist()])  # [n]
    weight = 1
    if counts.min() > 1:
        judged = [(*parts(shots[fold == f], fold != f), labels[fold == f]) for f in (0, 1)]
        weight = max(WEIGHTS, key=lambda w: sum(
            hits(cosines + w * scores, answers).sum().item() for cosines, scores, answers in judged))
    cosines, scores = parts(images, slice(None))
    return cosines + weight * scores, weight
