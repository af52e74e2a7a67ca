"""weights/names.py: the names of other programs become ours."""

import pytest
import torch
from checkpoints import VIT, built, official, refusal, same, saved

import model
from weights.names import from_hugging_face, to_hugging_face


def test_a_block_of_hugging_faces_by_hand():
    """One head of width one: q, k and v become the rows of one matrix, and the projection is transposed."""
    at = "vision_model.encoder.layers.3.self_attn."
    foreign = {at + "q_proj.weight": torch.tensor([[1.0]]), at + "k_proj.weight": torch.tensor([[2.0]]),
               at + "v_proj.weight": torch.tensor([[3.0]]),
               "visual_projection.weight": torch.tensor([[4.0, 5.0]])}
    ours = from_hugging_face(foreign)
    assert {key: value.tolist() for key, value in ours.items()} == {
        "visual.proj": [[4.0], [5.0]],
        "visual.transformer.resblocks.3.attn.in_proj_weight": [[1.0], [2.0], [3.0]]}
    assert same(to_hugging_face(ours), foreign)


def test_names_for_hugging_face_and_back():
    state = built(VIT).state_dict()
    there = to_hugging_face(state)
    assert not any(key.startswith(("visual.", "bert.")) or ".ln_" in key for key in there)
    assert same(from_hugging_face(there), state)


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


# ------------------------------------------------------------------------------------------------------------
# what has no place in the model


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_official_file_with_a_pooler(how, tmp_path):
    state = built(VIT).state_dict()
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    assert same(model.load(saved(tmp_path, official(state | pooler), **how))[0].state_dict(), state)


def test_old_files_with_pooler_and_position_numbers(tmp_path, capsys):
    clip = built(VIT)
    old = to_hugging_face(clip.state_dict()) | {
        "text_model.pooler.dense.weight": torch.ones(32, 32), "text_model.pooler.dense.bias": torch.ones(32),
        "text_model.embeddings.position_ids": torch.arange(512)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    loaded, _ = model.load(saved(tmp_path, old, "pytorch_model.bin"))
    assert same(loaded.state_dict(), clip.state_dict())
    assert "; 4 others in that file are not needed" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["visual.", "bert."])
def test_half_a_model_is_told_from_a_damaged_one(part, tmp_path):
    state = {k: v for k, v in built(VIT).state_dict().items() if k.startswith(part)}
    assert "no whole model" in refusal(model.load, saved(tmp_path, state))


@pytest.mark.parametrize("name", ["openai-ViT-B-16", "rbt3"])
def test_initialisers_are_no_whole_models(name, tmp_path):
    assert "--image-init" in refusal(model.load, name)  # without fetching it


# ------------------------------------------------------------------------------------------------------------
# tensors that cannot be renamed


@pytest.mark.parametrize("gone, hint", [("q_proj.weight", "missing"), ("k_proj.bias", "unknown"),
                                        ("visual_projection", "visual.proj")])
def test_a_missing_tensor_of_hugging_face(gone, hint, tmp_path):
    state = to_hugging_face(built(VIT).state_dict())
    del state[next(key for key in state if gone in key)]
    assert hint in refusal(model.load, saved(tmp_path, state))


@pytest.mark.parametrize("key, shape", [
    ("vision_model.encoder.layers.0.self_attn.k_proj.weight", (32, 16)),
    ("vision_model.encoder.layers.1.self_attn.q_proj.bias", ()),
    ("visual_projection.weight", (3,)), ("text_projection.weight", (16, 3))])
def test_misshaped_tensors_of_hugging_face(key, shape, tmp_path):
    state = to_hugging_face(built(VIT).state_dict()) | {key: torch.zeros(shape)}
    assert "does not fit ViT-tiny: " in refusal(model.load, saved(tmp_path, state))


def test_misshaped_tensors_of_flash_attention(tmp_path):
    state = built(VIT).state_dict() | {"bert.encoder.layer.0.attention.self.Wqkv.weight": torch.tensor(1.0)}
    assert "does not fit ViT-tiny: " in refusal(model.load, saved(tmp_path, state))
