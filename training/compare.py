"""
Figure 2 of the paper on drawn scenes: mean recall against Chinese pairs seen, for four ways to train.

    scratch   both towers start from random weights
    direct    the image tower starts from the English world's, and everything trains
    locked    the image tower starts from the English world's and stays as it is: stage 1 to the end
    stage2    locked for a while, then everything trains: stage 1 and stage 2

All see the same few Chinese pairs equally often. The English tower has seen many times more, as OpenAI's had.
The first seed tries each way at three rates, and the other seeds take the one that was best, so that no way
wins because of a rate that happens to suit it.
"""

import dataclasses
import re
import statistics
from typing import NamedTuple

SEEDS, RATES = 5, (3e-4, 1e-3, 3e-3)
# Our numbers: five times as many English pairs as Chinese ones, and few steps, when a good start counts most.
ENGLISH = dict(steps=1600, eval_every=400)
STAGE_1 = dict(steps=100, eval_every=50, lr=1e-3)
STAGE_2 = dict(steps=200, eval_every=50)
WAYS = {"scratch": "from scratch", "direct": "direct tuning", "locked": "stage 1 alone",
        "stage2": "two stages"}


class Run(NamedTuple):
    rate: str  # "" for a seed that took the best one
    points: list[tuple[float, float]]  # (pairs seen, mean recall)


def comparison(english: dict, stage1: dict, stage2: dict) -> dict[str, dict]:
    """The flags of the demo's three acts -> {act: flags}, for all ways, seeds and rates."""
    english, stage1, stage2 = english | ENGLISH, stage1 | STAGE_1, stage2 | STAGE_2
    acts, steps = {}, stage1["steps"] + stage2["steps"]
    for n in range(SEEDS):
        tower = dict(image_init=f"@english-seed{n}")
        acts |= {f"english-seed{n}": english | dict(seed=n), f"stage1-seed{n}": stage1 | tower | dict(seed=n)}
        ways = {"scratch": stage2 | dict(init="", steps=steps),
                "direct": stage2 | tower | dict(init="", steps=steps),
                "locked": stage1 | tower | dict(steps=steps),
                "stage2": stage2 | dict(init=f"@stage1-seed{n}")}
        for way, flags in ways.items():
            acts |= {f"{way}-seed{n}-lr{lr:g}": flags | dict(seed=n, lr=lr) for lr in RATES if n == 0}
            acts |= {f"{way}-seed{n}": flags | dict(seed=n)} if n else {}
    return acts


def at_best_rate(act: str, cfg, histories: dict[str, list[dict]]):
    """The Config of an act, with the rate that was best for its way's first seed if it names none."""
    runs = runs_by_way(histories).get(act.split("-")[0])
    return dataclasses.replace(cfg, lr=float(best(runs).rate)) if runs and not cfg.lr else cfg


def runs_by_way(histories: dict[str, list[dict]]) -> dict[str, list[Run]]:
    """What training returned, by act -> the runs of each way; nothing if this is no comparison. Stage 2
    counts on from the end of stage 1."""
    runs = {}
    for act, history in histories.items():
        if match := re.fullmatch(r"(scratch|direct|locked|stage2)-seed(\d)(?:-lr(.+))?", act):
            way, seed, rate = match.groups(default="")
            before = histories[f"stage1-seed{seed}"] if way == "stage2" else []
            seen = before[-1]["samples"] if before else 0
            points = [(start + entry["samples"], entry["mean_recall"])
                      for start, part in ((0, before), (seen, history)) for entry in part]
            runs.setdefault(way, []).append(Run(rate, points))
    return runs


def best(runs: list[Run]) -> Run:
    """The first seed's run that ended highest."""
    return max((run for run in runs if run.rate), key=lambda run: run.points[-1][1])


def curves(histories: dict[str, list[dict]]) -> dict[str, list[list[tuple[float, float]]]]:
    """By way in words, all seeds' points at the best rate."""
    return {f"{WAYS[way]}, lr {best(runs).rate}": [
                run.points for run in runs if run is best(runs) or not run.rate]
            for way, runs in runs_by_way(histories).items()}


def table(histories: dict[str, list[dict]]) -> str:
    """A row for every way: its first seed at each rate, and all seeds at the best one."""
    rows = [f"{'mean recall at the end':24}" + "".join(f"lr {rate:<8g}" for rate in RATES)
            + "| all seeds: mean  deviation  lowest  highest"]
    for (way, runs), seeds in zip(runs_by_way(histories).items(), curves(histories).values()):
        ends = [points[-1][1] for points in seeds]
        spread = statistics.stdev(ends) if len(ends) > 1 else 0
        rows.append(f"{WAYS[way]:24}" + "".join(f"{run.points[-1][1]:<11.1f}" for run in runs if run.rate)
                    + f"|{statistics.mean(ends):16.1f}{spread:11.1f}{min(ends):8.1f}{max(ends):9.1f}")
    return "\n".join(rows)
