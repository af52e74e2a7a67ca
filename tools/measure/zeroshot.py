"""
Classification without training (paper, sec. 3.2): retrieval with class names, put into sentences, as answers.

`zero_shot` measures a data set as Table 12 does, `submission` writes what ELEVATER's server takes; `prompts`
and `negation` are the analyses of sec. 3.2.3: how much hangs on the sentence, and that "no" is not read.

Shapes: N pictures, C classes, S sentences a class (one a template), E joint width.
"""

import torch

from tools.measure import metrics
import model
from sources import scenes
from tools.measure.kept import encode_images, encode_texts

# Our names of labels/ -> ELEVATER's, where they differ (submission_file_readme.md of
# Computer-Vision-in-the-Wild/Elevater_Toolkit_IC)
ELEVATER = {
    "country-211": "country211", "eurosat": "eurosat_clip",
    "fgvc-aircraft": "fgvc-aircraft-2013b-variants102",
    "oxford-flowers-102": "oxford-flower-102", "resisc-45": "resisc45_clip",
    "voc-2007": "voc-2007-classification"}


def sentence_features(clip, names: list[str], templates: list[str]) -> torch.Tensor:
    """Class names [C] and templates [S] with a {} for the name -> unit features [C, S, E]."""
    sentences = [template.replace("{}", name) for name in names for template in templates]
    return encode_texts(clip, sentences).unflatten(0, (len(names), len(templates)))


def ensemble(sentences: torch.Tensor) -> torch.Tensor:
    """Unit features [C, S, E] -> [C, E]: the sentences of a class averaged, the average normalised again
    (CLIP, sec. 3.1.4, prompt ensembling)."""
    return model.normalise(sentences.mean(dim=1))


def class_features(clip, names: list[str], templates: list[str]) -> torch.Tensor:
    """Class names [C] and templates [S] -> unit features [C, E]."""
    return ensemble(sentence_features(clip, names, templates))


def measure(metric: str, cosines: torch.Tensor, labels: torch.Tensor, scale: float) -> float:
    """Cosines [N, C] and labels ([N], or [N, C] for map-11) -> the measure of classes.METRICS, in percent.

    ELEVATER ranks pictures by the softmax over the classes, not by the cosine, which makes a difference for
    the area under the curve and for average precision. Of two classes it is the lead of the second."""
    if metric == "accuracy":
        return metrics.accuracy(cosines, labels)
    if metric == "mean-per-class":
        return metrics.mean_per_class(cosines, labels)
    if metric == "roc-auc":
        return metrics.roc_auc(cosines[:, 1] - cosines[:, 0], labels)
    return metrics.map_11(probabilities(cosines, scale), labels)


def probabilities(cosines: torch.Tensor, scale: float) -> torch.Tensor:
    """Cosines [N, C] -> the softmax over the classes [N, C], with the model's temperature; in float64, so
    that what is nearly certain does not tie with what is certain."""
    return (scale * cosines.double()).softmax(dim=1)


def zero_shot(
    clip, names: list[str], get_image, labels: torch.Tensor, templates: list[str], metric: str = "accuracy"
) -> dict:
    """The measure in percent under its own name, and with the first template alone, of pictures get_image(0
    ... N - 1) with their labels ([N], or [N, C]); beside it what it was measured on and what guessing
    gives."""
    cosines, single = zero_shot_cosines(clip, names, get_image, len(labels), templates)
    return report(clip, cosines, single, labels, templates, metric)


def zero_shot_cosines(clip, names, get_image, count: int, templates) -> tuple[torch.Tensor, torch.Tensor]:
    """-> cosines [N, C] with all templates, and with the first alone."""
    image_features = encode_images(clip, get_image, count)  # [N, E]
    sentences = sentence_features(clip, names, templates)  # [C, S, E]
    return image_features @ ensemble(sentences).T, image_features @ sentences[:, 0].T


def report(clip, cosines, single, labels, templates, metric: str) -> dict:
    """Cosines [N, C] with all templates and with one -> the result of `zero_shot`."""
    scale = clip.logit_scale.exp().item()
    chance = {"roc-auc": 50.0, "map-11": 100 * labels.float().mean().item()}  # of random scores, about
    return {metric: measure(metric, cosines, labels, scale),
            f"{metric}_single_template": measure(metric, single, labels, scale),
            "metric": metric, "classes": cosines.shape[1], "images": len(labels), "templates": len(templates),
            "chance": chance.get(metric, 100 / cosines.shape[1])}


def submission(clip, data: str, cosines: torch.Tensor) -> dict:
    """One data set's predictions as ELEVATER's server takes them (submission_file_readme.md, "zero-shot"):
    sizes, and the probability of every class for every picture [1, N, C], with six digits as in cn_clip. The
    order of classes and pictures is that of `cosines`, which for the server must be ELEVATER's: sources/classes.py
    takes it from the official layout's label.txt and index.json.

    data: a name of labels/, or another."""
    count = sum(p.numel() for p in clip.parameters())
    shares = probabilities(cosines, clip.logit_scale.exp().item())
    return {"model_name": "CN-CLIP", "dataset_name": ELEVATER.get(data, data), "num_trainable_params": 0,
            "num_params": count, "num_visual_params": sum(p.numel() for p in clip.visual.parameters()),
            "num_backbone_params": count, "n_shot": 0, "rnd_seeds": [0],  # untrained: the readme's values
            "predictions": [[[round(p, 6) for p in row] for row in shares.tolist()]]}


# ------------------------------------------------------------------------------------------------------------
# the analyses of sec. 3.2.3


def prompts(clip, names, get_image, labels, templates, metric: str = "accuracy") -> dict[str, float]:
    """The measure, in percent, of every template alone and of all together ("ensemble"), best first."""
    image_features = encode_images(clip, get_image, len(labels))  # [N, E]
    sentences = sentence_features(clip, names, templates)  # [C, S, E]
    scale = clip.logit_scale.exp().item()
    found = {template: measure(metric, image_features @ sentences[:, s].T, labels, scale)
             for s, template in enumerate(templates)}
    found["ensemble"] = measure(metric, image_features @ ensemble(sentences).T, labels, scale)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# How to say that a kind of thing is not there. The first is a negation, as the paper's "no cars"; the others
# say it positively, as the paper's "others", or name what is there instead.
ABSENT = {"negation": "一张没有{}的图片", "other things": "一张其他东西的图片", "background alone": "一张风景的图片"}


def negation(clip, world: str = "zh", pictures: int = 400) -> dict[str, dict[str, float]]:
    """Is a kind of thing there or not? Asked of drawn scenes, where that is known, for every kind: the
    picture's cosine with "a picture of X" against its cosine with a sentence of ABSENT. -> wording -> percent
    right where X is there, where it is not, the mean of the two, and the area under the ROC curve of the
    difference, which no constant lead of one sentence can spoil. Guessing gives 50 of the last two.

    To a model that reads only the noun "no X" is as near to a picture of X as "X" is."""
    kinds = scenes.kind_names(world)
    examples = [scenes.class_example(world, index) for index in range(pictures)]
    images = encode_images(clip, lambda row: examples[row][0], pictures)  # [N, E]
    there = torch.tensor([kind for _, kind, _ in examples])[:, None] == torch.arange(len(kinds))  # [N, C]
    present = images @ class_features(clip, kinds, ["一张{}的图片"]).T  # [N, C]
    found = {}
    for wording, template in ABSENT.items():
        lead = present - images @ class_features(clip, kinds, [template]).T  # [N, C]
        right = [100 * share.float().mean().item() for share in (lead[there] > 0, lead[~there] <= 0)]
        areas = [metrics.roc_auc(lead[:, kind], there[:, kind]) for kind in range(len(kinds))]
        found[wording] = {"there": right[0], "absent": right[1], "mean": sum(right) / 2,
                          "roc-auc": sum(areas) / len(areas)}
    return found
