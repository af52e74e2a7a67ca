"""
The command line of train.py: its flags, and the recipes that fill them in. A recipe is one act or several,
each a whole run with its own folder; its numbers come from the paper's tables (Yang et al., 2022, tables 8
and 9, appendix A.2), named at each row, and any flag that is given wins.

    parse(["--recipe", "muge", "--model", "ViT-B-16", "--data", "MUGE"]) -> {"muge": Config(...)}
"""

import argparse
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field

import torch

import model
from sources.pairs import DataError


class ConfigError(ValueError):
    """A wrong command line: one line that says what was expected; exit code 2."""


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every flag of the command line, in this order."""

    model: str = flag("ViT-B-16", "which row of model.MODELS to train")
    data: str = flag(
        "scenes-zh", "pairs: a folder (official TSV + JSONL, pictures with a list, or tar shards), a pattern "
        "of shards {000..999}.tar, scenes-zh, scenes-en; several with commas between")
    valid_data: str = flag("", "where the validation split is, if not in --data")
    valid_split: str = flag("valid", "the split that recall is measured on; training reads `train`")
    out: str = flag("out", "folder for checkpoints, weights and results; each act has its own in it")
    init: str = flag("", "start both towers from this file or released name")
    image_init: str = flag(
        "", "start the image tower, its projection and the temperature from this CLIP file")
    text_init: str = flag("", "start the text tower from this RoBERTa file")
    freeze_image: bool = flag(
        False, "stage 1: the image tower does not train, its BatchNorm statistics stand still")
    augment: str = flag(
        "none", "none, crop (random resized crop) or auto (and AutoAugment, which changes colours)")
    context_length: int = flag(52, "tokens a caption, [CLS] and [SEP] included; up to 512")
    batch_size: int = flag(256, "pairs a step over all devices: each is a negative for all others")
    chunk_size: int = flag(
        0, "pairs whose activations a device holds at once, same gradient; 0: as many as fit in its memory")
    targets: str = flag(
        "one-hot", "one-hot, as in the paper, or multi: pairs that share picture or caption are positives")
    cache_features: int = flag(
        0, "stage 1: encode so many views of every picture once (training/cache.py); 0: all at every step")
    teacher: str = flag("", "distil from this file or released name: learn its in-batch similarities too")
    distill: float = flag(1.0, "weight of the teacher's loss beside the contrastive one")
    epochs: float = flag(10.0, "passes over the training pairs")
    steps: int = flag(0, "if not 0, this many steps instead of epochs")
    lr: float = flag(0.0, "peak learning rate, used as it is; 0: the recipe's, scaled to the batch")
    recipe_lr: float = flag(5e-5, "the recipe's peak rate for batches of --lr-batch and more")
    lr_batch: int = flag(1024, "below this batch the recipe's rate falls in proportion")
    warmup: int = flag(100, "steps of linear warm-up; where that is over half of the run, a tenth of the run")
    weight_decay: float = flag(1e-3, "AdamW's, on matrices only (paper, table 8)")
    beta2: float = flag(0.0, "AdamW's second moment; 0: 0.999 for ResNet, 0.98 for ViT (paper, table 8)")
    eps: float = flag(0.0, "AdamW's eps; 0: 1e-8 for ResNet, 1e-6 for ViT (paper, table 8)")
    patch_drop: float = flag(
        0.0, "share of image patches left out where the image tower trains (FLIP); ViT only")
    grad_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, more time")
    eval_every: int = flag(0, "steps between recall measurements; 0: every epoch, at least five a run")
    save_every: int = flag(0, "steps between checkpoints; 0: as often as recall is measured")
    save_minutes: float = flag(20.0, "save after so many minutes too; SIGTERM and Ctrl-C save and stop")
    log_every: int = flag(10, "steps between log lines")
    workers: int = flag(-1, "processes that prepare pictures; -1: up to 8 with a GPU, 1 without")
    device: str = flag("", "cpu or cuda; empty: cuda if there is one")
    compile: bool = flag(False, "torch.compile both towers: slow first steps, then faster ones")
    seed: int = flag(0, "of weights, order, augmentation and dropout")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate that is used: the given one, or the recipe's for this batch."""
        return self.lr or self.recipe_lr * min(1.0, self.batch_size / self.lr_batch)


def warmup_steps(cfg: Config, total: int) -> int:
    """The warm-up that was asked for, or a tenth of the run if that would be more than half of it."""
    return cfg.warmup if cfg.warmup <= total / 2 else max(1, total // 10)


def schedule(cfg: Config, pairs: int) -> tuple[int, int, int]:
    """-> (steps of a run on so many pairs, steps between measurements of recall, between checkpoints). An
    epoch is whole batches, the last one filled with pairs of the next epoch, as in the official code and so
    in table 9. DataError if there are no pairs."""
    if not pairs:
        raise DataError(f"{cfg.data}: no training pairs; `python -m tools.curate check {cfg.data}` says why")
    total = cfg.steps or math.ceil(cfg.epochs * math.ceil(pairs / cfg.batch_size))
    eval_every = cfg.eval_every or max(1, min(pairs // cfg.batch_size, math.ceil(total / 5)))
    return total, eval_every, cfg.save_every or eval_every


def loader_processes(cfg: Config, device: torch.device) -> int:
    """Processes that prepare pictures: --workers, or up to 8 with a GPU and 1 without."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # this process's share
    return cfg.workers if cfg.workers >= 0 else max(1, min(8, cores)) if device.type == "cuda" else 1


# ------------------------------------------------------------------------------------------------------------
# the table


def holds_from(lr: float) -> int:
    """The batch from which a rate of the paper holds as it is; for a smaller one it falls in proportion. The
    line is the official scripts' 5e-5 at 1,024: users who kept that rate at 100 pairs a step ended below
    zero-shot. The paper's own batches, 4,096 to 32,768, are all above it."""
    return round(lr / 5e-5 * 1024)


# Table 8; 52 tokens are its 50 characters, [CLS] and [SEP]. Stage 2 "decreases the learning rate to 2e-5".
TABLE_8 = dict(context_length=52, warmup=5000, weight_decay=1e-3, augment="auto")
STAGE_1 = TABLE_8 | dict(batch_size=32768, recipe_lr=1e-4, lr_batch=holds_from(1e-4))
STAGE_2 = TABLE_8 | dict(recipe_lr=2e-5, lr_batch=holds_from(2e-5))
# Appendix A.2: epochs of stage 1; batch and epochs of stage 2. ViT-L-14-336 has no stage 1: it goes on from
# ViT-L-14's weights for 2 epochs, of a batch that is not named, so ViT-L-14's.
APPENDIX_A2 = {
    "RN50": (20, 16384, 44),
    "ViT-B-16": (44, 16384, 15),
    "ViT-L-14": (64, 4608, 7),
    "ViT-L-14-336": (0, 4608, 2),
    "ViT-H-14": (26, 32768, 7),
}
# Table 9: batch, peak rate, epochs, warm-up steps
TABLE_9 = {
    "RN50":         {"muge": (24576, 5e-5, 60, 100),
                     "flickr30k-cn": (24576, 6e-5, 30, 20), "coco-cn": (24576, 5e-5, 40, 6)},
    "ViT-B-16":     {"muge": (12800, 2e-5, 20, 40),
                     "flickr30k-cn": (7680, 5e-5, 16, 20), "coco-cn": (12800, 5e-5, 30, 6)},
    "ViT-L-14":     {"muge": (4096, 3e-5, 20, 100),
                     "flickr30k-cn": (4096, 2e-5, 16, 60), "coco-cn": (4096, 6e-5, 18, 9)},
    "ViT-L-14-336": {"muge": (8192, 2e-5, 20, 100),
                     "flickr30k-cn": (8192, 2e-5, 18, 20), "coco-cn": (8192, 4e-5, 18, 2)},
    "ViT-H-14":     {"muge": (20480, 2e-5, 20, 20),
                     "flickr30k-cn": (4096, 6e-6, 18, 6), "coco-cn": (5120, 2e-5, 18, 10)},
}
# The demo's numbers are our own, found by trying on two CPU cores.
DEMO = dict(model="RN-mini", batch_size=64, recipe_lr=1e-3, lr_batch=64, warmup=20, log_every=50)

RECIPES = {
    "demo": "drawn scenes in three acts: English pairs, then stage 1 and stage 2 on Chinese ones",
    "compare": "the demo's two stages beside direct tuning and training from scratch (paper, figure 2)",
    "pretrain": "stage 1, then stage 2 from its best weights (section 2.3)",
    "stage1": "image tower frozen (table 8, appendix A.2); give --image-init and --text-init",
    "stage2": "everything trains (appendix A.2); give --init",
    "scratch": "one stage, random weights (section 3.1.3)",
    "direct": "one stage, no frozen tower (section 3.1.3); give --image-init and --text-init",
    "muge": "fine-tuning (table 9); give --init",
    "flickr30k-cn": "fine-tuning (table 9); give --init",
    "coco-cn": "fine-tuning (table 9); give --init",
    "icr": "fine-tuning on long captions: 128 tokens (appendix A.4), the rest from MUGE's row; give --init",
}


# What a recipe needs, one group or the other: flags that it makes no sense without
BOTH_TOWERS = ("data", "image_init", "text_init"), ("data", "init")
FINE_TUNING = (("data", "init"),)
NEEDS = {"pretrain": BOTH_TOWERS, "stage1": BOTH_TOWERS, "stage2": BOTH_TOWERS, "direct": BOTH_TOWERS,
         "scratch": (("data",),),
         "muge": FINE_TUNING, "flickr30k-cn": FINE_TUNING, "coco-cn": FINE_TUNING, "icr": FINE_TUNING}


def check_needs(recipe: str, given: dict):
    """ConfigError, with the command that was meant, if a recipe lacks what it starts from, or if the demo,
    which draws its own pairs, is given some."""
    if recipe not in NEEDS:  # demo and compare
        foreign = [name for name in ("data", "init", "image_init", "text_init") if given.get(name)]
        if foreign:
            raise ConfigError(
                f"{as_flag(foreign[0])}: --recipe {recipe} draws its own pairs and starts from nothing; for "
                "your pairs --recipe muge --init ViT-B-16 (fine-tuning) or --recipe scratch (from nothing)")
        return
    lacking = [[name for name in group if not given.get(name)] for group in NEEDS[recipe]]
    if all(lacking):
        wanted = ", or ".join(" and ".join(map(as_flag, names)) for names in lacking)
        hint = "--recipe scratch trains from nothing, and --init ViT-B-16 is a released model"
        if lacking[0] == ["data"]:
            hint = "for example --data scenes-zh, which is drawn"
        raise ConfigError(f"--recipe {recipe} needs {wanted}; {hint}")


def as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def acts_of(recipe: str, model_name: str) -> dict[str, dict]:
    """Name of a recipe -> {act: its flags}, in the order in which they run. "@act" is the best weights of an
    earlier act."""
    if recipe in ("pretrain", "stage1") and model_name == "ViT-L-14-336":
        raise ConfigError(f"--recipe {recipe}: ViT-L-14-336 has no stage 1 (appendix A.2); "
                          "--recipe stage2 --init ViT-L-14, whose positions are interpolated")
    if recipe in ("pretrain", "stage1", "stage2", "scratch", "direct") and model_name not in APPENDIX_A2:
        print(f"--recipe {recipe}: the paper has no numbers for {model_name}; these are ViT-B-16's")
    stage_1_epochs, stage_2_batch, stage_2_epochs = APPENDIX_A2.get(model_name, APPENDIX_A2["ViT-B-16"])
    if recipe == "demo":
        return {
            "english": DEMO | dict(data="scenes-en", steps=300),
            "stage1": DEMO | dict(image_init="@english", freeze_image=True, steps=150, warmup=15),
            "stage2": DEMO | dict(init="@stage1", steps=500),
        }
    if recipe == "compare":  # figure 2's ablation, in kind: every way sees the same number of Chinese pairs
        acts = acts_of("demo", model_name)
        same = acts["stage1"]["steps"] + acts["stage2"]["steps"]
        others = {
            "scratch": DEMO | dict(steps=same),
            "direct": DEMO | dict(image_init="@english", steps=same),
        }
        return {"english": acts["english"]} | others | {act: acts[act] for act in ("stage1", "stage2")}
    if recipe == "pretrain":
        stage_2 = acts_of("stage2", model_name)["stage2"] | dict(init="@stage1")
        return acts_of("stage1", model_name) | {"stage2": stage_2}
    if recipe == "stage1":
        return {recipe: STAGE_1 | dict(freeze_image=True, epochs=stage_1_epochs)}
    if recipe == "stage2":
        return {recipe: STAGE_2 | dict(batch_size=stage_2_batch, epochs=stage_2_epochs)}
    if recipe in ("scratch", "direct"):
        # section 3.1.3 names no numbers of their own; they differ in what you --init
        return {recipe: STAGE_1 | dict(epochs=stage_1_epochs or APPENDIX_A2["ViT-L-14"][0])}
    if model_name not in TABLE_9:
        raise ConfigError(f"--recipe {recipe}: table 9 of the paper has rows for {', '.join(TABLE_9)}, "
                          f"not {model_name}")
    batch, lr, epochs, warmup = TABLE_9[model_name]["muge" if recipe == "icr" else recipe]
    rate = dict(recipe_lr=lr, lr_batch=holds_from(lr), warmup=warmup)
    act = TABLE_8 | rate | dict(batch_size=batch, epochs=epochs)
    # appendix A.4: longer captions
    return {recipe: act | dict(context_length=128 if recipe == "icr" else 52)}


# ------------------------------------------------------------------------------------------------------------
# the command line


def parse(argv: list[str] | None) -> dict[str, Config]:
    """Command line -> {act: Config}: the defaults, over them the recipe's row, over it the flags that were
    given."""
    parser = argparse.ArgumentParser(
        "train.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a Chinese CLIP. Without flags: the demo, a few minutes on two CPU cores.",
        epilog="recipes:\n" + "\n".join(f"  {name:14}{text}" for name, text in RECIPES.items()))
    parser.add_argument("--recipe", default="demo", choices=RECIPES, metavar="NAME",
                        help="fills in the flags below; any that you give wins (default: demo)")
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default not in ("", False) else "")
        kind = dict(type=f.type, metavar={str: "TEXT", int: "N", float: "X"}.get(f.type))
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    recipe = given.pop("recipe")
    acts = {act: fill_in(act, flags, given)
            for act, flags in acts_of(recipe, given.get("model", Config.model)).items()}
    check_needs(recipe, given)
    if len(acts) > 1:  # of several acts, flags are for those that can use them
        acts = {act: dataclasses.replace(cfg, **dict(patch_drop=0.0) if cfg.freeze_image else
                                         dict(cache_features=0)) for act, cfg in acts.items()}
    for cfg in acts.values():
        validate(cfg)
    return acts


def fill_in(act: str, flags: dict, given: dict) -> Config:
    """One act's Config from its recipe's flags and the given ones. An act that starts from an earlier one
    keeps doing so."""
    if any(str(value).startswith("@") for value in flags.values()):
        given = {k: v for k, v in given.items() if k not in ("init", "image_init", "text_init")}
    cfg = Config(**flags | given | dict(out=os.path.join(given.get("out", Config.out), act)))
    if "epochs" in given and "steps" not in given:
        cfg = dataclasses.replace(cfg, steps=0)
    return cfg


def chained(start: str, out: str) -> str:
    """What an act starts from, as a name or path: "@act" is the best weights of the act in the folder beside
    its own, wherever both have been moved."""
    return os.path.join(os.path.dirname(out), start[1:], "best.safetensors") if start[:1] == "@" else start


def validate(cfg: Config):
    """ConfigError for flags that no run could use."""
    if cfg.model not in model.MODELS:
        raise ConfigError(f"--model {cfg.model}: no such model; there are {', '.join(model.MODELS)}")
    positions = model.MODELS[cfg.model].text.max_positions
    is_vit = isinstance(model.MODELS[cfg.model].visual, model.ViTConfig)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for wrong, text in (
        (cfg.batch_size % world_size != 0,
         f"--batch-size {cfg.batch_size}: expected a multiple of the {world_size} processes"),
        (re.search(r"\.tar\s*(,|$)", cfg.data) and not cfg.valid_data,
         f"--data {cfg.data}: a pattern has no validation split; name one by --valid-data"),
        (cfg.augment not in ("none", "crop", "auto"),
         f"--augment {cfg.augment}: expected none, crop or auto"),
        (not 2 <= cfg.context_length <= positions,
         f"--context-length {cfg.context_length}: expected 2 to {positions}"),
        (cfg.batch_size < 2,
         f"--batch-size {cfg.batch_size}: expected at least 2, or there is no negative to tell from"),
        (cfg.chunk_size < 0, f"--chunk-size {cfg.chunk_size}: expected 0 or more"),
        (cfg.targets not in ("one-hot", "multi"), f"--targets {cfg.targets}: expected one-hot or multi"),
        (cfg.cache_features < 0, f"--cache-features {cfg.cache_features}: expected 0 or more"),
        (cfg.cache_features > 0 and not cfg.freeze_image,
         "--cache-features: only a frozen image tower has features to cache; --freeze-image"),
        (not 0 <= cfg.distill < math.inf, f"--distill {cfg.distill}: expected 0 or more"),
        (not 0 <= cfg.lr < math.inf, f"--lr {cfg.lr}: expected 0, the recipe's, or more"),
        (not 0 < cfg.recipe_lr < math.inf, f"--recipe-lr {cfg.recipe_lr}: expected more than 0"),
        (cfg.lr_batch < 1, f"--lr-batch {cfg.lr_batch}: expected at least 1"),
        (cfg.warmup < 0, f"--warmup {cfg.warmup}: expected 0 or more"),
        (not 0 <= cfg.weight_decay < math.inf, f"--weight-decay {cfg.weight_decay}: expected 0 or more"),
        (not 0 <= cfg.beta2 < 1, f"--beta2 {cfg.beta2}: expected 0, the paper's, to below 1"),
        (not 0 <= cfg.eps < math.inf, f"--eps {cfg.eps}: expected 0, the paper's, or more"),
        (not 0 < cfg.save_minutes, f"--save-minutes {cfg.save_minutes}: expected more than 0"),
        (cfg.cache_features > 0 and bool(cfg.teacher),
         "--cache-features: a --teacher looks at pictures, which cached features replace; drop one of them"),
        (not 0 <= cfg.patch_drop < 1, f"--patch-drop {cfg.patch_drop}: expected a share from 0 to below 1"),
        (cfg.patch_drop > 0 and not is_vit, f"--patch-drop: {cfg.model} has no patches to drop"),
        (cfg.patch_drop > 0 and cfg.freeze_image,
         "--patch-drop: a frozen image tower sees all patches; --cache-features saves its time"),
        (cfg.steps == 0 and not 0 < cfg.epochs < math.inf,
         f"--epochs {cfg.epochs}: expected more than 0, or --steps"),
        (not 0 <= cfg.seed < 2**16, f"--seed {cfg.seed}: expected 0 to 65535"),
        (cfg.device not in ("", "cpu", "cuda"), f"--device {cfg.device}: expected cpu or cuda"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
        (cfg.log_every < 1, f"--log-every {cfg.log_every}: expected at least 1"),
        (min(cfg.steps, cfg.eval_every, cfg.save_every) < 0,
         "--steps, --eval-every, --save-every: expected 0 or more"),
    ):
        if wrong:
            raise ConfigError(text)
