"""Looking up the paper's figures: the right row, the right baseline, the right gap."""

import pytest

from sources.pairs import DataError
from tools.measure import published


EVERY = (*published.RETRIEVAL, "table12")


@pytest.mark.parametrize("path, expected", [
    ("path/to/MUGE", ("table2", "MUGE")), ("flickr30k_cn", ("table3", "Flickr30K-CN")),
    ("coco-cn/", ("table4", "COCO-CN")), ("my/labels/cifar-100.txt", ("table12", "cifar-100")),
    ("icr", ("table10", "ICR")), ("cifar-100", ("table12", "cifar-100")), ("emoji-cn", ("", ""))])
def test_tables_are_found_by_the_name_of_the_data(path, expected):
    assert published.figures_for("", "ViT-B-16", path, EVERY) == (*expected, "zero-shot")
    assert published.figures_for("", "my.safetensors", path, EVERY)[0] == ""  # which may be finetuned


def test_what_is_asked_for_in_words():
    assert published.figures_for("muge finetune", "my.pt", "mine", EVERY) == ("table2", "MUGE", "finetune")
    for wrong in ("MUGE", "MUGE zeroshot", "emoji zero-shot", " "):
        with pytest.raises(DataError, match="Flickr30K-CN"):
            published.figures_for(wrong, "my.pt", "MUGE", EVERY)


RESULT = {"text_to_image": {"R@1": 52.0, "R@5": 77.0, "R@10": 84.0, "mean": 71.0},
          "image_to_text": {"R@1": 40.0, "R@5": 60.0, "R@10": 80.0, "mean": 60.0}, "mean_recall": 65.5}


def test_mr_is_the_mean_of_what_the_table_prints():
    assert published.retrieval_columns(RESULT, "table2") == {
        "t2i_R@1": 52.0, "t2i_R@5": 77.0, "t2i_R@10": 84.0, "MR": 71.0}
    assert published.retrieval_columns(RESULT, "table10")["MR"] == 65.5
    assert list(published.retrieval_columns(RESULT, "table3")) == [
        f"{way}_R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]


def test_gap_and_best_baseline_of_table_2():
    rows = published.compare(
        published.retrieval_columns(RESULT, "table2"), "table2", "MUGE", "zero-shot", "ViT-B-16")
    assert [row["published"] for row in rows] == [52.1, 76.7, 84.4, 71.1]
    assert [row["gap"] for row in rows] == pytest.approx([-0.1, 0.3, -0.4, -0.1])
    assert [row["best_baseline"] for row in rows] == [49.5, 75.7, 83.2, 69.5]
    assert {row["best_baseline_model"] for row in rows} == {"R2D2 ViT-L-14"}
    text = published.comparison_table(rows)
    assert "MUGE MR" in text and "71.1   -0.1" in text and "69.5 R2D2 ViT-L-14" in text


def test_classification_takes_the_model_from_table_12_and_the_baselines_from_table_5():
    (row,) = published.compare({"cifar-10": 90.0}, "table12", "cifar-10", "zero-shot", "RN50")
    assert (row["published"], row["best_baseline"], row["best_baseline_model"]) == (72.7, 95.4, "Wukong")
    (row,) = published.compare({"cifar-10": 90.0}, "table5", "cifar-10", "zero-shot", "RN50")
    assert row["published"] == 96.0  # the best of the five, as Table 5 prints
    (row,) = published.compare({"gtsrb": 20.0}, "table12", "gtsrb", "zero-shot", "RN50")
    assert (row["published"], row["best_baseline"]) == (22.3, None)  # not in Table 5


def test_a_model_that_the_paper_has_not_keeps_the_baselines():
    rows = published.compare({"MR": 50.0}, "table2", "MUGE", "finetune", "")
    assert (rows[0]["published"], rows[0]["gap"], rows[0]["best_baseline"]) == (None, None, 77.5)
    assert "-" in published.comparison_table(rows)
