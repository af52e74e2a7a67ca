"""weights/read.py: every layout it reads, what a wrong file gets, and writing."""

import dataclasses
import json
import os
import pickle
import shutil
import zipfile

import pytest
import safetensors.torch
import torch
from checkpoints import (RN, VIT, agree, built, features, half, hugging_face, official, openai_archive,
                         openai_tensors, refusal, rounded, same, saved, theirs, tree)
from conftest import random_pixels, shake

import model
from model import MODELS, ChineseCLIP
from tools import weights
from weights import download, read
from weights.names import WeightsError, to_hugging_face


# ------------------------------------------------------------------------------------------------------------
# layouts


def test_three_files_with_the_same_tensor(tmp_path):
    """safetensors, a PyTorch file and the wrapper of the official code, each with [1, 2] under the name x."""
    x = torch.tensor([1.0, 2.0])
    safetensors.torch.save_file({"x": x}, tmp_path / "a")
    paths = (str(tmp_path / "a"), saved(tmp_path, {"x": x}, "b"),
             saved(tmp_path, {"state_dict": {"module.x": x}}, "c"))
    for path, layout in zip(paths, ("safetensors", "PyTorch file", "PyTorch file"), strict=True):
        state, config, found = read.read(path)
        assert state["x"].tolist() == [1, 2] and list(state) == ["x"] and (config, found) == ("", layout)


@pytest.mark.parametrize("name", [VIT, RN])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_official_file(name, precision, tmp_path):
    state = built(name).state_dict()
    path = saved(tmp_path, official(half(state) if precision == "fp16" else state))
    loaded, preprocess = model.load(path)
    assert loaded.config == MODELS[name] and not loaded.training and preprocess.keywords == {"resolution": 32}
    assert same(loaded.state_dict(), rounded(state) if precision == "fp16" else state)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [VIT, RN])
def test_tensors_of_a_torchscript_archive_are_read_without_running_it(name, tmp_path, monkeypatch):
    path = str(tmp_path / "openai.pt")
    tensors = openai_archive(name, path)

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


def test_official_checkpoint_with_its_optimizer(tmp_path):  # the official code's epoch_latest.pt
    clip = built(RN)
    optimizer = torch.optim.AdamW(clip.parameters())
    clip.encode_image(random_pixels(1, 32)).sum().backward()
    optimizer.step()
    path = saved(tmp_path, official(clip.state_dict()) | {"optimizer": optimizer.state_dict()})
    assert same(model.load(path)[0].state_dict(), clip.state_dict())


def test_half_precision_comes_out_as_float32(tmp_path):
    state = built(VIT).state_dict()
    safetensors.torch.save_file(to_hugging_face(half(state)), tmp_path / "model.safetensors")
    loaded, _ = model.load(str(tmp_path))
    assert same(loaded.state_dict(), rounded(state))


# ------------------------------------------------------------------------------------------------------------
# names and folders


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


def test_names_are_fetched_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CACHE", str(tmp_path))
    (tmp_path / "ViT-B-16").mkdir()
    saved(tmp_path / "ViT-B-16", official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    assert model.load("ViT-B-16")[0].config == MODELS[VIT]

    def offline(name, root):
        raise WeightsError("no way there")
    monkeypatch.setattr(read, "fetch", offline)
    assert refusal(model.load, "RN50") == "no way there"


@pytest.mark.parametrize("where", ["ViT-B-16/clip_cn_vit-b-16.pt", "clip_cn_vit-b-16.pt"])
def test_names_are_looked_for_where_one_says(where, tmp_path, monkeypatch):
    """In the folder of the name, where they are fetched to, or where cn_clip puts them."""
    monkeypatch.setattr(download, "download", lambda url, path, tries: pytest.fail(f"fetched {path}"))
    (tmp_path / where).parent.mkdir(exist_ok=True)
    path = saved((tmp_path / where).parent, official(built(VIT).state_dict()), "clip_cn_vit-b-16.pt")
    assert read.find("ViT-B-16", str(tmp_path)) == path


def test_names_are_fetched_to_where_one_says(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "download", lambda url, path, tries: fetched.append(path))
    monkeypatch.setattr(download, "CACHE", str(tmp_path / "nowhere"))
    # a BERT's file name says nothing, so it is not looked for outside its folder
    saved(tmp_path, {}, "pytorch_model.bin")
    for name, file in (("ViT-B-16", "clip_cn_vit-b-16.pt"), ("rbt3", "pytorch_model.bin")):
        assert read.find(name, str(tmp_path)) == str(tmp_path / name / file) == fetched.pop()


def test_neither_a_file_nor_a_name(tmp_path):
    message = refusal(model.load, "ViT-B-17")
    assert "ViT-B-17" in message and "ViT-B-16" in message
    assert str(tmp_path) in refusal(model.load, str(tmp_path))  # a folder with nothing in it


# ------------------------------------------------------------------------------------------------------------
# what a wrong file gets


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


@pytest.mark.parametrize("damage, hint", [
    ("lost", "which is not beside it"), ("outside", "which is not beside it"),
    ("other", "does not fit "), ("no map", "not a readable checkpoint")])
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
