"""
More about zero-shot classification than eval.py has (paper, sec. 3.2): every data set's own measure, the file
that ELEVATER's server takes, and what the words of a prompt are worth (sec. 3.2.3).

Shapes: N pictures, C classes, S sentences for each class (one a template), E joint width.
"""

import json
import os

import torch

from eval import accuracy, encode_images, ensemble, hits, sentence_features
from sources import scenes
from sources.classes import Classes, by_class, read_text
from sources.named import OTHERWISE
from sources.pairs import DataError
from tools.measure.metrics import map_11, mean_per_class, roc_auc
from tools.measure.shots import few_shots

ELEVATER = {"country-211": "country211"} | OTHERWISE  # its names for data sets of labels/, where they differ


def own_zero_shot(
        clip, classes: Classes, get_image, labels, templates, shots=None) -> tuple[dict, torch.Tensor]:
    """The data set's own measure with all templates, sizes, accuracy by class; and the cosines [N, C]. With
    shots, which are (get_image, labels [n]), the result also has "few_shots", and the scores are theirs."""
    class_features = ensemble(sentence_features(clip, classes.chinese, templates))  # [C, E]
    images = encode_images(clip, get_image, len(labels))  # [N, E]

    def measured(scores: torch.Tensor) -> dict:
        value = own_measure(classes.metric, scores, labels, clip.logit_scale.exp().item())
        rows = by_class(classes.chinese, labels, hits(scores, labels)) if labels.ndim == 1 else []
        return {classes.metric: value, "by_class": rows}

    scores = images @ class_features.T  # [N, C]
    result = measured(scores) | {"metric": classes.metric, "classes": len(classes.chinese),
                                 "images": len(labels), "templates": len(templates)}
    if shots:
        features, counts = encode_images(clip, shots[0], len(shots[1])), shots[1].bincount()
        scores, weight = few_shots(images, class_features, features, shots[1])
        result["few_shots"] = measured(scores) | {
            "shots": [counts.min().item(), counts.max().item()], "weight": weight}
    return result, scores


def own_measure(metric: str, cosines: torch.Tensor, labels: torch.Tensor, scale: float) -> float:
    """The measure `metric` (one of classes.METRICS), in percent, of cosines [N, C] and labels [N], or [N, C]
    for map-11. ELEVATER ranks pictures by their softmax over the classes, of cosines times the model's
    `scale`; with two classes that is the order of the second one's lead."""
    if metric == "accuracy":
        return accuracy(cosines, labels)
    if metric == "mean-per-class":
        return mean_per_class(cosines, labels)
    if metric == "roc-auc":
        return roc_auc(cosines[:, 1] - cosines[:, 0], labels)
    return map_11(probabilities(cosines, scale), labels)


def probabilities(cosines: torch.Tensor, scale: float) -> torch.Tensor:
    """The softmax over the classes [N, C]; in float64, so that nearly certain does not tie with certain."""
    return (scale * cosines.double()).softmax(dim=1)


def submission(clip, data: str, cosines: torch.Tensor) -> dict:
    """The predictions for a data set as ELEVATER's server takes them (submission_file_readme.md of
    Computer-Vision-in-the-Wild/Elevater_Toolkit_IC): sizes, and the probability of every class for every
    picture [1, N, C], with six digits. Classes and pictures of the cosines [N, C] are in ELEVATER's order."""
    count = sum(p.numel() for p in clip.parameters())
    shares = probabilities(cosines, clip.logit_scale.exp().item())
    return {"model_name": "CN-CLIP", "dataset_name": ELEVATER.get(data, data), "num_trainable_params": 0,
            "num_params": count, "num_visual_params": sum(p.numel() for p in clip.visual.parameters()),
            "num_backbone_params": count, "n_shot": 0, "rnd_seeds": [0],  # untrained: the readme's values
            "predictions": [[[round(p, 6) for p in row] for row in shares.tolist()]]}


def elevaters_pictures(folder: str, count: int) -> list[int]:
    """The rows of `open_classes` in ELEVATER's order, which index.json lists where it is another."""
    path = os.path.join(folder, "index.json")
    try:
        rows = json.loads(read_text(path)) if os.path.isfile(path) else list(range(count))
    except json.JSONDecodeError:
        rows = None
    if not isinstance(rows, list) or sorted(map(str, rows)) != sorted(map(str, range(count))):
        raise DataError(f"{path}: expected a list of the pictures' numbers, 0 to {count - 1}, each once")
    return rows


def prompts(clip, classes: Classes, get_image, labels, templates) -> dict[str, float]:
    """The measure, in percent, of every template alone and of all together ("ensemble"), best first."""
    image_features = encode_images(clip, get_image, len(labels))  # [N, E]
    sentences = sentence_features(clip, classes.chinese, templates)  # [C, S, E]
    features_of = dict(zip(templates, sentences.unbind(dim=1))) | {"ensemble": ensemble(sentences)}  # [C, E]
    scale = clip.logit_scale.exp().item()
    found = {template: own_measure(classes.metric, image_features @ features.T, labels, scale)
             for template, features in features_of.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# Ways to say that a kind of thing is not there. The first is a negation, as the paper's "no cars"; the others
# are positive: "others", also from the paper, and what is there instead.
ABSENT = {
    "negation": "一张没有{}的图片", "other things": "一张其他东西的图片", "background alone": "一张风景的图片"}


def negation(clip, pictures: int = 400) -> dict[str, dict[str, float]]:
    """Does the model see whether a kind of thing is there? For every kind and every drawn scene, the cosine
    with "a picture of X" meets the cosine with a sentence of ABSENT. The result has, by wording, the
    percentages that are right where X is there and where it is absent, their mean, and the area under the ROC
    curve of the difference, which a constant lead of one sentence cannot spoil. Guessing gives 50 for the
    last two, and so does "no X" for a model that reads only the noun."""
    kinds = scenes.kind_names("zh")
    examples = [scenes.class_example("zh", index) for index in range(pictures)]
    images = encode_images(clip, lambda row: examples[row][0], pictures)  # [N, E]
    there = torch.tensor([kind for _, kind, _ in examples])[:, None] == torch.arange(len(kinds))  # [N, C]
    present, *absent = (images @ ensemble(sentence_features(clip, kinds, [template])).T  # [N, C]
                        for template in ("一张{}的图片", *ABSENT.values()))
    found = {}
    for wording, scores in zip(ABSENT, absent):
        lead = present - scores
        right = [100 * share.float().mean().item() for share in (lead[there] > 0, lead[~there] <= 0)]
        areas = [roc_auc(lead[:, kind], there[:, kind]) for kind in range(len(kinds))]
        found[wording] = {"there": right[0], "absent": right[1], "mean": sum(right) / 2,
                          "roc-auc": sum(areas) / len(areas)}
    return found
