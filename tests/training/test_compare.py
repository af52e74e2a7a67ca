"""Figure 2: which runs there are, which rate a seed takes, what the table and the curves say."""

import pytest

from training import compare, recipes


def history(*recalls: float, batch: int = 64) -> list[dict]:
    return [{"step": n, "samples": n * batch, "mean_recall": recall} for n, recall in enumerate(recalls)]


@pytest.fixture
def histories() -> dict[str, list[dict]]:
    """Two ways, two seeds: direct is best at 0.001, two stages at 0.003."""
    return {
        "english-seed0": history(1, 50), "stage1-seed0": history(1, 30),
        "direct-seed0-lr0.0003": history(1, 40, 60), "direct-seed0-lr0.001": history(1, 45, 70),
        "direct-seed0-lr0.003": history(1, 90, 50),
        "stage2-seed0-lr0.0003": history(30, 40), "stage2-seed0-lr0.001": history(30, 50),
        "stage2-seed0-lr0.003": history(30, 60),
        "stage1-seed1": history(1, 20), "direct-seed1": history(1, 55, 74), "stage2-seed1": history(20, 68),
    }


def test_every_way_sees_the_same_pairs_equally_often():
    acts = recipes.parse(["--recipe", "compare"])
    demo = recipes.parse([])
    steps = compare.STAGE_1["steps"] + compare.STAGE_2["steps"]
    assert len(acts) == 5 * 2 + 4 * 3 + 4 * 4
    for act, cfg in acts.items():
        way, seed = act.split("-")[0], int(act.split("-seed")[1][0])
        assert cfg.seed == seed and cfg.data == ("scenes-en" if way == "english" else demo["stage2"].data)
        own = {"english": 1600, "stage1": 100, "stage2": 200}
        assert cfg.steps == own.get(way, steps)
        assert cfg.freeze_image == (way in ("stage1", "locked"))
        starts = {"english": ("", ""), "scratch": ("", ""), "stage2": (f"@stage1-seed{seed}", "")}
        assert (cfg.init, cfg.image_init) == starts.get(way, ("", f"@english-seed{seed}"))
    names = list(acts)
    for act, cfg in acts.items():  # what an act starts from has run before it
        for start in filter(None, (cfg.init, cfg.image_init)):
            assert names.index(start[1:]) < names.index(act)
    rates = [cfg.lr for act, cfg in acts.items() if act.startswith("direct-seed0")]
    assert rates == list(compare.RATES) and acts["direct-seed1"].lr == 0 and acts["stage1-seed0"].lr == 1e-3


def test_another_number_of_chinese_scenes():
    acts = recipes.parse(["--recipe", "compare", "--data", "scenes-zh-500"])
    assert {cfg.data for cfg in acts.values()} == {"scenes-en", "scenes-zh-500"}
    with pytest.raises(recipes.ConfigError, match="--data: --recipe compare draws its own pairs"):
        recipes.parse(["--recipe", "compare", "--data", "photos"])
    with pytest.raises(recipes.ConfigError, match="--data: --recipe demo draws its own pairs"):
        recipes.parse(["--data", "scenes-zh-500"])


@pytest.mark.parametrize("act, lr", [
    ("direct-seed1", 0.001), ("stage2-seed1", 0.003), ("scratch-seed1", 0), ("stage1-seed1", 0), ("muge", 0),
    ("direct-seed0-lr0.003", 0.003)])
def test_later_seeds_take_the_rate_that_ended_best(act, lr, histories):
    """Not the one that was best in between (90 of direct at 0.003)."""
    cfg = recipes.Config(lr=0.003 if "-lr" in act else 0)
    assert compare.at_best_rate(act, cfg, histories).lr == lr


def test_stage_2_goes_on_where_its_seeds_stage_1_ended(histories):
    """Each seed's stage 1 is 64 pairs long, and is a part of each of its runs in two stages."""
    curves = compare.curves(histories)
    assert curves == {
        "direct tuning, lr 0.001": [[(0, 1), (64, 45), (128, 70)], [(0, 1), (64, 55), (128, 74)]],
        "two stages, lr 0.003": [[(0, 1), (64, 30), (64, 30), (128, 60)], [(0, 1), (64, 20), (64, 20), (128, 68)]]}


def test_the_table(histories):
    """Of 70 and 74 the mean is 72, the deviation 2.8."""
    assert compare.table(histories).splitlines()[1:] == [
        "direct tuning           60.0       70.0       50.0       |            72.0        2.8    70.0     74.0",
        "two stages              40.0       50.0       60.0       |            64.0        5.7    60.0     68.0"]


def test_other_recipes_compare_nothing():
    assert compare.curves({"stage1": history(1), "stage2": history(2), "scratch": history(3)}) == {}
