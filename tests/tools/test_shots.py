"""Few shots: the formula by hand and against scikit-learn, the choice of the weight, and the command."""

import json
import math
import shutil

import pytest
import torch
from checkpoints import VIT, built
from conftest import features, says, typed
from stand_ins import picture, write_classes

import model
from eval import accuracy, encode_images, ensemble, sentence_features
from sources.classes import TEMPLATES, Classes, read_templates
from sources.pairs import DataError
from tools.measure import __main__ as measure
from tools.measure import shots
from tools.measure.shots import WEIGHTS, discriminant, few_shots

NAMES = ["猫", "船", "花"]


def test_two_classes_in_a_plane():
    """The shots (0, 0), (0, 4) | (2, 0), (2, 4) have the means (0, 2) and (2, 2), the covariance diag(0, 4)
    and v = 2. With n = 4 and E = 2, s = 2 / 5, and P = (3 / 5 * diag(0, 2) + 2 / 5 * I)^-1 is
    diag(5 / 2, 5 / 8). Then P m is (0, 5 / 4) and (5, 5 / 4), and m . P m / 2 is 5 / 4 and 25 / 4. So the two
    are equally likely where x1 is 1."""
    points = torch.tensor([[0.0, 0], [0, 4], [2, 0], [2, 4]])
    weights, biases = discriminant(points, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(weights, torch.tensor([[0, 5], [1.25, 1.25]], dtype=torch.float64))
    torch.testing.assert_close(biases, torch.tensor([-1.25, -6.25], dtype=torch.float64))


@pytest.mark.parametrize("C, each, E", [(3, 2, 5), (4, 9, 12), (2, 40, 3)])
def test_it_is_scikit_learns_linear_discriminant_analysis(C, each, E):
    """With the shrinkage s. There the shrunk covariance is (1 - s) S + s v I, so its inverse is P / v."""
    lda = pytest.importorskip("sklearn.discriminant_analysis", reason="scikit-learn is not installed")
    x, labels = features(0, C * each, E), torch.arange(C).repeat_interleave(each)
    s = E / (E + C * each - 1)
    theirs = lda.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(x.numpy(), labels.numpy())
    weights, biases = discriminant(x, labels)
    v = sum(((x[labels == c] - x[labels == c].mean(dim=0)) ** 2).sum() for c in range(C)) / (C * each * E)
    new = features(1, 50, E)
    scores = (new @ weights + biases) / v - math.log(C)  # the logarithm of equal priors
    expected = theirs.decision_function(new.numpy())
    if C == 2:  # gives the lead of the second class alone
        scores = scores[:, 1] - scores[:, 0]
    torch.testing.assert_close(scores, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(discriminant(x.float(), labels)[0], weights, rtol=1e-5, atol=1e-5)


def test_it_is_the_papers_formula_but_for_the_factor():
    x, labels = features(0, 12, 7), torch.arange(3).repeat_interleave(4)
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(3)])
    S = (x - means[labels]).T @ (x - means[labels]) / 12
    precision = 7 * torch.linalg.inv(11 * S + S.trace() * torch.eye(7))
    torch.testing.assert_close(discriminant(x, labels)[0] / (S.trace() / 7) * 7 / 18, precision @ means.T)


@pytest.mark.parametrize("copies", [1, 3])
def test_one_shot_of_each_class_makes_the_nearest_mean_win(copies):
    """Also when it comes three times, which leaves a covariance of rounding errors."""
    one, new = features(0, 6, 5), features(1, 40, 5)
    weights, biases = discriminant(one.repeat_interleave(copies, dim=0),
                                   torch.arange(6).repeat_interleave(copies))
    torch.testing.assert_close(weights, one.T * (5 + 6 * copies - 1) / 5)
    assert torch.equal((new @ weights + biases).argmax(dim=1), torch.cdist(new, one).argmin(dim=1))


@pytest.mark.parametrize("noise, names, chosen", [(1, [0, 1, 2], 30), (1, [1, 2, 0], 30), (6, [0, 1, 2], 1)])
def test_held_out_shots_choose_the_weight(noise, names, chosen):
    """If all is right with every weight, the largest is chosen, and so if the sentences are those of other
    classes; if the shots are hardly more than noise, a small one. In turn, each of four is held out."""
    sentences, labels = torch.eye(3, 40)[names], torch.arange(3).repeat_interleave(4)
    near = torch.nn.functional.normalize(torch.eye(3, 40)[labels] + noise / 6 * torch.randn(
        12, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    right = dict.fromkeys(WEIGHTS, 0)
    for turn in range(4):
        held = torch.arange(12) % 4 == turn
        W, biases = discriminant(near[~held], labels[~held])
        for weight in WEIGHTS:
            scores = near[held].double() @ (sentences.T.double() + weight * W) + weight * biases
            right[weight] += (scores.argmax(dim=1) == labels[held]).sum().item()
    new = features(1, 5, 40)
    scores, weight = few_shots(new, sentences, near, labels)
    assert weight == chosen == max(w for w in WEIGHTS if right[w] == max(right.values()))
    W, biases = discriminant(near, labels)
    torch.testing.assert_close(scores, new @ sentences.T.double() + weight * (new @ W + biases))


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 5, 9)])
def test_a_class_with_a_single_shot_leaves_none_to_hold_out(counts):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    weight = few_shots(features(0, 4), features(1, 3), features(2, len(labels)), labels)[1]
    assert weight == shots.LONE_WEIGHT


def test_a_shot_never_judges_the_weight_that_it_was_fitted_with(monkeypatch):
    """With two shots in the smallest class there are two halves, of every class; at last all are fitted."""
    fitted, labels = [], torch.tensor([0, 0, 0, 1, 1])
    monkeypatch.setattr(shots, "discriminant",
                        lambda x, y: (fitted.append((x[:, 0].tolist(), y.tolist())), discriminant(x, y))[1])
    some = torch.arange(1.0, 11).view(5, 2)
    few_shots(features(0, 4, 2), features(1, 2, 2), some, labels)
    assert fitted == [([3, 9], [0, 1]), ([1, 5, 7], [0, 0, 1]), ([1, 3, 5, 7, 9], [0, 0, 0, 1, 1])]
    fitted.clear()  # with many shots, quarters
    few_shots(features(0, 4), features(1, 2), features(2, 16), torch.arange(2).repeat_interleave(8))
    assert [len(labels) for _, labels in fitted] == [12, 12, 12, 12, 16]


# ------------------------------------------------------------------------------------------------------------
# the shots' folder


def named(folder, counts: dict[str, int], first: int = 0) -> str:
    """A folder of pictures for every class, all of them different."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for n in range(count):
            picture(first := first + 1).save(folder / name / f"{n}.png")
    return str(folder)


def open_named(folder: str, classes: list[str], taken=(), per_class: int = 0, seed: int = 0):
    return shots.open_shots(folder, "", Classes([[] for _ in classes], classes, classes), list(taken), per_class, seed)


def test_classes_are_matched_by_name_and_the_seed_picks(tmp_path):
    """The classes are in the order of the data, which need not be that of the shots; others are left out."""
    folder = named(tmp_path / "shots", {"船": 5, "猫": 6, "花": 3, "鱼": 1})
    get_image, labels = open_named(folder, NAMES)
    assert labels.tolist() == [0] * 6 + [1] * 5 + [2] * 3
    cats = {picture(n).tobytes() for n in range(6, 12)}  # after five of 船
    assert {get_image(row).tobytes() for row in range(6)} == cats

    def chosen(seed: int) -> list:
        get_image, labels = open_named(folder, NAMES, per_class=3, seed=seed)
        assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        return [get_image(row).tobytes() for row in range(9)]
    assert chosen(0) == chosen(0) and chosen(0) != chosen(1) and len(set(chosen(0))) == 9


def test_wrong_shots_are_one_line(tmp_path):
    folder = named(tmp_path / "shots", {"船": 2, "猫": 2})
    says(lambda: open_named(folder, NAMES), folder, "0 pictures of the class 花")
    says(lambda: open_named(folder, NAMES[:2], per_class=3), "2 pictures of the class 猫", "at least 3")
    says(lambda: open_named(f"{folder}/../shots", NAMES[:2], [f"{folder}/船/0.png"]), "船/0.png", "--data")
    several = Classes([[], []], NAMES[:2], NAMES[:2], metric="map-11")
    says(lambda: shots.open_shots(folder, "voc-2007", several, [], 0, 0), folder, "voc-2007", "several")


# ------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def command(tmp_path) -> list[str]:
    model.save(built(VIT), str(tmp_path / "clip"))
    write_classes(tmp_path / "data", NAMES, count=3)
    named(tmp_path / "shots", dict.fromkeys(NAMES, 4), first=100)
    return ["zeroshot", "--model", str(tmp_path / "clip"), "--data", str(tmp_path / "data"),
            "--device", "cpu", "--shots", str(tmp_path / "shots"), "--per-class", "2"]


def test_shots_beside_zero_shot(command, tmp_path, capsys):
    measure.main([*command, "--out", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.html")])
    result, printed = json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), capsys.readouterr().out
    few = result["few_shots"]
    assert few["shots"] == [2, 2] and few["weight"] in WEIGHTS and 0 <= few["accuracy"] <= 100
    line = (f"zero-shot {result['accuracy']:.1f} %, with 2 shots of each class {few['accuracy']:.1f} % "
            f"(weight {few['weight']:g})")
    assert line in printed.splitlines() and line in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [row["images"] for row in few["by_class"]] == [3, 3, 3]
    assert [row["images"] for row in result["by_class"]] == [3, 3, 3]
    measure.main([*command, "--out", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))["few_shots"] == few
    (tmp_path / "shots" / "花" / "0.png").unlink()
    measure.main(command[:-2])  # all of them
    assert "with 3 to 4 shots of each class" in capsys.readouterr().out


def test_the_command_gives_what_the_functions_give(command, tmp_path):
    measure.main([*command, "--seed", "3", "--out", str(tmp_path / "out.json")])
    few = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["few_shots"]
    clip = built(VIT)
    get_image, labels = open_named(str(tmp_path / "shots"), NAMES, per_class=2, seed=3)
    images = encode_images(clip, lambda row: picture(10 * (row // 3) + row % 3), 9)
    texts = ensemble(sentence_features(clip, NAMES, read_templates(TEMPLATES)))
    scores, weight = few_shots(images, texts, encode_images(clip, get_image, 6), labels)
    assert few["weight"] == weight
    assert few["accuracy"] == pytest.approx(accuracy(scores, torch.arange(3).repeat_interleave(3)))


def test_mistakes_before_anything_is_loaded(command, tmp_path):
    shutil.rmtree(tmp_path / "shots" / "花")
    says(lambda: measure.main(command), "0 pictures of the class 花")
    with pytest.raises(DataError, match="in --shots and in --data"):
        measure.main([*command[:-3], command[4], "--labels", str(tmp_path / "data" / "label_cn.txt")])
    for words, part in ((["--per-class", "-1"], "--per-class -1"),
                        (["--submission", "s.json"], "--submission")):
        code, said = typed("python -m tools.measure", *command, *words)
        assert code == 2 and part in said and len(said.strip().splitlines()) == 1
