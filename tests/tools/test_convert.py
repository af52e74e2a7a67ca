"""Every layout in and out: files as other programs write them, and as they read them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, difference, random_pixels
from PIL import Image
from checkpoints import RN, VIT, built, half, official, refusal, rounded, same, saved

from tools import weights
import data
from weights import download
import model
from weights import read
from model import MODELS
from weights.names import from_hugging_face, to_hugging_face
from weights.sizes import sizes_of
from weights.start import initialise

TEXTS = ["一只猫", "“红色”的灯笼，挂在树上！", "iPhone 15 Pro手机壳", "", "Ünïcödé café ﬁ", "长" * 80, "a" * 150,
         "tab\tnew\nline\u3000wide\u00a0hard\u200bnone\x00\x07\ufffd\ue000 private", "🙂旗: 中国",
         "𠀀𪜶 ‘single’…", "[MASK]猫[SEP]"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def features(clip) -> tuple[torch.Tensor, ...]:
    """What a model says of three pictures and the TEXTS."""
    pixels, ids = random_pixels(3, clip.config.visual.resolution), data.tokenize(TEXTS)
    with torch.no_grad():
        return clip.encode_image(pixels), clip.encode_text(ids), clip.get_similarity(pixels, ids)[0]


def theirs(hf, resolution: int) -> tuple[torch.Tensor, ...]:
    """The same from transformers, by the hidden states: its get_*_features changed what they return."""
    pixels, ids = random_pixels(3, resolution), data.tokenize(TEXTS)
    with torch.no_grad():
        image = hf.visual_projection(hf.vision_model(pixels).pooler_output)
        text = hf.text_projection(hf.text_model(ids, attention_mask=ids != 0).last_hidden_state[:, 0])
        return image, text, hf(ids, pixels, attention_mask=ids != 0).logits_per_image


def agree(ours, others, limit: float = 1e-5):
    for mine, other in zip(ours, others):
        assert difference(mine, other) < limit


def hugging_face(path, **how) -> transformers.ChineseCLIPModel:
    """A folder written by transformers itself: the sizes of ViT-tiny but for the heads, which no shape
    tells."""
    torch.manual_seed(5)
    config = transformers.ChineseCLIPConfig(
        projection_dim=16,
        text_config=dict(vocab_size=21128, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, hidden_dropout_prob=0.2),
        vision_config=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           image_size=32, patch_size=8, projection_dim=16))
    hf = transformers.ChineseCLIPModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    hf.save_pretrained(path, **how)
    return hf


# ------------------------------------------------------------------------------------------------------------
# Hugging Face in


@pytest.mark.parametrize("container", ["safetensors", "shards", "bin", "bin shards"])
def test_folders_of_hugging_face(container, tmp_path, capsys):
    sharded = "shards" in container
    hf = hugging_face(tmp_path, max_shard_size="1MB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    if "bin" in container:  # as they were written before safetensors
        for name in os.listdir(tmp_path):
            if name.endswith(".safetensors"):
                state = safetensors.torch.load_file(tmp_path / name)
                old = name.replace("safetensors", "bin").replace("model", "pytorch_model")
                torch.save(state, tmp_path / old)
                os.remove(tmp_path / name)
        if sharded:
            index = tmp_path / "model.safetensors.index.json"
            text = index.read_text().replace(".safetensors", ".bin").replace("model-", "pytorch_model-")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    clip, preprocess = model.load(str(tmp_path))
    assert "Hugging Face's names" in capsys.readouterr().out
    assert clip.config.visual.head_width == 8
    assert clip.config.text.heads == 4 and clip.config.text.dropout == 0.2
    assert preprocess.keywords == {"resolution": 32}
    agree(features(clip), theirs(hf, 32))


def test_a_single_file_of_hugging_face_without_its_config(tmp_path):
    clip = built(VIT)
    safetensors.torch.save_file(to_hugging_face(clip.state_dict()), tmp_path / "any name")
    loaded, _ = model.load(str(tmp_path / "any name"))  # heads from the row of MODELS that the shapes match
    assert loaded.config == MODELS[VIT] and same(loaded.state_dict(), clip.state_dict())


def test_old_files_with_pooler_and_position_numbers(tmp_path, capsys):
    clip = built(VIT)
    old = to_hugging_face(clip.state_dict()) | {
        "text_model.pooler.dense.weight": torch.ones(32, 32), "text_model.pooler.dense.bias": torch.ones(32),
        "text_model.embeddings.position_ids": torch.arange(512)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    loaded, _ = model.load(saved(tmp_path, old, "pytorch_model.bin"))
    assert same(loaded.state_dict(), clip.state_dict())
    assert "left out 4 tensors" in capsys.readouterr().out


def test_configs_of_2022_hold_the_numbers_twice(tmp_path):
    hf = hugging_face(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        raw[part + "_dict"] = raw[part]
        raw[part] = {"num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    agree(features(model.load(str(tmp_path))[0]), theirs(hf, 32))


def test_numbers_that_a_config_leaves_out_are_transformers_defaults():
    left_out = transformers.ChineseCLIPConfig()
    config = model.ModelConfig(*sizes_of({"vision_config": {}, "text_config": {}}))
    assert config.embed_dim == left_out.projection_dim
    v, t = left_out.vision_config, left_out.text_config
    assert (config.visual.resolution, config.visual.patch_size) == (v.image_size, v.patch_size)
    assert (config.visual.width, config.visual.layers) == (v.hidden_size, v.num_hidden_layers)
    assert config.visual.width // config.visual.head_width == v.num_attention_heads
    assert (config.text.layers, config.text.width, config.text.heads, config.text.vocab_size) == (
        t.num_hidden_layers, t.hidden_size, t.num_attention_heads, t.vocab_size)
    assert (config.text.max_positions, config.text.token_types, config.text.dropout) == (
        t.max_position_embeddings, t.type_vocab_size, t.hidden_dropout_prob)


@pytest.mark.parametrize("part, act", [("vision_config", "gelu"), ("text_config", "relu")])
def test_another_activation_is_refused(part, act, tmp_path):
    hugging_face(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw[part]["hidden_act"] = act
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert f"hidden_act is {act}" in refusal(model.load, str(tmp_path))


def test_a_config_for_another_resolution_is_refused(tmp_path):
    hugging_face(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["vision_config"]["image_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = refusal(model.load, str(tmp_path))
    assert "visual.positional_embedding is (17, 32), expected (65, 32)" in message and VIT in message


@pytest.mark.parametrize("gone, hint", [("q_proj.weight", "missing"), ("k_proj.bias", "unknown"),
                                        ("visual_projection", "visual.proj")])
def test_a_missing_tensor_of_hugging_face(gone, hint, tmp_path):
    state = to_hugging_face(built(VIT).state_dict())
    del state[next(key for key in state if gone in key)]
    assert hint in refusal(model.load, saved(tmp_path, state))


@pytest.mark.parametrize("damage, hint", [
    ("lost", "which is not beside it"), ("outside", "which is not beside it"),
    ("other", "are not in their shards"), ("no map", "not a readable checkpoint")])
def test_damaged_shards(damage, hint, tmp_path):
    hugging_face(tmp_path, max_shard_size="1MB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first, second = sorted(set(raw["weight_map"].values()))
    if damage == "lost":
        os.remove(tmp_path / first)
    if damage == "outside":  # a name that leads out of the folder
        shutil.copy(tmp_path / first, tmp_path.parent / "outside")
        raw["weight_map"] = {k: "../outside" if v == first else v for k, v in raw["weight_map"].items()}
    if damage == "other":
        shutil.copy(tmp_path / second, tmp_path / first)
    if damage == "no map":
        del raw["weight_map"]
    index.write_text(json.dumps(raw))
    assert hint in refusal(model.load, str(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# the official code's other spelling, and other people's image towers


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_flash_attention(prefix, tmp_path, capsys):
    state = built(VIT).state_dict()
    flash = {}
    for key, value in state.items():  # as cn_clip's convert_state_dict joins and renames them
        if ".attention.self.query." in key:
            parts = [state[key.replace("query", name)] for name in ("query", "key", "value")]
            flash[prefix + key.replace("query", "Wqkv")] = torch.cat(parts)
        elif ".attention.self." not in key:
            key = key.replace("attention.output.dense", "attention.self.out_proj")
            flash[prefix + key.replace("attn.in_proj_", "attn.Wqkv.")] = value
    assert not any("in_proj" in key or "query" in key for key in flash)
    loaded, _ = model.load(saved(tmp_path, {"state_dict": flash}))
    assert same(loaded.state_dict(), state) and "FlashAttention's names" in capsys.readouterr().out


def test_official_checkpoint_with_its_optimizer(tmp_path):  # the official code's epoch_latest.pt
    clip = built(RN)
    optimizer = torch.optim.AdamW(clip.parameters())
    clip.encode_image(random_pixels(1, 32)).sum().backward()
    optimizer.step()
    path = saved(tmp_path, official(clip.state_dict()) | {"optimizer": optimizer.state_dict()})
    assert same(model.load(path)[0].state_dict(), clip.state_dict())


@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_image_tower_from_hugging_faces_clip(container, tmp_path, capsys):
    torch.manual_seed(1)
    hf = transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=16,
        text_config=dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                         vocab_size=20, projection_dim=16),
        vision_config=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                           image_size=32, patch_size=8, projection_dim=16))).eval()
    hf.save_pretrained(tmp_path)
    if container == "bin":
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
        os.remove(tmp_path / "model.safetensors")
    clip = built(VIT)
    before = {k: v.clone() for k, v in clip.state_dict().items() if k.startswith(("bert.", "text_"))}
    initialise(clip, MODELS, image_init=str(tmp_path))
    pixels = random_pixels(3, 32)
    with torch.no_grad():
        agree([clip.encode_image(pixels)], [hf.visual_projection(hf.vision_model(pixels).pooler_output)])
    assert same({k: v for k, v in clip.state_dict().items() if k in before}, before)
    assert clip.logit_scale == hf.logit_scale and "left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_image_tower_from_open_clip(name, tmp_path):
    visual = {k: v for k, v in built(VIT, seed=7).state_dict().items() if k.startswith("visual.")}
    state = visual | {  # a text side unlike ours, with names that are nearly ours
        "logit_scale": torch.tensor(4.5), "text_projection": torch.ones(8, 16),
        "positional_embedding": torch.ones(77, 8),
        "token_embedding.weight": torch.ones(10, 8), "ln_final.weight": torch.ones(8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8)}
    if name.endswith("bin"):
        saved(tmp_path, state, name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    clip = built(VIT)
    initialise(clip, MODELS, image_init=str(tmp_path))  # the folder, as it is cloned
    assert same({k: v for k, v in clip.state_dict().items() if k.startswith("visual.")}, visual)
    assert clip.logit_scale.item() == 4.5


def test_whole_models_initialise_from_hugging_face(tmp_path):
    clip = built(VIT)
    weights.save_hugging_face(built(VIT, seed=9), str(tmp_path / "hf"))
    initialise(clip, MODELS, init=str(tmp_path / "hf"))
    assert same(clip.state_dict(), built(VIT, seed=9).state_dict())


# ------------------------------------------------------------------------------------------------------------
# out


@pytest.mark.parametrize("name", [VIT, "ViT-mini"])
def test_transformers_opens_what_we_write(name, tmp_path):
    clip = built(name)
    weights.save_hugging_face(clip, str(tmp_path))
    hf, problems = transformers.ChineseCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    agree(features(clip), theirs(hf.eval(), clip.config.visual.resolution))
    agree(features(model.load(str(tmp_path))[0]), features(clip))


def test_the_written_processor_gives_the_same_ids_and_pixels(tmp_path):
    weights.save_hugging_face(built(VIT), str(tmp_path))
    processor = transformers.ChineseCLIPProcessor.from_pretrained(tmp_path, backend="pil")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
              for shape in ((50, 70, 3), (32, 32, 3), (9, 200, 3), (40, 40))]
    given = processor(text=TEXTS, images=images, return_tensors="pt", padding="max_length", truncation=True)
    assert torch.equal(given["input_ids"], data.tokenize(TEXTS))
    assert torch.equal(given["attention_mask"] == 1, data.tokenize(TEXTS) != 0)
    pixels = torch.stack([data.preprocess(image, 32) for image in images])
    assert torch.equal(given["pixel_values"], pixels)


def test_names_for_hugging_face_and_back():
    state = built(VIT).state_dict()
    there = to_hugging_face(state)
    assert not any(key.startswith(("visual.", "bert.")) or ".ln_" in key for key in there)
    assert same(from_hugging_face(there), state)


def test_a_resnet_has_no_place_in_transformers(tmp_path):
    assert "--to official" in refusal(weights.save_hugging_face, built(RN), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", [VIT, RN])
def test_official_files(name, tmp_path):
    clip = built(name)
    weights.save_official(clip, str(tmp_path / "clip.pt"))
    content = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert set(content) == {"epoch", "step", "name", "state_dict"}
    assert all(key.startswith("module.") for key in content["state_dict"])
    assert same({k.removeprefix("module."): v for k, v in content["state_dict"].items()}, clip.state_dict())


# ------------------------------------------------------------------------------------------------------------
# the command


def test_convert_around_and_back(tmp_path, capsys):
    model.save(built(VIT), str(tmp_path / "a"))
    for source, target, layout in (
            ("a", "b.pt", "official"), ("b.pt", "hf", "huggingface"), ("hf", "c.safetensors", "ours")):
        weights.main(["convert", str(tmp_path / source), str(tmp_path / target), "--to", layout])
        assert f"wrote {tmp_path / target}" in capsys.readouterr().out
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("there", ["file", "folder"])
def test_convert_overwrites_nothing(there, tmp_path):
    model.save(built(VIT), str(tmp_path / "a"))
    target = tmp_path / "b"
    if there == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "config.json").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        weights.main(["convert", str(tmp_path / "a"), str(target), "--to", "huggingface"])
    assert "is there already" in str(caught.value)
    assert (target if there == "file" else target / "config.json").read_text() == "mine"


@pytest.mark.parametrize("layout", ["ours", "official"])
def test_info_tells_what_a_file_is(layout, tmp_path, capsys):
    save = {"ours": model.save, "official": weights.save_official}[layout]
    save(built(RN), str(tmp_path / "file"))
    weights.main(["info", str(tmp_path / "file")])
    out = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in built(RN).state_dict().values())
    assert f"{count:,} numbers" in out and "look like RN-tiny" in out
    assert {"ours": "safetensors", "official": "PyTorch file"}[layout] in out
    assert ("its config says RN-tiny" in out) == (layout == "ours")


@pytest.mark.parametrize("layout", ["ours", "official", "huggingface"])
def test_a_full_disk_leaves_nothing(layout, tmp_path, monkeypatch):
    model.save(built(VIT), str(tmp_path / "a"))

    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SystemExit, match="error: .*could not be written"):
        weights.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", layout])
    assert not (tmp_path / "b").exists()


def test_download_as_a_command(hub, tmp_path, capsys):
    weights.main(["download", "ViT-B-16", "--to", str(tmp_path)])
    path = tmp_path / "ViT-B-16" / "clip_cn_vit-b-16.pt"
    assert capsys.readouterr().out.strip() == str(path) and path.is_file()
    hub.statuses = [404]
    with pytest.raises(SystemExit, match="error: .*404"):
        weights.main(["download", "rbt3", "--to", str(tmp_path)])


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_interpolation(share, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        model.save(built(RN, seed), str(tmp_path / name))
    weights.main(["interpolate", *(str(tmp_path / name) for name in "abc"), "--share", str(share)])
    mixed = model.load(str(tmp_path / "c"))[0]
    one, other = (built(RN, seed).state_dict() for seed in (1, 2))
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (1 - share) * one[name] + share * other[name])


def test_interpolation_does_not_leave_the_two(tmp_path):
    assert "--share 50" in refusal(weights.interpolate, "a", "b", str(tmp_path / "c"), 50)


def test_interpolation_between_different_models(tmp_path):
    for name, row in (("a", RN), ("b", VIT)):
        model.save(built(row), str(tmp_path / name))
    with pytest.raises(SystemExit, match="RN-tiny.*ViT-tiny.*expected two of the same sizes"):
        weights.main(["interpolate", *(str(tmp_path / name) for name in "abc")])
    assert not (tmp_path / "c").exists()


def test_info_of_a_bert(tmp_path, capsys):
    weights.main(["info", saved(tmp_path, {"encoder.layer.0.output.dense.bias": torch.ones(3)})])
    assert "none of RN50" in capsys.readouterr().out


def test_the_command_as_it_is_typed(tmp_path):
    def typed(*words):
        command = [sys.executable, "-m", "tools.weights", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert {"download", "info", "convert"} <= set(typed("--help").stdout.replace(",", " ").split())
    lost = typed("info", str(tmp_path / "lost"))
    assert lost.returncode == 1 and lost.stderr.startswith("error: ") and "Traceback" not in lost.stderr
    assert typed("download", "ViT-B-99").returncode == 2


def test_folders_that_hold_one_official_file(tmp_path, monkeypatch):
    path = saved(tmp_path, official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    assert read.find(str(tmp_path)) == path
    saved(tmp_path, {}, "another.pt")
    assert "exactly one .pt" in refusal(read.find, str(tmp_path))


def test_a_folder_does_not_hide_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    monkeypatch.setattr(read, "fetch", lambda name, root: f"fetched {name} to {root}")
    assert read.find("ViT-B-16", "there") == "fetched ViT-B-16 to there"


@pytest.mark.parametrize("name", ["openai-ViT-B-16", "rbt3"])
def test_initialisers_are_no_whole_models(name, tmp_path):
    assert "--image-init" in refusal(model.load, name)  # without fetching it


@pytest.mark.parametrize("part", ["visual.", "bert."])
def test_half_a_model_is_told_from_a_damaged_one(part, tmp_path):
    state = {k: v for k, v in built(VIT).state_dict().items() if k.startswith(part)}
    assert "no whole model" in refusal(model.load, saved(tmp_path, state))


def test_other_heads_are_not_taken_over_in_silence(tmp_path):
    row = MODELS[VIT]
    for other in (dataclasses.replace(row, visual=dataclasses.replace(row.visual, head_width=8)),
                  dataclasses.replace(row, text=dataclasses.replace(row.text, heads=4))):
        model.save(model.ChineseCLIP(other), str(tmp_path / "a"))
        assert "heads" in refusal(initialise, built(VIT), MODELS, init=str(tmp_path / "a"))
    hugging_face(tmp_path / "hf")  # 4 heads each
    for which in ("init", "image_init", "text_init"):
        assert "4 heads" in refusal(initialise, built(VIT), MODELS, **{which: str(tmp_path / "hf")})


@pytest.mark.parametrize("path, value", [
    (("visual", "head_width"), 0), (("visual", "head_width"), 5), (("visual", "patch_size"), 0),
    (("text", "heads"), 3), (("text", "heads"), 64), (("text", "layers"), 2.5), (("visual", "layers"), 10**9),
    (("text", "dropout"), "much"), (("embed_dim",), "16"), (("visual",), None), (("visual",), [1]),
    (("text",), 3),
    (("visual", "resolution"), -32)])
def test_configs_that_no_model_can_be_built_of(path, value, tmp_path):
    config = dataclasses.asdict(MODELS[VIT])
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    read.write(str(tmp_path / "a"), built(VIT).state_dict(), {"config": json.dumps(config)})
    assert "describes no model of ours" in refusal(model.load, str(tmp_path / "a"))


@pytest.mark.parametrize("blocks", [[], [1], [1] * 5, [1] * 10_000, [101, 1, 1, 1], 5, [[1]] * 4])
def test_resnets_that_no_model_can_be_built_of(blocks, tmp_path):
    config = dataclasses.asdict(MODELS[RN])
    config["visual"]["blocks"] = blocks
    read.write(str(tmp_path / "a"), built(RN).state_dict(), {"config": json.dumps(config)})
    assert "describes no model of ours" in refusal(model.load, str(tmp_path / "a"))


@pytest.mark.parametrize("content", [
    b"{}", b"\xff\xfe", b"[" * 100_000, b'{"vision_config": null, "text_config": {}}',
    b'{"vision_config": [], "text_config": {}}',
    b'{"vision_config": {"num_attention_heads": 0}, "text_config": {}}'])
def test_config_files_of_something_else(content, tmp_path):
    weights.save_hugging_face(built(VIT), str(tmp_path / "hf"))
    (tmp_path / "hf" / "config.json").write_bytes(content)
    assert "config" in refusal(model.load, str(tmp_path / "hf"))


def test_names_are_fetched_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CACHE", str(tmp_path))
    (tmp_path / "ViT-B-16").mkdir()
    saved(tmp_path / "ViT-B-16", official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    assert model.load("ViT-B-16")[0].config == MODELS[VIT]

    def offline(name, root):
        raise download.DownloadError("no way there")
    monkeypatch.setattr(read, "fetch", offline)
    assert refusal(model.load, "RN50") == "no way there"


@pytest.mark.parametrize("where", ["ViT-B-16/clip_cn_vit-b-16.pt", "clip_cn_vit-b-16.pt"])
def test_names_are_looked_for_where_one_says(where, tmp_path, monkeypatch):
    """In the folder of the name, where they are fetched to, or where cn_clip puts them."""
    monkeypatch.setattr(download, "fetch_part", lambda url, path: pytest.fail(f"fetched {path}"))
    (tmp_path / where).parent.mkdir(exist_ok=True)
    path = saved((tmp_path / where).parent, official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    assert read.find("ViT-B-16", str(tmp_path)) == path


def test_names_are_fetched_to_where_one_says(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "fetch_part", lambda url, path: fetched.append(path))
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "nowhere"))
    # a BERT's file name says nothing, so it is not looked for outside its folder
    saved(tmp_path, {}, "pytorch_model.bin")
    for name, file in (("ViT-B-16", "clip_cn_vit-b-16.pt"), ("rbt3", "pytorch_model.bin")):
        assert read.find(name, str(tmp_path)) == str(tmp_path / name / file) == fetched.pop()


# ------------------------------------------------------------------------------------------------------------
# CLIPs that were trained with another activation


@pytest.mark.parametrize("where, beside, said", [
    ("laion-ViT-H-14/a.bin", {}, "'gelu'"), ("openai-ViT-B-16/a.pt", {}, ""), ("a.pt", {}, ""),
    ("a.bin", {"open_clip_config.json": {"model_cfg": {"embed_dim": 16}}}, "'gelu'"),
    ("a.bin", {"open_clip_config.json": {"model_cfg": {"quick_gelu": True}}}, ""),
    ("hf/a.bin", {"config.json": {"vision_config": {"num_attention_heads": 2, "hidden_act": "gelu"}}},
     "'gelu'"),
    ("hf/a.bin", {"config.json": {"vision_config": {"num_attention_heads": 2}}}, ""),
    ("hf/a.bin", {"config.json": {"vision_config": {}, "vision_config_dict": {
        "num_attention_heads": 2, "hidden_act": "gelu_new"}}}, "'gelu_new'")])
def test_another_activation_of_an_image_tower_is_said(where, beside, said, tmp_path, capsys):
    state = {key: value for key, value in built(VIT, seed=1).state_dict().items() if key[:5] != "bert."}
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    torch.save(to_hugging_face(state) if where.startswith("hf/") else state, path)
    for name, content in beside.items():
        (path.parent / name).write_text(json.dumps(content))
    clip = built(VIT)
    initialise(clip, MODELS, image_init=str(path))
    lines = [line for line in capsys.readouterr().out.splitlines() if "QuickGELU" in line]
    assert len(lines) == bool(said) and said in "".join(lines)
    assert torch.equal(clip.visual.conv1.weight, built(VIT, seed=1).visual.conv1.weight)


def test_the_only_clip_here_with_the_exact_gelu_is_laions():
    assert download.EXACT_GELU == tuple(name for name in download.SOURCES if name.startswith("laion"))


@pytest.mark.parametrize("content", [
    "[" * 100_000, "[]", "{}", '{"model_cfg": []}', '{"model_cfg": 3}', "x" * 2**21])
def test_configs_of_open_clip_that_are_none(content, tmp_path):
    path = saved(tmp_path, built(VIT).state_dict())
    (tmp_path / "open_clip_config.json").write_text(content)
    assert "config" in refusal(initialise, built(VIT), MODELS, image_init=path)


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"vision_config": {"num_attention_heads": 0, "hidden_size": 0}, "text_config": []}'])
def test_configs_that_only_initialise_reads(content, tmp_path):
    weights.save_hugging_face(built(VIT), str(tmp_path / "hf"))
    (tmp_path / "hf" / "config.json").write_text(content)
    for which in ("init", "image_init", "text_init"):
        assert refusal(initialise, built(VIT), MODELS, **{which: str(tmp_path / "hf")})


def test_released_models_are_models():
    assert set(download.RELEASED) < set(MODELS) and set(download.RELEASED) < set(download.SOURCES)


# ------------------------------------------------------------------------------------------------------------
# hostile and damaged


def test_values_that_are_not_finite_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        state = built(VIT).state_dict()
        state["visual.transformer.resblocks.1.mlp.c_fc.weight"][3, 5] = value
        message = refusal(model.load, saved(tmp_path, official(half(state))))
        assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in message and "not finite" in message


def test_large_values_whose_sum_overflows_are_fine(tmp_path):
    state = built(VIT).state_dict()
    state["visual.ln_post.bias"][:] = 3e38
    assert same(model.load(saved(tmp_path, state))[0].state_dict(), state)


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.safetensors"])
@pytest.mark.parametrize("inside, where", [("a/code", "a/code/data/0"), ("a", "a/data/../code/0")])
def test_bombs_in_the_folder_of_torchscripts_code(inside, where, name, tmp_path):
    """Only the code of an archive may be compressed, and no tensor may be read from there."""
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{inside}/data.pkl"), b"(dp0\n.")
        archive.writestr(zipfile.ZipInfo("a/constants.pkl"), b"N.")
        archive.writestr(where, b"\0" * 20_000_000, zipfile.ZIP_DEFLATED)
    refusal(model.load, str(tmp_path / name))


@pytest.mark.parametrize("value, hint", [
    (torch.zeros(1).half().expand(10**13), "claims"),
    (torch.zeros(2, 2).to_sparse(), "_rebuild_sparse_tensor"),
    (torch.zeros(3, dtype=torch.complex64), "ComplexFloatStorage"),
    (torch.zeros(3, device="meta"), "_rebuild_meta_tensor")])
def test_tensors_that_are_not_ordinary(value, hint, tmp_path):
    assert hint in refusal(model.load, saved(tmp_path, built(VIT).state_dict() | {"logit_scale": value}))


def test_one_storage_under_a_thousand_names(tmp_path):
    value = torch.zeros(100_000, dtype=torch.float16)
    assert "more than the file holds" in refusal(
        model.load, saved(tmp_path, {f"x{i}": value for i in range(1000)}))


def test_names_that_are_no_text(tmp_path):
    assert "no ordinary tensor" in refusal(model.load, saved(tmp_path, {0: torch.zeros(3)}))


def test_whole_numbers_in_the_place_of_weights(tmp_path):
    state = built(VIT).state_dict()
    state["text_projection"] = state["text_projection"].long()
    assert "text_projection holds torch.int64" in refusal(model.load, saved(tmp_path, state))


@pytest.mark.parametrize("key, shape", [
    ("vision_model.encoder.layers.0.self_attn.k_proj.weight", (32, 16)),
    ("vision_model.encoder.layers.1.self_attn.q_proj.bias", ()),
    ("visual_projection.weight", (3,)), ("text_projection.weight", (16, 3))])
def test_misshaped_tensors_of_hugging_face(key, shape, tmp_path):
    state = to_hugging_face(built(VIT).state_dict()) | {key: torch.zeros(shape)}
    assert "does not fit this model" in refusal(model.load, saved(tmp_path, state))


def test_misshaped_tensors_of_flash_attention(tmp_path):
    state = built(VIT).state_dict() | {"bert.encoder.layer.0.attention.self.Wqkv.weight": torch.tensor(1.0)}
    assert "does not fit this model" in refusal(model.load, saved(tmp_path, state))


@pytest.mark.parametrize("scale", [torch.tensor(float("nan")), torch.ones(2), torch.ones(2, 2)])
def test_the_temperature_of_an_initialiser_is_checked_too(scale, tmp_path):
    clip = built(VIT)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    path = saved(tmp_path, built(VIT, seed=1).state_dict() | {"logit_scale": scale})
    assert "logit_scale" in refusal(initialise, clip, MODELS, image_init=path)
    assert same(clip.state_dict(), before)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 50_000_000)
    assert bomb.stat().st_size < 100_000
    assert "compressed" in refusal(model.load, str(bomb))


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "clip_cn_vit-b-16.pt"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 753\n")
    assert "Git LFS pointer" in refusal(model.load, str(path))


@pytest.mark.parametrize("offsets", [(0, 8, 4, 12), (0, 8, 8, 2**40), (8, 0, 8, 16), (0, 8, 16, 24)])
def test_safetensors_with_wrong_offsets(offsets, tmp_path):
    a, b, c, d = offsets
    header = json.dumps({
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [a, b]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [c, d]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    assert "not a readable checkpoint" in refusal(model.load, str(tmp_path / "a.safetensors"))


def test_safetensors_with_a_huge_header(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{" + b" " * 100)
    assert "not a readable checkpoint" in refusal(model.load, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("layout", ["ours", "official", "hugging face"])
def test_truncated_files(layout, tenth, tmp_path):
    clip = built(VIT)
    path = tmp_path / "whole"
    if layout == "ours":
        model.save(clip, str(path))
    elif layout == "official":
        weights.save_official(clip, str(path))
    else:
        weights.save_hugging_face(clip, str(tmp_path / "hf"))
        path = tmp_path / "hf" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenth // 10])
    assert "not a readable checkpoint" in refusal(model.load, str(path))


def test_training_from_a_larger_resolution_interpolates_and_says_so(tmp_path, capsys):
    row = MODELS[VIT]
    large = model.ChineseCLIP(dataclasses.replace(row, visual=dataclasses.replace(row.visual, resolution=48)))
    clip = built(VIT)
    initialise(clip, MODELS, init=saved(tmp_path, official(large.state_dict())))
    assert "visual.positional_embedding interpolated from 37 to 17 rows" in capsys.readouterr().out


def test_half_precision_comes_out_as_float32(tmp_path):
    state = built(VIT).state_dict()
    safetensors.torch.save_file(to_hugging_face(half(state)), tmp_path / "model.safetensors")
    loaded, _ = model.load(str(tmp_path))
    assert same(loaded.state_dict(), rounded(state))
