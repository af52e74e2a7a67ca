"""weights/read.py, through model.load and start.initialise: every layout it reads, and what a wrong file gets."""

import dataclasses
import json
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from conftest import difference, random_pixels, shake
from torch import nn
from checkpoints import RN, VIT, built, half, official, refusal, rounded, same, saved

import model
from weights import read
from bert import BertConfig
from model import MODELS, ChineseCLIP
from vit import ViTConfig, resize_positions
from weights.start import initialise


# ------------------------------------------------------------------------------------------------------------
# whole models


@pytest.mark.parametrize("name", [VIT, RN])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_official_file(name, precision, tmp_path):
    state = built(name).state_dict()
    path = saved(tmp_path, official(half(state) if precision == "fp16" else state))
    loaded, preprocess = model.load(path)
    assert loaded.config == MODELS[name] and not loaded.training and preprocess.keywords == {"resolution": 32}
    assert same(loaded.state_dict(), rounded(state) if precision == "fp16" else state)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_official_file_with_a_pooler(how, tmp_path):
    state = built(VIT).state_dict()
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    assert same(model.load(saved(tmp_path, official(state | pooler), **how))[0].state_dict(), state)


@pytest.mark.parametrize("name", [VIT, RN])
def test_plain_state_dict(name, tmp_path):
    state = built(name).state_dict()
    assert same(model.load(saved(tmp_path, state))[0].state_dict(), state)


def test_safetensors_without_a_config(tmp_path):
    state = built(VIT).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert same(model.load(str(tmp_path / "model.safetensors"))[0].state_dict(), state)
    assert same(model.load(str(tmp_path))[0].state_dict(), state)  # a folder stands for the file in it


def test_our_training_checkpoint_brings_its_config(tmp_path):
    row = MODELS[VIT]
    config = dataclasses.replace(
        row, visual=dataclasses.replace(row.visual, head_width=8)
    )  # heads: not in any shape
    clip = shake(ChineseCLIP(config))
    optimizer = torch.optim.AdamW(clip.parameters())
    clip(random_pixels(2, 32), torch.tensor([[101, 5, 102]] * 2))[0].sum().backward()
    optimizer.step()
    checkpoint = {
        "model": clip.state_dict(),
        "config": json.dumps(dataclasses.asdict(config)),
        "step": 3,
        "best": 0.5,
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }
    loaded, _ = model.load(saved(tmp_path, checkpoint))
    assert loaded.config == config and same(loaded.state_dict(), clip.state_dict())


def test_our_file_under_any_name(tmp_path):
    clip = built(VIT)
    for name in ("clip.pt", "clip.bin", "clip"):
        model.save(clip, str(tmp_path / name))
        assert same(model.load(str(tmp_path / name))[0].state_dict(), clip.state_dict())


def test_official_file_under_the_name_of_ours(tmp_path):
    state = built(VIT).state_dict()
    os.rename(saved(tmp_path, official(state)), tmp_path / "clip.safetensors")
    assert same(model.load(str(tmp_path / "clip.safetensors"))[0].state_dict(), state)


def test_loaded_official_files_can_be_saved_as_ours(tmp_path):
    path = saved(tmp_path, official(built(RN).state_dict()))
    loaded, _ = model.load(path)
    model.save(loaded, str(tmp_path / "ours.safetensors"))
    assert same(model.load(str(tmp_path / "ours.safetensors"))[0].state_dict(), built(RN).state_dict())


def test_training_a_loaded_model_leaves_the_file_alone(tmp_path):  # tensors may be mapped from it
    path = saved(tmp_path, official(built(VIT).state_dict()))
    with open(path, "rb") as file:
        before = file.read()
    loaded, _ = model.load(path)
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1.0)
    with open(path, "rb") as file:
        assert file.read() == before


# ------------------------------------------------------------------------------------------------------------
# OpenAI's CLIP: an image tower


def tree(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules in modules, so that each tensor stands under its name."""
    root = nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        if value.is_floating_point() and "running" not in last:
            node.register_parameter(last, nn.Parameter(value.clone()))
        else:
            node.register_buffer(last, value.clone())
    return root


def openai_tensors(name: str) -> dict[str, torch.Tensor]:
    """visual.* in half precision but for norms, as convert_weights leaves it, and a text side unlike ours."""
    state = {
        key: value for key, value in built(name, seed=3).state_dict().items() if key.startswith("visual.")
    }
    state = {
        key: value if ".ln_" in key or "bn" in key else half({key: value})[key]
        for key, value in state.items()
    }
    return state | {
        "logit_scale": torch.tensor(4.6052),
        "text_projection": torch.ones(8, 16).half(),
        "positional_embedding": torch.ones(77, 8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8).half(),
        "token_embedding.weight": torch.ones(10, 8),
        "ln_final.weight": torch.ones(8),
        "input_resolution": torch.tensor(32),
    }


@pytest.fixture(params=[VIT, RN])
def openai_archive(request, tmp_path):
    """-> (model's name, path of a TorchScript archive, the tensors in it)."""
    tensors = openai_tensors(request.param)
    path = str(tmp_path / "openai.pt")
    torch.jit.script(tree(tensors)).save(path)
    return request.param, path, tensors


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tensors_of_a_torchscript_archive_are_read_without_running_it(openai_archive, monkeypatch):
    _, path, tensors = openai_archive

    def forbidden(*args, **kwargs):
        raise AssertionError("the archive was run")

    for where, name in (
        (torch.jit, "load"),
        (torch._C, "import_ir_module"),
        (torch, "load"),
        (torch.serialization, "load"),
    ):
        monkeypatch.setattr(where, name, forbidden)
    state, config, layout = read.read(path)
    assert config == "" and layout == "TorchScript archive" and same(
        state, rounded(tensors) | {k: v for k, v in tensors.items() if v.dtype != torch.float16}
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("plain", [False, True], ids=["archive", "state dict"])
def test_image_tower_starts_from_openais(openai_archive, plain, tmp_path, capsys):
    name, path, tensors = openai_archive
    clip = built(name)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    initialise(clip, MODELS, image_init=saved(tmp_path, tensors, "plain.pt") if plain else path)
    state = clip.state_dict()
    for key, value in state.items():
        taken = key.startswith("visual.") or key == "logit_scale"
        assert torch.equal(value, tensors[key].to(value.dtype) if taken else before[key]), key
    assert "left out 6 tensors" in capsys.readouterr().out  # what is left out is said


def test_image_tower_starts_from_a_chinese_clip(tmp_path):
    source, clip = built(VIT, seed=1), built(VIT, seed=2)
    text = clip.text_projection.clone()
    initialise(clip, MODELS, image_init=saved(tmp_path, official(half(source.state_dict()))))
    assert same(clip.visual.state_dict(), rounded(source.visual.state_dict()))
    assert torch.equal(clip.text_projection, text)


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


def test_position_table_of_resnets_smallest_grid(
    tmp_path,
):  # one position at 32 pixels: corner to corner is all it can be
    table = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    out = resize_positions(table, 5)
    assert torch.equal(out, torch.cat([table, table[1:].expand(3, -1)]))


# ------------------------------------------------------------------------------------------------------------
# RoBERTa: a text tower


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
    assert "left out" in capsys.readouterr().out


def test_both_towers_at_once(tmp_path):
    image, text, clip = built(RN, seed=1), built(RN, seed=2), built(RN, seed=3)
    initialise(
        clip, MODELS, saved(tmp_path, openai_tensors(RN), "i.pt"), saved(tmp_path, text.bert.state_dict(), "t.pt")
    )
    assert same(clip.bert.state_dict(), text.bert.state_dict())
    assert not torch.equal(clip.visual.conv1.weight, image.visual.conv1.weight)
    assert torch.equal(clip.visual.conv1.weight, openai_tensors(RN)["visual.conv1.weight"].float())


# ------------------------------------------------------------------------------------------------------------
# what a wrong file gets


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
        and f"looks like {VIT}" in message
    )


def test_image_tower_of_another_model_is_refused_with_a_guess(tmp_path):
    path = saved(tmp_path, official(built(RN).state_dict()))
    message = refusal(initialise, built(VIT), MODELS, image_init=path)
    assert path in message and "visual.class_embedding" in message and f"looks like {RN}" in message


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


@pytest.mark.parametrize(
    "config", ["not json", "[]", "{}", '{"embed_dim": 16, "visual": {"size": 3}, "text": {}}']
)
def test_a_config_of_somebody_else_is_refused(config, tmp_path):
    read.write(str(tmp_path / "clip"), built(VIT).state_dict(), {"config": config})
    message = refusal(model.load, str(tmp_path / "clip"))
    assert str(tmp_path / "clip") in message and "config" in message


@pytest.mark.parametrize(
    "content",
    [[1, 2], "text", {}, {"state_dict": {}}, {"state_dict": 5}, torch.ones(3), {"a": 1}],
    ids=["list", "text", "nothing", "empty", "number", "tensor", "no tensor"],
)
def test_something_else_saved_by_torch_is_refused(content, tmp_path):
    path = saved(tmp_path, content)
    assert path in refusal(model.load, path)


def test_values_that_are_no_tensors_are_named(tmp_path):
    path = saved(tmp_path, official(built(VIT).state_dict() | {"visual.note": "hello"}))
    message = refusal(model.load, path)
    assert path in message and "'module.visual.note' is a str" in message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "hello\n",
        "# weights\n",
        "这不是模型",
        "<html>404</html>",
        '{"a": 1}',
        "1234567 {",
        "url,caption\n",
        "some notes\n",
    ],
)
def test_text_files_are_refused(content, tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text(content, encoding="utf-8")
    message = refusal(model.load, str(path))
    assert str(path) in message and "not a readable checkpoint" in message


def test_other_zip_files_are_refused(tmp_path):
    path = str(tmp_path / "photos.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/1.jpg", b"...")
    assert path in refusal(model.load, path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors", "torchscript"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.99])
def test_half_downloaded_files_are_refused(layout, share, tmp_path):
    state, path = built(VIT).state_dict(), tmp_path / "clip"
    if layout == "safetensors":
        safetensors.torch.save_file(state, path)
    elif layout == "torchscript":
        torch.jit.script(tree(openai_tensors(VIT) | {"filler": torch.ones(10**6)})).save(str(path))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal(model.load, str(path))
    assert str(path) in message and "is it complete" in message


def test_half_downloaded_small_files_are_refused(tmp_path):
    path = tmp_path / "clip"
    torch.save({"visual.conv1.weight": torch.ones(10_000)}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    assert str(path) in refusal(model.load, str(path))


def test_neither_a_file_nor_a_name(tmp_path):
    message = refusal(model.load, "ViT-B-17")
    assert "ViT-B-17" in message and "ViT-B-16" in message
    assert str(tmp_path) in refusal(model.load, str(tmp_path))  # a folder with nothing in it


# ------------------------------------------------------------------------------------------------------------
# nothing is executed


class Malice:
    """Pickled: "call open(path, 'w')". Whoever unpickles it makes the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle", "torchscript"])
def test_code_in_a_pickle_does_not_run(layout, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "clip.pt"
    content = {"state_dict": {"visual.conv1.weight": torch.ones(3), "x": Malice(marker)}}
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif layout == "torchscript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", pickle.dumps({"x": Malice(marker)}))
            archive.writestr("clip/constants.pkl", pickle.dumps(()))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    message = refusal(model.load, str(path))
    assert str(path) in message and not marker.exists()
    pickle.loads(pickle.dumps(Malice(marker)))  # it would have worked
    assert marker.exists()


# ------------------------------------------------------------------------------------------------------------
# writing


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    model.save(built(VIT, seed=1), str(path))
    before = path.read_bytes()

    def disk_full(state, temporary, metadata):
        with open(temporary, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        model.save(built(VIT, seed=2), str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["clip.safetensors"]


def test_save_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "clip.safetensors"
    for seed in (1, 2):
        model.save(built(VIT, seed), str(path))
        assert same(model.load(str(path))[0].state_dict(), built(VIT, seed).state_dict())
    assert os.listdir(path.parent) == ["clip.safetensors"]


def test_saved_files_are_safetensors_that_anybody_can_open(tmp_path):
    model.save(built(VIT), str(tmp_path / "clip.safetensors"))
    assert same(safetensors.torch.load_file(tmp_path / "clip.safetensors"), dict(built(VIT).state_dict()))
    with safetensors.safe_open(tmp_path / "clip.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["embed_dim"] == 16


@pytest.mark.skipif(os.name == "nt", reason="no such modes on Windows")
def test_saved_files_have_the_usual_permissions(tmp_path):
    model.save(built(VIT), str(tmp_path / "clip.safetensors"))
    (tmp_path / "other").write_text("")
    assert (tmp_path / "clip.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
