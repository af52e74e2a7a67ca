"""The interfaces of cn_clip.clip and OpenAI's clip: every call of their examples, and what is refused."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, difference
from PIL import Image
from checkpoints import RN, VIT, built, official, refusal, same, saved

from weights import download
import model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a small model in the place of the ViT-B-16 that cn_clip puts there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "nowhere"))
    saved(tmp_path, official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    Image.new("RGB", (40, 30), "red").save("pokemon.jpeg")
    return tmp_path


def test_the_example_of_cn_clip(here):
    """Each call of the example in the README of cn_clip 1.6.0, with its arguments and another import."""
    import model as clip
    from model import available_models, load_from_name
    assert "ViT-B-16" in available_models()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, preprocess = load_from_name("ViT-B-16", device=device, download_root="./")
    loaded.eval()
    image = preprocess(Image.open("pokemon.jpeg")).unsqueeze(0).to(device)
    text = clip.tokenize(["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]).to(device)
    with torch.no_grad():
        image_features = loaded.encode_image(image)
        text_features = loaded.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)
        logits_per_image, logits_per_text = loaded.get_similarity(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 4) and abs(probs.sum() - 1) < 1e-5
    cosines = image_features @ text_features.T
    assert difference(logits_per_image, loaded.logit_scale.exp() * cosines) < 1e-5
    assert torch.equal(logits_per_text, logits_per_image.T)
    assert os.listdir(here).count("nowhere") == 0  # nothing was looked for, or put, elsewhere


def test_the_example_of_openai(here):
    """The same of the README of OpenAI's clip, with a name that is there and the similarity by its method."""
    import model as clip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, preprocess = clip.load("ViT-B/16", device=device, jit=False, download_root=".")
    image = preprocess(Image.open("pokemon.jpeg")).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
    with torch.no_grad():
        assert loaded.encode_image(image).shape == (1, 16) and loaded.encode_text(text).shape == (3, 16)
        assert loaded.get_similarity(image, text)[0].shape == (1, 3)


def test_every_listed_name_loads(here):
    """Each is fetched by its name; a small model stands for all of them."""
    assert set(model.available_models()) == set(download.COMPLETE) > set(download.RELEASED)
    state = built(VIT).state_dict()
    for name in model.available_models():
        saved(here, official(state), download.SOURCES[name].rsplit("/", 1)[-1])
        for loader in (model.load, model.load_from_name):
            assert same(loader(name, "cpu", download_root=str(here))[0].state_dict(), state)


@pytest.mark.parametrize("theirs, ours", [("ViT-L/14@336px", "ViT-L-14-336"), ("ViT-L/14", "ViT-L-14")])
def test_names_as_openai_spells_them(theirs, ours, here):
    path = saved(here, official(built(VIT).state_dict()), download.SOURCES[ours].rsplit("/", 1)[-1])
    assert same(model.load(theirs, download_root=str(here))[0].state_dict(), model.load(path)[0].state_dict())
    os.makedirs(theirs)  # what is there goes before a name
    saved(here / theirs, built(RN).state_dict(), "pytorch_model.bin")
    assert model.load(theirs, download_root=str(here))[0].config == model.MODELS[RN]


def test_a_name_that_was_never_released():
    assert "ViT-B/32: no such file or folder" in refusal(model.load, "ViT-B/32")


def test_a_file_with_the_names_of_its_towers(tmp_path, monkeypatch):
    """As cn_clip wants them of a path. Here the tensors say what it is, and what they do not is refused."""
    path = saved(tmp_path, official(built(VIT).state_dict()))
    monkeypatch.setitem(model.TEXT_TOWERS, "tiny-chinese", model.MODELS[VIT].text)
    right = dict(vision_model_name=VIT, text_model_name="tiny-chinese", input_resolution=32)
    assert model.load_from_name(path, "cpu", None, *right.values())[0].config == model.MODELS[VIT]
    for argument, wrong in (("vision_model_name", "ViT-B-16"), ("vision_model_name", "nothing"),
                            ("text_model_name", "RBT3-chinese"), ("input_resolution", 224)):
        message = refusal(model.load_from_name, path, **right | {argument: wrong})
        assert f"{argument}={wrong!r}" in message and str(right[argument]) in message


def test_the_text_towers_have_cn_clips_names():
    towers = {name: model.MODELS[name].text for name in download.RELEASED}
    assert towers == {
        "RN50": model.TEXT_TOWERS["RBT3-chinese"],
        "ViT-H-14": model.TEXT_TOWERS["RoBERTa-wwm-ext-large-chinese"],
        **{name: model.TEXT_TOWERS["RoBERTa-wwm-ext-base-chinese"]
           for name in ("ViT-B-16", "ViT-L-14", "ViT-L-14-336")}}


def test_what_cannot_be_done_is_not_passed_over(tmp_path):
    path = saved(tmp_path, official(built(VIT).state_dict()))
    with pytest.raises(ValueError, match="jit=True"):
        model.load(path, jit=True)
    model.load(path, "cpu", False)  # OpenAI's third argument is jit
    with pytest.raises(ValueError, match="jit=True"):
        model.load(path, "cpu", True)
    with pytest.raises(TypeError, match="use_modelscope"):
        model.load_from_name(path, use_modelscope=True)
    with pytest.raises(TypeError, match="truncate"):
        model.tokenize("一只猫", truncate=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_type_may_be_a_word(dtype, tmp_path):
    path = saved(tmp_path, official(built(VIT).state_dict()))
    word = str(dtype).removeprefix("torch.")
    by_word, by_type = (model.load(path, dtype=d)[0].state_dict() for d in (word, dtype))
    assert by_word["text_projection"].dtype == dtype and same(by_word, by_type)


def test_released_models_are_models():
    assert set(download.RELEASED) < set(model.MODELS) and set(download.RELEASED) < set(download.SOURCES)


@pytest.mark.parametrize("way", ["PYTHONPATH", "sys.path"])
def test_a_script_elsewhere_finds_model_in_the_documented_ways(way, tmp_path):
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    assert "\nPYTHONPATH=path/to/zhclip python my_search.py\n" in page
    (line,) = re.findall(r"`(import sys; .*)`", page)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if way == "PYTHONPATH":
        line, environment = "", environment | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "my_search.py"
    script.write_text(f"{line}\nimport model\nprint(model.tokenize('猫').tolist()[0][:3])\n".replace(
        "path/to/zhclip", ROOT.as_posix()), encoding="utf-8")
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.stdout == "[101, 4344, 102]\n", ran.stderr
