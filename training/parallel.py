"""
What several processes need beside the gather of loss.py: the mean of their gradients, and of BatchNorm's
statistics.
"""

import warnings

import torch

import model
from common import mean_over_ranks, world_size


def distribute(clip: model.ChineseCLIP) -> torch.nn.Module:
    """The model itself, or, among several processes, one that averages gradients over them in backward."""
    if world_size() == 1:
        return clip
    with warnings.catch_warnings():  # torch 2.13 has a new name for this flag, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        # BatchNorm's statistics are averaged below; broadcast, they would be those of rank 0 alone
        return torch.nn.parallel.DistributedDataParallel(clip, broadcast_buffers=False)


def average_statistics(clip: model.ChineseCLIP):
    """Every process moves BatchNorm's running statistics by its own pairs. Set them to the mean over the
    processes, so that all measure and save the same model."""
    moving = [buffer for buffer in clip.visual.buffers() if buffer.is_floating_point()]
    if moving and clip.visual.training:
        mean = mean_over_ranks(torch.cat([buffer.flatten() for buffer in moving]))  # one message for all
        for buffer, part in zip(moving, mean.split([buffer.numel() for buffer in moving])):
            buffer.copy_(part.view_as(buffer))
