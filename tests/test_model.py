"""model.py: exact sizes and names, parity with Hugging Face's Chinese CLIP, save and load."""

import dataclasses
import math

import pytest
import torch
import transformers
from PIL import Image
from conftest import difference, random_pixels, shake

import model
from bert import BertConfig
from model import MODELS, ChineseCLIP, ModelConfig, normalise
from vit import ViTConfig

RELEASED = {  # all, visual, bert: counted on the official code
    "RN50": (76_989_537, 38_316_896, 37_886_208),
    "ViT-B-32": (189_919_489, 87_849_216, 101_677_056),
    "ViT-B-16": (188_262_913, 86_192_640, 101_677_056),
    "ViT-L-14": (406_233_089, 303_966_208, 101_677_056),
    "ViT-L-14-336": (406_560_769, 304_293_888, 101_677_056),
    "ViT-H-14": (957_598_209, 632_076_800, 324_472_832),
}
SMALL = [name for name in MODELS if name not in RELEASED]
PARITY = ModelConfig(
    24,
    ViTConfig(32, 8, width=48, layers=3, head_width=12),
    BertConfig(3, 40, 5, vocab_size=300, max_positions=60),
)


def on_meta(name: str) -> ChineseCLIP:
    with torch.device("meta"):
        return ChineseCLIP(MODELS[name])


def built(name: str, seed: int = 0) -> ChineseCLIP:
    torch.manual_seed(seed)
    return shake(ChineseCLIP(MODELS[name]), seed).eval()


def some_ids(rows: int, columns: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Captions of different lengths, [rows, columns]."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, columns), generator=g)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=g)
    return ids.masked_fill(torch.arange(columns) >= lengths, 0)


def test_similarity_by_hand():
    """[3, 4] has length 5, so it points to [0.6, 0.8]. Its cosine to [2, 0] is 0.6, and divided by the initial
    temperature this is 0.6 / 0.07 = 8.571429."""
    image_features = normalise(torch.tensor([[3.0, 4.0]]))
    text_features = normalise(torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(image_features, torch.tensor([[0.6, 0.8]]))
    logit_scale = ChineseCLIP(MODELS["ViT-tiny"]).logit_scale.exp()
    logits = logit_scale * image_features @ text_features.T
    torch.testing.assert_close(logits, torch.tensor([[8.571429]]))


# ------------------------------------------------------------------------------------------------------------
# sizes and names


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_are_the_official_ones(name):
    clip = on_meta(name)
    assert (
        tuple(sum(p.numel() for p in part.parameters()) for part in (clip, clip.visual, clip.bert))
        == RELEASED[name]
    )


@pytest.mark.parametrize(
    "name, keys",
    [
        (
            "ViT-B-16",
            {
                "visual.conv1.weight": (768, 3, 16, 16),
                "visual.class_embedding": (768,),
                "visual.positional_embedding": (197, 768),
                "visual.ln_pre.bias": (768,),
                "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
                "visual.transformer.resblocks.0.attn.out_proj.bias": (768,),
                "visual.transformer.resblocks.5.mlp.c_fc.weight": (3072, 768),
                "visual.transformer.resblocks.5.mlp.c_proj.weight": (768, 3072),
                "visual.proj": (768, 512),
                "bert.embeddings.word_embeddings.weight": (21128, 768),
                "bert.embeddings.token_type_embeddings.weight": (2, 768),
                "bert.embeddings.LayerNorm.weight": (768,),
                "bert.encoder.layer.11.attention.self.query.weight": (768, 768),
                "bert.encoder.layer.0.attention.output.LayerNorm.bias": (768,),
                "bert.encoder.layer.3.intermediate.dense.weight": (3072, 768),
                "bert.encoder.layer.3.output.dense.weight": (768, 3072),
                "text_projection": (768, 512),
                "logit_scale": (),
            },
        ),
        (
            "RN50",
            {
                "visual.conv1.weight": (32, 3, 3, 3),
                "visual.conv3.weight": (64, 32, 3, 3),
                "visual.bn3.running_var": (64,),
                "visual.bn1.num_batches_tracked": (),
                "visual.layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "visual.layer1.0.downsample.1.running_mean": (256,),
                "visual.layer3.5.conv2.weight": (256, 256, 3, 3),
                "visual.layer4.2.bn3.weight": (2048,),
                "visual.attnpool.positional_embedding": (50, 2048),
                "visual.attnpool.q_proj.weight": (2048, 2048),
                "visual.attnpool.c_proj.weight": (1024, 2048),
                "bert.embeddings.position_embeddings.weight": (512, 768),
                "bert.encoder.layer.2.output.LayerNorm.weight": (768,),
                "text_projection": (768, 1024),
                "logit_scale": (),
            },
        ),
    ],
)
def test_names_and_shapes_are_the_official_ones(name, keys):
    shapes = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert {key: shapes.get(key) for key in keys} == keys


@pytest.mark.parametrize(
    "name, image_heads, text_heads",
    [
        ("RN50", 32, 12),
        ("ViT-B-32", 12, 12),
        ("ViT-B-16", 12, 12),
        ("ViT-L-14", 16, 12),
        ("ViT-L-14-336", 16, 12),
        ("ViT-H-14", 16, 16),
    ],
)
def test_heads_that_no_shape_tells(name, image_heads, text_heads):
    clip = on_meta(name)
    pool = clip.visual.attnpool if name == "RN50" else clip.visual.transformer.resblocks[0].attn
    assert (pool.heads, clip.bert.encoder.layer[0].attention["self"].heads) == (image_heads, text_heads)


@pytest.mark.parametrize(
    "name, count", [("RN50", 394), ("ViT-B-16", 351), ("ViT-L-14", 495), ("ViT-H-14", 783)]
)
def test_no_tensor_that_the_official_files_lack(
    name, count
):  # counted on the official code, without its pooler
    assert len(on_meta(name).state_dict()) == count


def test_the_table_begins_with_the_papers_models():
    assert list(MODELS)[:6] == list(RELEASED)


# ------------------------------------------------------------------------------------------------------------
# parity


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> ChineseCLIPModel's: q, k, v apart, projections as nn.Linear stores them."""
    theirs = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    renamed = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for key, value in state.items():
        if key.startswith("bert."):
            theirs["text_model." + key.removeprefix("bert.")] = value
        elif key.startswith("visual.ln_pre"):
            theirs[key.replace("visual.ln_pre", "vision_model.pre_layrnorm")] = value  # sic
        elif key.startswith("visual.ln_post"):
            theirs[key.replace("visual.ln_post", "vision_model.post_layernorm")] = value
        elif key.startswith("visual.transformer.resblocks."):
            layer, part = key.removeprefix("visual.transformer.resblocks.").split(".", 1)
            at = f"vision_model.encoder.layers.{layer}."
            if part.startswith("attn.in_proj_"):
                for q, third in zip("qkv", value.chunk(3), strict=True):
                    theirs[f"{at}self_attn.{q}_proj.{part.removeprefix('attn.in_proj_')}"] = third
            else:
                module, tensor = part.rsplit(".", 1)
                theirs[f"{at}{renamed[module]}.{tensor}"] = value
    return theirs


def hugging_face(clip: ChineseCLIP) -> transformers.ChineseCLIPModel:
    visual, text = clip.config.visual, clip.config.text
    theirs = transformers.ChineseCLIPModel(
        transformers.ChineseCLIPConfig(
            projection_dim=clip.config.embed_dim,
            vision_config={
                "hidden_size": visual.width,
                "intermediate_size": 4 * visual.width,
                "hidden_act": "quick_gelu",
                "num_hidden_layers": visual.layers,
                "num_attention_heads": visual.width // visual.head_width,
                "image_size": visual.resolution,
                "patch_size": visual.patch_size,
            },
            text_config={
                "hidden_size": text.width,
                "intermediate_size": 4 * text.width,
                "hidden_act": "gelu",
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.max_positions,
            },
        )
    )
    theirs.load_state_dict(to_hugging_face(clip.state_dict()))  # strict: nothing missing, nothing left over
    return theirs.eval()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_both_towers_equal_hugging_face(dtype, limit):
    torch.manual_seed(0)
    clip = shake(ChineseCLIP(PARITY)).eval()
    theirs = hugging_face(clip).to(dtype)
    clip, pixels, ids = clip.to(dtype), random_pixels(3, 32).to(dtype), some_ids(5, 20, 300)
    with torch.no_grad():
        image = theirs.vision_model(pixel_values=pixels).pooler_output @ theirs.visual_projection.weight.T
        tokens = theirs.text_model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        assert difference(clip.encode_image(pixels), image) < limit
        assert difference(clip.encode_text(ids), tokens[:, 0] @ theirs.text_projection.weight.T) < limit


def test_similarity_equals_hugging_face():
    torch.manual_seed(0)
    clip = shake(ChineseCLIP(PARITY)).eval()
    pixels, ids = random_pixels(3, 32), some_ids(5, 20, 300)
    with torch.no_grad():
        theirs = hugging_face(clip)(pixel_values=pixels, input_ids=ids, attention_mask=(ids != 0).long())
        assert difference(clip.get_similarity(pixels, ids)[0], theirs.logits_per_image) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# the interface


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
def test_forward_gives_unit_norms_and_the_scale(name):
    clip = built(name)
    with torch.no_grad():
        image, text, scale = clip(random_pixels(3, 32), some_ids(4, 12, 21128))
    assert image.shape == (3, 16) and text.shape == (4, 16)
    assert difference(image.norm(dim=1), torch.ones(3)) < 1e-6
    assert difference(text.norm(dim=1), torch.ones(4)) < 1e-6
    assert torch.equal(scale, clip.logit_scale.exp())


def test_encoders_do_not_normalise():
    clip = built("ViT-tiny")
    with torch.no_grad():
        image, text, _ = clip(random_pixels(2, 32), some_ids(2, 12, 21128))
        for unit, raw in (
            (image, clip.encode_image(random_pixels(2, 32))),
            (text, clip.encode_text(some_ids(2, 12, 21128))),
        ):
            assert (raw.norm(dim=1) - 1).abs().min() > 0.05
            assert difference(unit * raw.norm(dim=1, keepdim=True), raw) < 1e-6


def test_temperature_starts_at_the_papers():
    assert math.isclose(ChineseCLIP(MODELS["ViT-tiny"]).logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)


def test_similarity_is_scaled_cosine_and_its_transpose():
    clip, pixels, ids = built("ViT-tiny"), random_pixels(3, 32), some_ids(5, 12, 21128)
    with torch.no_grad():
        per_image, per_text = clip.get_similarity(pixels, ids)
        image, text = clip.encode_image(pixels), clip.encode_text(ids)
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    assert torch.equal(per_image, per_text.T) and per_image.shape == (3, 5)
    assert difference(per_image, clip.logit_scale.exp().detach() * cosine) < 1e-5


def test_a_picture_without_a_batch_is_told_what_it_lacks():
    with pytest.raises(TypeError, match=r"\[3, 32, 32\]\): .*\[None\]"):
        built("ViT-tiny").encode_image(random_pixels(1, 32)[0])


def test_half_precision_models_take_float32_pixels():
    clip = built("ViT-tiny").bfloat16()
    with torch.no_grad():
        image, text, _ = clip(random_pixels(2, 32), some_ids(2, 12, 21128))
    assert image.dtype == text.dtype == torch.float32  # normalised in float32
    assert difference(image.norm(dim=1), torch.ones(2)) < 1e-6


def test_grad_checkpointing_reaches_both_towers():
    clip = built("ViT-tiny")
    clip.set_grad_checkpointing()
    assert clip.visual.transformer.grad_checkpointing and clip.bert.encoder.grad_checkpointing
    clip.set_grad_checkpointing(False)
    assert not clip.visual.transformer.grad_checkpointing and not clip.bert.encoder.grad_checkpointing
    built("RN-tiny").set_grad_checkpointing()  # whose image tower has none to reach


# ------------------------------------------------------------------------------------------------------------
# save and load


@pytest.mark.parametrize("name", SMALL)
def test_what_is_saved_is_loaded_bit_for_bit(name, tmp_path, capsys):
    clip, path = built(name), str(tmp_path / "any name at all")
    model.save(clip, path)
    loaded, preprocess = model.load(path)
    assert name in capsys.readouterr().out  # says what it loaded
    assert loaded.config == clip.config and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    theirs = loaded.state_dict()
    assert list(theirs) == list(clip.state_dict())
    assert all(
        torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype
        for key, value in clip.state_dict().items()
    )
    S = clip.config.visual.resolution
    with torch.no_grad():
        # The file's tensors have another alignment in memory, for which a kernel may add up in another order.
        pixels = random_pixels(1, S)
        assert difference(loaded.encode_image(pixels), clip.encode_image(pixels)) < 1e-5
    assert preprocess(Image.new("L", (5, 9))).shape == (3, S, S)


def test_a_model_of_ones_own_needs_no_row_in_the_table(tmp_path):
    clip, path = shake(ChineseCLIP(PARITY)), str(tmp_path / "own.safetensors")
    model.save(clip, path)
    assert model.load(path)[0].config == PARITY


def test_head_counts_travel_with_the_file(tmp_path):  # they cannot be read off shapes
    row = MODELS["ViT-tiny"]
    config = dataclasses.replace(
        row, visual=dataclasses.replace(row.visual, head_width=8), text=dataclasses.replace(row.text, heads=4)
    )
    model.save(ChineseCLIP(config), str(tmp_path / "heads"))
    assert model.load(str(tmp_path / "heads"))[0].config == config


def test_loaded_models_learn(tmp_path):  # no tensor is left read-only by the file it came from
    clip, path = built("ViT-tiny"), str(tmp_path / "clip")
    model.save(clip, path)
    loaded = model.load(path)[0].train()
    loss = sum(f.sum() for f in loaded(random_pixels(2, 32), some_ids(2, 12, 21128)))
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(loaded.visual.conv1.weight, clip.visual.conv1.weight)
    assert torch.equal(
        model.load(path)[0].visual.conv1.weight, clip.visual.conv1.weight
    )  # and the file stays as it was
