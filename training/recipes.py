"""
The flags of train.py, and the recipes that fill them in. A recipe is one act or several, each a whole run
with its own folder. Its numbers come from the paper (Yang et al., 2022, tables 8 and 9, appendix A.2); each
row names its source. A flag on the command line wins over the recipe.

    parse(["--recipe", "muge", "--model", "ViT-B-16", "--data", "MUGE", "--init", "ViT-B-16"])
        -> {"muge": Config(...)}
"""

import argparse
import dataclasses
import math
import os
import re
import shlex
from dataclasses import dataclass, field

import torch

import model
from common import Flags, UserError
from sources.pairs import DataError
from training.compare import comparison

# ------------------------------------------------------------------------------------------------------------
# the flags


class ConfigError(UserError):
    """A wrong command line."""

    exit_code = 2


def flag(default, text: str, low: float = 0, below: float = math.inf, choices: tuple[str, ...] = ()):
    """A field with its help text and the values that it may have: a number of `low` or more and less than
    `below`, or one of `choices`."""
    return field(default=default, metadata=dict(help=text, low=low, below=below, choices=choices or None))


@dataclass(frozen=True)
class Config:
    """Every flag of the command line, in this order."""

    model: str = flag("ViT-B-16", f"one of {', '.join(model.MODELS)}", choices=tuple(model.MODELS))
    data: str = flag(
        "scenes-zh", "pairs: a folder (official TSV + JSONL, pictures with a list, or tar shards), a pattern "
        "of shards {000..999}.tar, scenes-zh, scenes-en; several with commas between")
    valid_data: str = flag("", "where the validation split is, if it is not in --data")
    valid_split: str = flag("valid", "the split that recall is measured on; training reads `train`")
    out: str = flag("out", "folder for checkpoints, weights and results; every act has its own in it")
    init: str = flag("", "start both towers from this file or released name")
    image_init: str = flag("", "start the image tower, its projection and the temperature from this CLIP")
    text_init: str = flag("", "start the text tower from this RoBERTa file")
    freeze_image: bool = flag(False, "stage 1: the image tower and its BatchNorm statistics stay as they are")
    augment: str = flag("none", "none, crop (random resized crop), or auto (crop, then AutoAugment, which "
                        "changes colours)", choices=("none", "crop", "auto"))
    context_length: int = flag(52, "tokens of a caption, [CLS] and [SEP] included; up to 512", low=2)
    batch_size: int = flag(256, "pairs of a step on all devices: each is a negative for all others", low=2)
    chunk_size: int = flag(0, "pairs that a device holds at once, for the same gradient; 0: as many as fit")
    targets: str = flag("one-hot", "one-hot, as in the paper, or multi: pairs that share a picture or a "
                        "caption are no negatives of each other", choices=("one-hot", "multi"))
    cache_features: int = flag(0, "stage 1: encode so many views of every picture once; 0: at every step")
    lora: int = flag(0, "if not 0, train matrices of this rank beside the weights, which stay as they are")
    lora_on: str = flag("qkv", "the weights that get them: qkv of every attention, or all linear layers of "
                        "the towers' blocks", choices=("qkv", "all"))
    teacher: str = flag("", "distil from this file or released name: learn its in-batch similarities too")
    distill: float = flag(1.0, "weight of the teacher's loss beside the contrastive one")
    epochs: float = flag(10.0, "passes over the training pairs")
    steps: int = flag(0, "if not 0, this many steps instead of epochs")
    min_steps: int = flag(0, "at least so many steps; ignored with --steps or --epochs")
    lr: float = flag(0.0, "peak learning rate; 0: the recipe's, scaled to the batch")
    recipe_lr: float = flag(5e-5, "the recipe's peak rate for batches of --lr-batch and more")
    lr_batch: int = flag(1024, "below this batch the recipe's rate falls in proportion", low=1)
    warmup: int = flag(100, "steps of linear warm-up; a tenth of the run if this is over half of it")
    weight_decay: float = flag(1e-3, "AdamW's weight decay, on matrices only (paper, table 8)")
    beta2: float = flag(0.0, "AdamW's beta2; 0: 0.999 for ResNet, 0.98 for ViT (paper, table 8)", below=1)
    eps: float = flag(0.0, "AdamW's eps; 0: 1e-8 for ResNet, 1e-6 for ViT (paper, table 8)")
    patch_drop: float = flag(0.0, "share of image patches left out where a ViT trains (FLIP)", below=1)
    grad_checkpointing: bool = flag(False, "compute activations twice: less memory, more time")
    eval_every: int = flag(0, "steps between measurements of recall; 0: an epoch, at least 20 steps, at "
                           "most a fifth of the run")
    save_every: int = flag(0, "steps between checkpoints; 0: as often as recall is measured")
    save_minutes: float = flag(20.0, "save after so many minutes too; SIGTERM and Ctrl-C save and stop")
    log_every: int = flag(10, "steps between log lines", low=1)
    workers: int = flag(-1, "processes that prepare pictures; -1: up to 8 with a GPU, 1 without", low=-1)
    device: str = flag("", "cpu or cuda; empty: cuda if there is one", choices=("", "cpu", "cuda"))
    precision: str = flag("", "in which the towers compute: float32, bfloat16 or float16; empty: bfloat16 on "
                          "a device that has it (on a CPU for large models alone), else float32 on a CPU, "
                          "float16 on a GPU", choices=("", "float32", "bfloat16", "float16"))
    compile: bool = flag(False, "torch.compile both towers: the first steps are slow, the others faster")
    seed: int = flag(0, "seed of weights, order, augmentation and dropout", below=2**16)

    @property
    def usual_lr(self) -> float:
        """The recipe's peak rate for this batch; LoRA takes three times as much (docs/experiments.md)."""
        return self.recipe_lr * min(1.0, self.batch_size / self.lr_batch) * (3 if self.lora else 1)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: --lr, or the usual one."""
        return self.lr or self.usual_lr


def warmup_steps(cfg: Config, total: int) -> int:
    """--warmup, or a tenth of the run if that would be more than half of it."""
    return cfg.warmup if cfg.warmup <= total / 2 else max(1, total // 10)


def schedule(cfg: Config, pairs: int) -> tuple[int, int, int]:
    """-> (steps of a run on so many pairs, steps between measurements of recall, between checkpoints). An
    epoch is whole batches, as in the official code and so in table 9. DataError if there are no pairs."""
    if not pairs:
        raise DataError(f"{cfg.data}: no training pairs; `python -m tools.curate check {cfg.data}` says why")
    total = cfg.steps or max(cfg.min_steps, math.ceil(cfg.epochs * math.ceil(pairs / cfg.batch_size)))
    eval_every = cfg.eval_every or max(1, min(max(20, pairs // cfg.batch_size), math.ceil(total / 5)))
    return total, eval_every, cfg.save_every or eval_every


def loader_processes(cfg: Config, device: torch.device) -> int:
    """Processes that prepare pictures for this one."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # this process's share
    return cfg.workers if cfg.workers >= 0 else max(1, min(8, cores)) if device.type == "cuda" else 1


def choose_precision(cfg: Config, device: torch.device) -> torch.dtype:
    """--precision, or what the device is good at. On a CPU small matrices gain nothing from bfloat16."""
    large = model.MODELS[cfg.model].text.width >= 512
    if not cfg.precision and device.type == "cpu" and large and cpu_has_bfloat16():
        return torch.bfloat16
    return model.DTYPES.get(cfg.precision) or model.precision(device)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, which others only imitate."""
    return any(map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16", "bf16")))


# ------------------------------------------------------------------------------------------------------------
# the paper's numbers


def peak(lr: float) -> dict:
    """A rate of the paper, and the batch from which it holds; for a smaller one it falls in proportion. The
    line is the official scripts' 5e-5 at 1,024: users who kept that rate at 100 pairs a step ended below
    zero-shot. The paper's own batches, 4,096 to 32,768, are all above it."""
    return dict(recipe_lr=lr, lr_batch=round(lr / 5e-5 * 1024))


# Table 8; 52 tokens are its 50 characters, [CLS] and [SEP]. Stage 2 "decreases the learning rate to 2e-5".
TABLE_8 = dict(context_length=52, warmup=5000, weight_decay=1e-3, augment="auto")
STAGE_1 = TABLE_8 | peak(1e-4) | dict(batch_size=32768)
STAGE_2 = TABLE_8 | peak(2e-5)
# Appendix A.2: epochs of stage 1; batch and epochs of stage 2. ViT-L-14-336 has no stage 1: it goes on from
# ViT-L-14's weights for 2 epochs. Its batch is not named; this is ViT-L-14's.
APPENDIX_A2 = {
    "RN50": (20, 16384, 44),
    "ViT-B-16": (44, 16384, 15),
    "ViT-L-14": (64, 4608, 7),
    "ViT-L-14-336": (0, 4608, 2),
    "ViT-H-14": (26, 32768, 7),
}
# Table 9: batch, peak rate, epochs, warm-up steps
DATA_SETS = ("muge", "flickr30k-cn", "coco-cn")
TABLE_9 = {
    "RN50":         ((24576, 5e-5, 60, 100), (24576, 6e-5, 30, 20), (24576, 5e-5, 40, 6)),
    "ViT-B-16":     ((12800, 2e-5, 20, 40), (7680, 5e-5, 16, 20), (12800, 5e-5, 30, 6)),
    "ViT-L-14":     ((4096, 3e-5, 20, 100), (4096, 2e-5, 16, 60), (4096, 6e-5, 18, 9)),
    "ViT-L-14-336": ((8192, 2e-5, 20, 100), (8192, 2e-5, 18, 20), (8192, 4e-5, 18, 2)),
    "ViT-H-14":     ((20480, 2e-5, 20, 20), (4096, 6e-6, 18, 6), (5120, 2e-5, 18, 10)),
}
# The demo's numbers are our own, found by trying on two CPU cores.
DEMO = dict(model="RN-micro", data="scenes-zh-6000", batch_size=64, recipe_lr=1e-3, lr_batch=64, warmup=20,
            log_every=50)
# So are these (docs/experiments.md). Random weights have nothing to lose by a high rate, at any batch.
SMALL_FROM_NOTHING = dict(recipe_lr=1e-3, lr_batch=1, batch_size=64, min_steps=300)

# ------------------------------------------------------------------------------------------------------------
# the recipes

# What a recipe starts from: flags that must be given, in one of several groups.
NOTHING, FINE_TUNING = (), (("data", "init"),)
BOTH_TOWERS = ("data", "image_init", "text_init"), ("data", "init")
RECIPES = {  # name: (for --help, what it starts from)
    "demo": ("drawn scenes in three acts: English pairs, then stage 1 and stage 2 on Chinese ones", NOTHING),
    "compare": ("figure 2: two stages, direct tuning, stage 1 alone and from scratch; an hour", NOTHING),
    "pretrain": ("stage 1, then stage 2 from its best weights (section 2.3)", BOTH_TOWERS),
    "stage1": ("the image tower is frozen (table 8, appendix A.2)", BOTH_TOWERS),
    "stage2": ("both towers train (appendix A.2)", BOTH_TOWERS),
    "scratch": ("one stage, from random weights (section 3.1.3)", (("data", "model"),)),
    "direct": ("one stage, no frozen tower (section 3.1.3)", BOTH_TOWERS),
    "muge": ("fine-tuning (table 9)", FINE_TUNING),
    "flickr30k-cn": ("fine-tuning (table 9)", FINE_TUNING),
    "coco-cn": ("fine-tuning (table 9)", FINE_TUNING),
    "icr": ("fine-tuning on captions of 128 tokens (appendix A.4), the rest from MUGE's row", FINE_TUNING),
}


def acts_of(recipe: str, name: str) -> dict[str, dict]:
    """The acts of a recipe for the model of this name, in the order in which they run -> {act: its flags}.
    "@act" stands for the best weights of an earlier act."""
    if recipe in ("pretrain", "stage1") and name == "ViT-L-14-336":
        raise ConfigError(f"--recipe {recipe}: ViT-L-14-336 has no stage 1 (appendix A.2); "
                          "--recipe stage2 --init ViT-L-14, whose positions are interpolated")
    small = model.MODELS[name].text.width < 768
    if small and recipe == "scratch":
        print(f"--recipe scratch: the paper has no numbers for {name}; these are our own")
    elif recipe in ("pretrain", "stage1", "stage2", "scratch", "direct") and name not in APPENDIX_A2:
        print(f"--recipe {recipe}: the paper has no numbers for {name}; these are ViT-B-16's")
    stage_1_epochs, stage_2_batch, stage_2_epochs = APPENDIX_A2.get(name, APPENDIX_A2["ViT-B-16"])
    if recipe == "demo":
        chinese = DEMO | dict(recipe_lr=2e-3)
        return {"english": DEMO | dict(data="scenes-en", steps=800, eval_every=200),
                "stage1": chinese | dict(image_init="@english", freeze_image=True, steps=150, eval_every=75),
                "stage2": chinese | dict(init="@stage1", steps=550, eval_every=110)}
    if recipe == "compare":
        return comparison(**acts_of("demo", name))
    if recipe == "pretrain":
        return acts_of("stage1", name) | {"stage2": acts_of("stage2", name)["stage2"] | dict(init="@stage1")}
    if recipe == "stage1":
        return {recipe: STAGE_1 | dict(freeze_image=True, epochs=stage_1_epochs)}
    if recipe == "stage2":
        return {recipe: STAGE_2 | dict(batch_size=stage_2_batch, epochs=stage_2_epochs)}
    if recipe in ("scratch", "direct"):  # section 3.1.3 names no numbers for them, so these are stage 1's
        own = SMALL_FROM_NOTHING if small else dict(lr_batch=1)
        return {recipe: STAGE_1 | dict(epochs=stage_1_epochs or APPENDIX_A2["ViT-L-14"][0])
                | (own if recipe == "scratch" else {})}
    if name not in TABLE_9:
        print(f"--recipe {recipe}: table 9 has no row for {name}; this rehearses with ViT-B-16's numbers")
    row = TABLE_9.get(name, TABLE_9["ViT-B-16"])
    batch, lr, epochs, warmup = row[DATA_SETS.index("muge" if recipe == "icr" else recipe)]
    return {recipe: TABLE_8 | peak(lr) | dict(context_length=128 if recipe == "icr" else 52,
                                              batch_size=batch, epochs=epochs, warmup=warmup)}


def check_start(recipe: str, given: dict):
    """ConfigError, with the command that was meant, if a recipe lacks what it starts from, or if the demo,
    which draws its own pairs, is given some."""
    groups = RECIPES[recipe][1]
    foreign = [name for name in ("data", "init", "image_init", "text_init") if given.get(name)]
    if recipe == "compare" and given.get("data", "").startswith("scenes-zh"):
        foreign.remove("data")  # another number of scenes
    if foreign and not groups:
        raise ConfigError(
            f"{as_flag(foreign[0])}: --recipe {recipe} draws its own pairs and starts from nothing; for "
            "your pairs --recipe muge --init ViT-B-16 (fine-tuning) or --recipe scratch (from nothing)")
    if recipe == "scratch" and foreign[1:] and not given.get("lr"):
        raise ConfigError(f"{as_flag(foreign[-1])}: --recipe scratch has the rate of random weights, which "
                          "would destroy those; --recipe direct keeps them, or give --lr")
    lacking = [[as_flag(name) for name in group if not given.get(name)] for group in groups]
    if groups and all(lacking):
        examples = {"--data": "--data scenes-zh, which is drawn", "--model": "--model RN-mini for a laptop"}
        hint = ("for example " + " and ".join(examples[name] for name in lacking[0])
                if examples.keys() >= set(lacking[0]) else
                "--recipe scratch trains from nothing, and --init ViT-B-16 is a released model")
        raise ConfigError(f"--recipe {recipe} needs {', or '.join(map(' and '.join, lacking))}; {hint}")


def resolve_start(start: str, out: str) -> str:
    """The name or path that an act in the folder `out` starts from. "@act" is the best weights of that act in
    the folder beside this one, wherever both have been moved."""
    return os.path.join(os.path.dirname(out), start[1:], "best.safetensors") if start[:1] == "@" else start


# ------------------------------------------------------------------------------------------------------------
# the command line


def parse(argv: list[str] | None) -> dict[str, Config]:
    """Command line -> {act: Config}. ConfigError or SystemExit if it is wrong."""
    needs = {name: ", or ".join(" ".join(map(as_flag, group)) for group in groups) or "nothing"
             for name, (_, groups) in RECIPES.items()}
    parser = Flags(
        "python train.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a Chinese CLIP. Without flags: the demo, a few minutes on two CPU cores.",
        epilog="recipes:\n" + "\n".join(
            f"  {name:14}{text}; needs {needs[name]}" for name, (text, _) in RECIPES.items()))
    parser.add_argument("--recipe", default="demo", choices=RECIPES, metavar="NAME",
                        help="fills in the flags below; any that you give wins (default: demo)")
    parser.add_argument("--show", action="store_true",
                        help="print what the recipe sets for this model and batch, and stop")
    for f in dataclasses.fields(Config):
        default = f" (default: {f.default})" if str(f.default) not in ("", "False") else ""
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"], metavar={str: "TEXT", int: "N", float: "X"}[f.type])
        parser.add_argument(as_flag(f.name), default=argparse.SUPPRESS,
                            help=f.metadata["help"] + default, **kind)
    given = vars(parser.parse_args(argv))
    recipe, show = given.pop("recipe"), given.pop("show")
    if not show:
        check_start(recipe, given)
    acts = acts_of(recipe, given.get("model", Config.model))
    acts = {act: fill_in(act, flags, given, alone=len(acts) == 1) for act, flags in acts.items()}
    for act, cfg in acts.items():
        validate(cfg)
        if show:
            print(f"{act}: {shown(cfg)}\n   peak lr {cfg.peak_lr:.2e} at batch {cfg.batch_size:,}; "
                  "the flags that are not named have the defaults of --help")
    if show:
        parser.exit()
    return acts


def shown(cfg: Config) -> str:
    """The flags of a run, but for --out, that are not the defaults, as one would type them."""
    flags = ((as_flag(f.name), getattr(cfg, f.name), f.default) for f in dataclasses.fields(cfg))
    return " ".join(name if value is True else f"{name} {shlex.quote(str(value))}"
                    for name, value, default in flags if value != default and name != "--out")


def fill_in(act: str, flags: dict, given: dict, alone: bool) -> Config:
    """One act's Config: the defaults, over them its recipe's flags, over these the given ones. An act that
    starts from an earlier one keeps doing so."""
    if any(str(value).startswith("@") for value in flags.values()):
        given = {k: v for k, v in given.items() if k not in ("init", "image_init", "text_init")}
    if flags.get("data") == "scenes-en":
        given = {k: v for k, v in given.items() if k != "data"}
    if "epochs" in given:
        given = dict(steps=0, min_steps=0) | given
    cfg = Config(**flags | given | dict(out=os.path.join(given.get("out", Config.out), act)))
    if alone:
        return cfg
    # among several acts, these flags are for those that can use them
    unusable = dict(patch_drop=0.0) if cfg.freeze_image else dict(cache_features=0)
    return dataclasses.replace(cfg, **unusable, lora=cfg.lora * can_adapt(cfg))


def can_adapt(cfg: Config) -> bool:
    """Whether the towers that train start from trained weights, beside which LoRA may train others."""
    return bool(cfg.init or cfg.text_init and (cfg.image_init or cfg.freeze_image))


def as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def validate(cfg: Config):
    """ConfigError for flags that no run could use."""
    for f in dataclasses.fields(cfg):
        value, low, below = getattr(cfg, f.name), f.metadata["low"], f.metadata["below"]
        if f.type in (int, float) and not low <= value < below:
            wanted = f"{low} or more" + (f", less than {below}" if below < math.inf else "")
            raise ConfigError(f"{as_flag(f.name)} {value}: expected {wanted}")
    taken = cfg.out  # the first part of the path that exists
    while taken and not os.path.exists(taken):
        taken = os.path.dirname(taken)
    positions = model.MODELS[cfg.model].text.max_positions
    is_vit = isinstance(model.MODELS[cfg.model].visual, model.ViTConfig)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for wrong, text in (
        (cfg.context_length > positions, f"--context-length {cfg.context_length}: expected 2 to {positions}"),
        (cfg.batch_size % world_size,
         f"--batch-size {cfg.batch_size}: expected a multiple of the {world_size} processes"),
        (re.search(r"\.tar\s*(,|$)", cfg.data) and not cfg.valid_data,
         f"--data {cfg.data}: a pattern has no validation split; name one by --valid-data"),
        (os.path.isfile(taken), f"--out: {taken} is a file; name a folder, which need not exist"),
        (cfg.out[0] == "~" or os.sep == "/" and "\\" in cfg.out,
         f"--out {os.path.dirname(cfg.out)}: expected a path with /; quoted, ~ is not the home folder"),
        (cfg.steps == 0 and cfg.epochs == 0, "--epochs 0: expected more than 0, or --steps"),
        (cfg.cache_features and not cfg.freeze_image,
         "--cache-features: only a frozen image tower has features to cache; --freeze-image"),
        (cfg.cache_features and cfg.teacher,
         "--cache-features: a --teacher looks at pictures, which cached features replace; drop one of them"),
        (cfg.patch_drop and not is_vit, f"--patch-drop: {cfg.model} has no patches to drop"),
        (cfg.patch_drop and cfg.freeze_image,
         "--patch-drop: a frozen image tower sees all patches; --cache-features saves its time"),
        (cfg.lora and not can_adapt(cfg), "--lora: random weights are nothing to adapt; name trained ones by "
         "--init, or by --text-init and --image-init"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
    ):
        if wrong:
            raise ConfigError(text)
