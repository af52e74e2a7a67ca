"""
Distillation: a student learns the similarities that a teacher sees in a batch (`train.py --teacher`).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import model
from loss import gather
from training.tiles import DENSE_LIMIT


def load_teacher(name: str, student: model.ChineseCLIP) -> model.ChineseCLIP:
    """The teacher from a file or a released name, frozen, on the student's device and in its precision."""
    teacher = model.load(name, student.logit_scale.device)[0].requires_grad_(False)
    teacher.precision = student.precision
    return teacher


@torch.no_grad()
def teacher_features(teacher: model.ChineseCLIP, chunks) -> tuple:
    """What the teacher makes of a batch, at its own resolution: unit features of its images [b, E'] and of
    its captions [b, E'], and its logit_scale."""
    size, device, features = teacher.config.visual.resolution, teacher.logit_scale.device, []
    for chunk in chunks:
        pixels = data.on_device(chunk.pictures, device)
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        with model.autocast(teacher):
            features.append(teacher(pixels, chunk.ids))
    images, texts, scales = zip(*features)
    return torch.cat(images), torch.cat(texts), scales[0]


def distillation_loss(image_features, text_features, logit_scale, of_teacher: tuple) -> torch.Tensor:
    """This rank's share of the cross-entropy between the student's in-batch similarities and the teacher's:
    for each image, between their distributions over the captions of the global batch, and for each caption,
    over the images. of_teacher: its features and its scale, as above; the widths E' and E may differ.

    Every row has a softmax of its own. So the [b, B] matrices are computed a few rows at a time, at most
    DENSE_LIMIT logits, and once more in the backward pass."""
    teacher_images, teacher_texts, teacher_scale = (x.detach() for x in of_teacher)
    total = 0.0
    for rows, columns, teacher_rows, teacher_columns in (
            (image_features, text_features, teacher_images, teacher_texts),
            (text_features, image_features, teacher_texts, teacher_images)):
        columns, teacher_columns = gather(columns), gather(teacher_columns)  # [B, E], [B, E']
        tile = max(1, DENSE_LIMIT // len(columns))
        for some, same in zip(rows.split(tile), teacher_rows.split(tile)):
            total = total + checkpoint(
                rows_loss, logit_scale * some, columns, teacher_scale * same, teacher_columns,
                use_reentrant=False, preserve_rng_state=False)
    return total / (2 * len(image_features))


def rows_loss(rows, columns, teacher_rows, teacher_columns) -> torch.Tensor:
    """Sum over rows [n, E], columns [B, E] of the cross-entropy between the student's distribution and the
    teacher's."""
    targets = (teacher_rows @ teacher_columns.T).softmax(dim=1)  # [n, B]
    return F.cross_entropy(rows @ columns.T, targets.to(rows.dtype), reduction="sum")
