"""weights/start.py: training starts from other people's towers and models."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import (RN, VIT, agree, built, half, hugging_face, official, openai_archive, openai_tensors,
                         refusal, rounded, same, saved)
from conftest import difference, random_pixels, shake

import model
from bert import BertConfig
from model import MODELS, ChineseCLIP
from tools import weights
from vit import ViTConfig
from weights.names import to_hugging_face
from weights.start import initialise


def test_both_towers_at_once(tmp_path):
    """The image tower comes from OpenAI's file and the text tower from a BERT, as in stage 1 (app. A.2)."""
    image, text, clip = built(RN, seed=1), built(RN, seed=2), built(RN, seed=3)
    initialise(clip, MODELS, saved(tmp_path, openai_tensors(RN), "i.pt"),
               saved(tmp_path, text.bert.state_dict(), "t.pt"))
    assert same(clip.bert.state_dict(), text.bert.state_dict())
    assert not torch.equal(clip.visual.conv1.weight, image.visual.conv1.weight)
    assert torch.equal(clip.visual.conv1.weight, openai_tensors(RN)["visual.conv1.weight"].float())


# ------------------------------------------------------------------------------------------------------------
# an image tower


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [VIT, RN])
@pytest.mark.parametrize("plain", [False, True], ids=["archive", "state dict"])
def test_image_tower_starts_from_openais(name, plain, tmp_path, capsys):
    path = str(tmp_path / "openai.pt")
    tensors = openai_archive(name, path)
    clip = built(name)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    initialise(clip, MODELS, image_init=saved(tmp_path, tensors, "plain.pt") if plain else path)
    state = clip.state_dict()
    for key, value in state.items():
        taken = key.startswith("visual.") or key == "logit_scale"
        assert torch.equal(value, tensors[key].to(value.dtype) if taken else before[key]), key
    assert "; 6 others in that file are not needed" in capsys.readouterr().out


def test_image_tower_starts_from_a_chinese_clip(tmp_path):
    source, clip = built(VIT, seed=1), built(VIT, seed=2)
    text = clip.text_projection.clone()
    initialise(clip, MODELS, image_init=saved(tmp_path, official(half(source.state_dict()))))
    assert same(clip.visual.state_dict(), rounded(source.visual.state_dict()))
    assert torch.equal(clip.text_projection, text)


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
    assert clip.logit_scale == hf.logit_scale and "are not needed" in capsys.readouterr().out


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


# ------------------------------------------------------------------------------------------------------------
# a text tower, a whole model


def roberta(bert_state: dict[str, torch.Tensor], prefix: str, old_names: bool) -> dict[str, torch.Tensor]:
    """As published on Hugging Face: a masked language model with pooler, heads and position numbers."""
    state = {"embeddings.position_ids": torch.arange(512)[None]} | bert_state
    state |= {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    if old_names:
        state = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for key, value in state.items()
        }
    heads = {
        "cls.predictions.bias": torch.ones(21128),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(32),
        "cls.seq_relationship.weight": torch.ones(2, 32),
    }
    return {prefix + key: value for key, value in state.items()} | (heads if prefix else {})


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("old_names", [False, True], ids=["weight and bias", "gamma and beta"])
@pytest.mark.parametrize("prefix", ["", "bert."], ids=["no prefix", "prefix"])
def test_text_tower_starts_from_roberta(layout, old_names, prefix, tmp_path, capsys):
    source, clip = built(VIT, seed=1).bert.state_dict(), built(VIT, seed=2)
    before = {key: value.clone() for key, value in clip.state_dict().items() if not key.startswith("bert.")}
    state = roberta(source, prefix, old_names)
    path = str(tmp_path / "pytorch_model.bin")
    if layout == "safetensors":
        path = str(tmp_path / "model.safetensors")
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout == "zip")
    initialise(clip, MODELS, text_init=str(tmp_path))  # the folder, as it is downloaded
    assert same(clip.bert.state_dict(), source)
    assert same({key: value for key, value in clip.state_dict().items() if key in before}, before)
    assert "are not needed" in capsys.readouterr().out


def test_whole_models_initialise_from_hugging_face(tmp_path):
    clip = built(VIT)
    weights.save_hugging_face(built(VIT, seed=9), str(tmp_path / "hf"))
    initialise(clip, MODELS, init=str(tmp_path / "hf"))
    assert same(clip.state_dict(), built(VIT, seed=9).state_dict())


# ------------------------------------------------------------------------------------------------------------
# another resolution


@pytest.mark.parametrize(
    "name, key", [(VIT, "visual.positional_embedding"), (RN, "visual.attnpool.positional_embedding")]
)
def test_position_tables_are_interpolated_for_another_resolution(name, key, tmp_path, capsys):
    row = MODELS[name]
    large = ChineseCLIP(dataclasses.replace(row, visual=dataclasses.replace(row.visual, resolution=96)))
    source = shake(
        ChineseCLIP(dataclasses.replace(row, visual=dataclasses.replace(row.visual, resolution=64))), seed=5
    )
    table, rows = source.state_dict()[key], len(large.state_dict()[key])
    initialise(large, MODELS, image_init=saved(tmp_path, official(source.state_dict())))
    assert f"interpolated from {len(table)} to {rows} rows" in capsys.readouterr().out
    assert rows == (9 * 16 + 1 if name == VIT else 9 + 1)
    expected = torch.nn.functional.interpolate(
        table[1:].T.reshape(1, table.shape[1], round((len(table) - 1) ** 0.5), -1),
        size=2 * (round((rows - 1) ** 0.5),),
        mode="bicubic",
        align_corners=True,
    )
    assert torch.equal(large.state_dict()[key][0], table[0])
    assert difference(large.state_dict()[key][1:], expected[0].flatten(1).T) < 1e-6
    others = [k for k in source.state_dict() if k.startswith("visual.") and k != key]
    assert all(torch.equal(large.state_dict()[k], source.state_dict()[k]) for k in others)
    assert large.encode_image(random_pixels(2, 96)).shape == (2, 16)


def test_training_from_a_larger_resolution_interpolates_and_says_so(tmp_path, capsys):
    row = MODELS[VIT]
    large = model.ChineseCLIP(dataclasses.replace(row, visual=dataclasses.replace(row.visual, resolution=48)))
    clip = built(VIT)
    initialise(clip, MODELS, init=saved(tmp_path, official(large.state_dict())))
    assert "visual.positional_embedding interpolated from 37 to 17 rows" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# what is refused


def test_image_tower_of_another_model_is_refused_with_a_guess(tmp_path):
    path = saved(tmp_path, official(built(RN).state_dict()))
    message = refusal(initialise, built(VIT), MODELS, image_init=path)
    assert path in message and "visual.class_embedding" in message and f"is {RN}, not {VIT}" in message


def test_text_tower_of_another_size_is_refused(tmp_path):
    small = dataclasses.replace(MODELS[VIT], text=BertConfig(1, 32, 2, vocab_size=50))
    path = saved(tmp_path, ChineseCLIP(small).bert.state_dict())
    message = refusal(initialise, built(VIT), MODELS, text_init=path)
    assert (
        path in message
        and "bert.embeddings.word_embeddings.weight is (50, 32), expected (21128, 32)" in message
    )
    assert "16 missing (bert.encoder.layer.1." in message


def test_a_file_without_the_tower_asked_for_is_refused(tmp_path):
    state = built(VIT).state_dict()
    text = saved(tmp_path, {k: v for k, v in state.items() if k.startswith("bert.")}, "text.pt")
    image = saved(tmp_path, {k: v for k, v in state.items() if k.startswith("visual.")}, "image.pt")
    message = refusal(initialise, built(VIT), MODELS, image_init=text)
    assert text in message and "no image tower" in message and "bert.embeddings" in message
    message = refusal(initialise, built(VIT), MODELS, text_init=image)
    assert image in message and "no BERT" in message and "visual." in message


def test_a_position_table_that_is_no_square_is_refused(tmp_path):
    path = saved(tmp_path, built(VIT).state_dict() | {"visual.positional_embedding": torch.ones(12, 32)})
    message = refusal(initialise, built(VIT), MODELS, image_init=path)
    assert path in message and "visual.positional_embedding" in message and "12 rows" in message


def test_other_heads_are_not_taken_over_in_silence(tmp_path):
    row = MODELS[VIT]
    for other in (dataclasses.replace(row, visual=dataclasses.replace(row.visual, head_width=8)),
                  dataclasses.replace(row, text=dataclasses.replace(row.text, heads=4))):
        model.save(model.ChineseCLIP(other), str(tmp_path / "a"))
        assert "heads" in refusal(initialise, built(VIT), MODELS, init=str(tmp_path / "a"))
    hugging_face(tmp_path / "hf")  # 4 heads each
    for which in ("init", "image_init", "text_init"):
        assert "4 heads" in refusal(initialise, built(VIT), MODELS, **{which: str(tmp_path / "hf")})


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"vision_config": {"num_attention_heads": 0, "hidden_size": 0}, "text_config": []}'])
def test_configs_that_only_initialise_reads(content, tmp_path):
    weights.save_hugging_face(built(VIT), str(tmp_path / "hf"))
    (tmp_path / "hf" / "config.json").write_text(content)
    for which in ("init", "image_init", "text_init"):
        assert refusal(initialise, built(VIT), MODELS, **{which: str(tmp_path / "hf")})


@pytest.mark.parametrize("scale", [torch.tensor(float("nan")), torch.ones(2), torch.ones(2, 2)])
def test_the_temperature_of_an_initialiser_is_checked_too(scale, tmp_path):
    clip = built(VIT)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    path = saved(tmp_path, built(VIT, seed=1).state_dict() | {"logit_scale": scale})
    assert "logit_scale" in refusal(initialise, clip, MODELS, image_init=path)
    assert same(clip.state_dict(), before)


# ------------------------------------------------------------------------------------------------------------
# CLIPs that were trained with another activation


@pytest.mark.parametrize("where, beside, said", [
    ("a.pt", {}, ""),
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


def test_laions_clip_is_known_by_its_width(tmp_path, capsys):
    """open_clip's file names no activation, and OpenAI released no CLIP of this width."""
    config = model.ModelConfig(16, ViTConfig(8, 8, width=1280, layers=1, head_width=80), MODELS[VIT].text)
    theirs = {key: value for key, value in ChineseCLIP(config).state_dict().items() if key[:5] != "bert."}
    path = saved(tmp_path, theirs | {"token_embedding.weight": torch.ones(10, 8)})
    clip = ChineseCLIP(config)
    initialise(clip, MODELS, image_init=path)
    assert "trained with 'gelu'" in capsys.readouterr().out
    assert torch.equal(clip.visual.conv1.weight, theirs["visual.conv1.weight"])
