"""The paper's numbers, and what a wrong command gets."""

import dataclasses
import math
import os
import shlex

import pytest
from conftest import ROOT, TINY

from training import recipes
from training.recipes import ConfigError, parse

TOWERS = ["--data", "x", "--image-init", "a", "--text-init", "b"]
TUNED = ["--data", "x", "--init", "a"]


def test_recipes_are_the_papers():
    cfg = parse(["--recipe", "flickr30k-cn", "--model", "ViT-H-14", *TUNED])["flickr30k-cn"]
    assert (cfg.batch_size, cfg.peak_lr, cfg.epochs, cfg.warmup) == (4096, 6e-6, 18, 6)  # table 9, last row
    cfg = parse(["--recipe", "icr", "--model", "ViT-L-14", *TUNED])["icr"]
    assert cfg.context_length == 128  # appendix A.4
    acts = parse(["--recipe", "pretrain", "--model", "RN50", *TOWERS])
    one, two = acts["stage1"], acts["stage2"]
    assert (one.batch_size, one.peak_lr, one.epochs) == (32768, 1e-4, 20)
    assert (one.freeze_image, one.image_init) == (True, "a")
    assert (two.batch_size, two.peak_lr, two.epochs, two.freeze_image) == (16384, 2e-5, 44, False)
    assert (two.init, two.image_init) == ("@stage1", "")
    assert recipes.resolve_start("@stage1", two.out) == os.path.join("out", "stage1", "best.safetensors")


# pairs of training, about (as remembered)
PAIRS = {"muge": 250_314, "flickr30k-cn": 148_915, "coco-cn": 20_065}


@pytest.mark.parametrize("name", recipes.TABLE_9)
@pytest.mark.parametrize("data_set", PAIRS)
def test_warm_up_and_steps_are_table_9s(name, data_set):
    """All fifteen: no warm-up is cut, and an epoch is of whole batches, as the official code counts."""
    cfg = parse(["--recipe", data_set, "--model", name, *TUNED])[data_set]
    total = recipes.schedule(cfg, PAIRS[data_set])[0]
    assert total == cfg.epochs * math.ceil(PAIRS[data_set] / cfg.batch_size)
    row = recipes.TABLE_9[name][recipes.DATA_SETS.index(data_set)]
    assert recipes.warmup_steps(cfg, total) == cfg.warmup == row[3]


def test_stage_2_of_vit_h_keeps_its_warm_up():
    cfg = parse(["--recipe", "stage2", "--model", "ViT-H-14", *TUNED])["stage2"]
    assert recipes.warmup_steps(cfg, recipes.schedule(cfg, 200_000_000)[0]) == 5000


def test_the_336_model_goes_on_from_the_224_one(capsys):
    """Appendix A.2: two epochs from ViT-L-14's weights, and no stage 1."""
    cfg = parse(["--recipe", "stage2", "--model", "ViT-L-14-336", *TUNED])["stage2"]
    assert (cfg.epochs, cfg.peak_lr) == (2, 2e-5) and "no numbers" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no stage 1 .*--recipe stage2 --init ViT-L-14"):
        parse(["--recipe", "pretrain", "--model", "ViT-L-14-336", *TOWERS])


@pytest.mark.parametrize("argv, words", [
    (["--recipe", "muge", "--data", "x"], "--recipe muge needs --init"),
    (["--recipe", "muge", "--init", "a"], "--recipe muge needs --data"),
    (["--recipe", "coco-cn"], "needs --data and --init"),
    (["--recipe", "icr", "--data", "x", "--image-init", "a"], "--recipe icr needs --init"),
    (["--recipe", "stage1", "--data", "x", "--image-init", "a"], "needs --text-init, or --init"),
    (["--recipe", "stage2", "--data", "x"], "needs --image-init and --text-init, or --init"),
    (["--recipe", "pretrain", "--data", "x"], "--recipe scratch trains from nothing"),
    (["--recipe", "direct", *TUNED[2:]], "--data"),
    (["--recipe", "scratch"], "--recipe scratch needs --data and --model"),
    (["--recipe", "scratch", *TUNED], "--init: --recipe scratch has the rate of random weights"),
    (["--data", "photos"], "--data: --recipe demo draws its own pairs"),
    (["--recipe", "compare", "--init", "a"], "--init: --recipe compare"),
    (["--image-init", "a"], "--image-init: --recipe demo"),
])
def test_a_recipe_asks_for_what_it_needs(argv, words):
    with pytest.raises(ConfigError, match=words):
        parse(argv)


def test_lora_takes_three_times_the_rate():
    full, low_rank = (parse(["--recipe", "muge", *TUNED, "--batch-size", "128", *more])["muge"].peak_lr
                      for more in ([], ["--lora", "8"]))
    assert low_rank == pytest.approx(3 * full) == pytest.approx(3 * 5e-5 * 128 / 1024, rel=0.01)
    assert parse(["--recipe", "muge", *TUNED, "--lora", "8", "--lr", "1e-3"])["muge"].peak_lr == 1e-3


def test_rate_falls_with_the_batch_unless_it_was_given():
    muge = ["--recipe", "muge", "--model", "ViT-B-16", *TUNED]
    assert parse([*muge])["muge"].peak_lr == 2e-5  # table 9
    scaled = parse([*muge, "--batch-size", "128"])["muge"].peak_lr
    assert math.isclose(scaled, 5e-5 * 128 / 1024, rel_tol=0.01)
    assert parse([*muge, "--batch-size", "128", "--lr", "3e-6"])["muge"].peak_lr == 3e-6


@pytest.mark.parametrize("batch", [16, 64, 256, 1024])
def test_training_from_nothing_has_a_rate_of_its_own(batch):
    """It does not fall with the batch, for random weights have nothing to lose. A set of 150 pairs gets more
    steps than 44 passes over it would have, unless --epochs says otherwise."""
    argv = ["--recipe", "scratch", "--data", "x", "--batch-size", str(batch)]
    small = parse([*argv, "--model", "RN-mini"])["scratch"]
    assert small.peak_lr == 1e-3 and parse([*argv, "--model", "ViT-B-16"])["scratch"].peak_lr == 1e-4
    assert recipes.schedule(small, 150)[0] == max(300, 44 * math.ceil(150 / batch))
    two_epochs = parse([*argv, "--model", "RN-mini", "--epochs", "2"])["scratch"]
    assert recipes.schedule(two_epochs, 150)[0] == 2 * math.ceil(150 / batch)


def test_a_small_model_rehearses_with_the_papers_schedule(capsys):
    cfg = parse(["--recipe", "muge", "--model", "RN-mini", *TUNED])["muge"]
    assert "table 9 has no row for RN-mini; this rehearses with ViT-B-16's numbers" in capsys.readouterr().out
    assert (cfg.batch_size, cfg.epochs, cfg.warmup) == (12800, 20, 40)


def test_show_prints_a_recipe_as_one_would_type_it(capsys):
    """Nothing has to be given for that; what it prints gives the same run."""
    with pytest.raises(SystemExit) as end:
        parse(["--recipe", "pretrain", "--model", "RN50", "--batch-size", "64", "--show"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and [line.split(":")[0] for line in lines[::2]] == ["stage1", "stage2"]
    assert "--freeze-image --augment auto --batch-size 64 --epochs 20 " in lines[0]
    assert "peak lr 3.13e-06 at batch 64" in lines[1]
    words = shlex.split(lines[0])[1:]
    shown = parse(["--recipe", "stage2", *TUNED, *words])["stage2"]  # where every number is another
    meant = parse(["--recipe", "pretrain", "--model", "RN50", "--batch-size", "64", *TUNED])["stage1"]
    assert dataclasses.replace(shown, out="", data="", init="") == dataclasses.replace(meant, out="", data="", init="")


def test_every_flag_is_read_somewhere():
    files = ROOT / "train.py", *(ROOT / "training").glob("*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for f in dataclasses.fields(recipes.Config):
        assert f"cfg.{f.name}" in source, f.name


def test_cached_features_are_for_the_acts_with_a_frozen_tower():
    acts = parse(["--recipe", "pretrain", *TOWERS, "--cache-features", "3"])
    assert [acts[act].cache_features for act in ("stage1", "stage2")] == [3, 0]
    with pytest.raises(ConfigError, match="only a frozen image tower"):
        parse(["--recipe", "stage2", *TUNED, "--cache-features", "3"])


@pytest.mark.parametrize("unit, flags, chosen", [
    ("amx_bf16", [], "bfloat16"), ("", [], "float32"), ("avx512_bf16", ["--model", "RN-micro"], "float32"),
    ("amx_bf16", ["--precision", "float32"], "float32"), ("", ["--precision", "float16"], "float16")])
def test_a_cpu_computes_in_what_it_is_good_at(unit, flags, chosen, monkeypatch):
    monkeypatch.setattr(recipes.torch.cpu, "get_capabilities", lambda: {unit: True, "avx2": True})
    (cfg,) = parse(["--recipe", "muge", *TUNED, *flags]).values()
    assert str(recipes.choose_precision(cfg, recipes.torch.device("cpu"))) == f"torch.{chosen}"


def test_a_pattern_of_shards_is_not_its_own_validation_split(tmp_path):
    for source in ("a/{0..1}.tar", "a/0.tar,photos", "photos, a/*.tar"):
        with pytest.raises(ConfigError, match="--valid-data"):
            parse(["--recipe", "scratch", "--model", "RN-mini", "--data", source, "--out", str(tmp_path)])


@pytest.mark.parametrize("argv", [
    ["--lr", "-1"], ["--lr", "nan"], ["--recipe-lr", "-1"], ["--weight-decay", "-1"], ["--beta2", "1.5"], ["--eps", "-1"],
    ["--epochs", "nan"], ["--epochs", "inf"], ["--epochs", "-1"], ["--warmup", "-1"], ["--lr-batch", "0"],
    ["--distill", "inf"], ["--save-minutes", "-1"], ["--patch-drop", "1"], ["--eval-every", "-1"],
    ["--freeze-image", "--patch-drop", "0.5"]])
def test_numbers_out_of_range_are_refused(argv):
    with pytest.raises(ConfigError, match=argv[-2]):
        parse([*TINY[:4], "--data", "x", *argv])


def test_patches_are_dropped_where_the_image_tower_trains():
    acts = parse(["--recipe", "pretrain", *TOWERS, "--patch-drop", "0.5"])
    assert [acts[act].patch_drop for act in ("stage1", "stage2")] == [0, 0.5]
