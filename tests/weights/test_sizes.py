"""weights/sizes.py: which model a file holds, and whether its tensors fit."""

import dataclasses
import json

import pytest
import torch
import transformers
from checkpoints import (RN, VIT, agree, built, features, half, hugging_face, official, refusal, same, saved,
                         theirs)

import model
from model import MODELS, ChineseCLIP, ModelConfig
from resnet import ResNetConfig
from tools import weights
from vit import ViTConfig
from weights import read
from weights.sizes import guess, read_config, sizes_of


def on_meta(name: str) -> ChineseCLIP:
    with torch.device("meta"):
        return ChineseCLIP(MODELS[name])


# ------------------------------------------------------------------------------------------------------------
# from shapes


def test_three_shapes_tell_a_model():
    """224 pixels in patches of 16 are 14 x 14 patches, and with the class token 197 positions."""
    state = {"visual.conv1.weight": torch.zeros(768, 3, 16, 16),
             "visual.positional_embedding": torch.zeros(14 * 14 + 1, 768),
             "visual.transformer.resblocks.11.ln_1.bias": torch.zeros(768)}
    assert guess(state, MODELS) == "ViT-B-16"
    assert guess({"visual.conv1.weight": torch.zeros(3, 3, 3, 3)}, MODELS) == ""


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_tells_which_model_it_is(name):
    state = on_meta(name).state_dict()
    assert guess(state, MODELS) == name
    assert guess({key: value for key, value in state.items() if key.startswith("visual.")}, MODELS) == name


@pytest.mark.parametrize("name, like", [("RN50", "RN50"), ("ViT-L-14", "ViT-B-32"), ("ViT-H-14", "ViT-H-14")])
def test_the_depth_of_a_text_tower_counts(name, like):
    """A tower of 12 layers has all tensors of one of 3; among equal text towers the first row is named."""
    state = {key: value for key, value in on_meta(name).state_dict().items() if key.startswith("bert.")}
    assert guess(state, MODELS) == like


# ------------------------------------------------------------------------------------------------------------
# from a config


@pytest.mark.parametrize("name", MODELS)
def test_configs_survive_json(name):
    config = ModelConfig(*read_config(json.dumps(dataclasses.asdict(MODELS[name])), "file"))
    assert config == MODELS[name] and hash(config) == hash(MODELS[name])
    assert isinstance(config.visual, ResNetConfig if name.startswith("RN") else ViTConfig)


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


@pytest.mark.parametrize(
    "config", ["not json", "[]", "{}", '{"embed_dim": 16, "visual": {"size": 3}, "text": {}}']
)
def test_a_config_of_somebody_else_is_refused(config, tmp_path):
    read.write(str(tmp_path / "clip"), built(VIT).state_dict(), {"config": config})
    message = refusal(model.load, str(tmp_path / "clip"))
    assert str(tmp_path / "clip") in message and "config" in message


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


# ------------------------------------------------------------------------------------------------------------
# tensors that do not fit


def test_missing_key_is_named(tmp_path):
    state = built(VIT).state_dict()
    del state["visual.ln_post.bias"]
    path = saved(tmp_path, official(state))
    message = refusal(model.load, path)
    assert path in message and "1 missing (visual.ln_post.bias)" in message and VIT in message


def test_unknown_key_is_named(tmp_path):
    path = saved(tmp_path, official(built(VIT).state_dict() | {"visual.ln_past.bias": torch.ones(3)}))
    message = refusal(model.load, path)
    assert path in message and "1 unknown (visual.ln_past.bias)" in message


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
    path = saved(tmp_path, official(built(VIT).state_dict() | {"visual.ln_post.bias": torch.ones(3)}))
    message = refusal(model.load, path)
    assert path in message and "visual.ln_post.bias is (3,), expected (32,)" in message


@pytest.mark.parametrize(
    "key, value",
    [("text_projection", None), ("text_projection", torch.ones(3, 16)), ("visual.conv1.weight", None)],
    ids=["missing", "shape", "first"],
)
def test_keys_that_tell_the_model_are_named_too(key, value, tmp_path):
    state = built(VIT).state_dict() | {key: value}
    path = saved(tmp_path, official({k: v for k, v in state.items() if v is not None}))
    message = refusal(model.load, path)
    assert path in message and VIT in message and key in message


def test_many_wrong_keys_are_counted_and_three_are_named(tmp_path):
    state = {key: value for key, value in built(VIT).state_dict().items() if ".mlp." not in key}
    message = refusal(model.load, saved(tmp_path, state))
    assert "8 missing (" in message and message.count(".mlp.") == 3 and "..." in message


def test_a_model_of_no_known_size_is_refused_with_the_nearest(tmp_path):
    own = dataclasses.replace(MODELS[VIT], visual=ViTConfig(32, 8, width=32, layers=3, head_width=16))
    path = saved(tmp_path, official(ChineseCLIP(own).state_dict()))
    message = refusal(model.load, path)
    assert (
        path in message
        and "12 unknown (visual.transformer.resblocks.2." in message
        and f"does not fit {VIT}" in message
    )


def test_whole_numbers_in_the_place_of_weights(tmp_path):
    state = built(VIT).state_dict()
    state["text_projection"] = state["text_projection"].long()
    assert "text_projection holds torch.int64" in refusal(model.load, saved(tmp_path, state))


def test_values_that_are_not_finite_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        state = built(VIT).state_dict()
        state["visual.transformer.resblocks.1.mlp.c_fc.weight"][3, 5] = value
        message = refusal(model.load, saved(tmp_path, official(half(state))))
        assert "visual.transformer.resblocks.1.mlp.c_fc.weight" in message and "expected finite" in message


def test_large_values_whose_sum_overflows_are_fine(tmp_path):
    state = built(VIT).state_dict()
    state["visual.ln_post.bias"][:] = 3e38
    assert same(model.load(saved(tmp_path, state))[0].state_dict(), state)
