"""
Weights as a command, `python -m tools.weights`: download them, look into them, convert them, mix two models.

    python -m tools.weights download ViT-B-16
    python -m tools.weights info vit-b-16.safetensors
    python -m tools.weights convert vit-b-16.safetensors clip_cn_vit-b-16.pt --to official
    python -m tools.weights interpolate ViT-B-16 out/muge/muge/best.safetensors between.safetensors

To convert is to load and to save in another layout. What `model.load` refuses is not converted, a file gets
its final name only when it is complete, and nothing is overwritten.
"""

import math
import os
import shlex
import shutil

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

import data
import model
from common import Flags, one_line_errors, replace, replace_text, write_json
from weights.download import CACHE, SOURCES, fetch
from weights.names import WeightsError, to_hugging_face
from weights.read import find, read, write
from weights.sizes import HUGGING_FACE_TEXT, HUGGING_FACE_VISION, describe, guess, read_config

# ------------------------------------------------------------------------------------------------------------
# to the official code and to transformers


def save_official(clip: model.ChineseCLIP, path: str):
    """A .pt for cn_clip.clip.load_from_name, and for --resume --reset-optimizer of its training script."""
    state = {f"module.{key}": value for key, value in clip.state_dict().items()}
    content = {"epoch": 0, "step": 0, "name": describe(clip.config, model.MODELS), "state_dict": state}
    replace(path, lambda temporary: torch.save(content, temporary))


def save_hugging_face(clip: model.ChineseCLIP, target: str):
    """A folder that ChineseCLIPModel.from_pretrained and ChineseCLIPProcessor.from_pretrained open offline.
    It gets its name when it is complete. WeightsError for a ResNet, for which transformers has no class."""
    if not isinstance(clip.config.visual, model.ViTConfig):
        raise WeightsError(f"{target}: transformers has no Chinese CLIP with a ResNet; --to official or ours")
    folder = os.path.normpath(target) + ".tmp"
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    resolution = clip.config.visual.resolution
    write_json(os.path.join(folder, "config.json"), hugging_face_config(clip.config))
    write_json(os.path.join(folder, "preprocessor_config.json"), {
        "image_processor_type": "ChineseCLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": resolution, "width": resolution}, "resample": 3,  # 3 is bicubic
        "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [round(float(x), 8) for x in data.PIXEL_MEAN],
        "image_std": [round(float(x), 8) for x in data.PIXEL_STD]})
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 52,  # the paper's context length
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "mask_token": "[MASK]", "split_special_tokens": True,  # "[SEP]" in a caption is four words
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]})
    replace_text(os.path.join(folder, "tokenizer.json"), hugging_face_tokenizer().to_str(pretty=True))
    replace(os.path.join(folder, "vocab.txt"), lambda temporary: shutil.copy(data.VOCAB, temporary))
    write(os.path.join(folder, "model.safetensors"), to_hugging_face(clip.state_dict()), {"format": "pt"})
    os.rename(folder, target)  # which may be an empty folder


def hugging_face_config(config: model.ModelConfig) -> dict:
    """config.json of a ChineseCLIPModel of these sizes. No number is left to its defaults."""
    v, t = config.visual, config.text
    return {
        "architectures": ["ChineseCLIPModel"], "model_type": "chinese_clip", "dtype": "float32",
        "projection_dim": config.embed_dim, "logit_scale_init_value": math.log(1 / 0.07),
        "vision_config": {theirs: getattr(v, mine) for mine, (theirs, _) in HUGGING_FACE_VISION.items()} | {
            "model_type": "chinese_clip_vision_model", "num_attention_heads": v.width // v.head_width,
            "intermediate_size": 4 * v.width, "projection_dim": config.embed_dim, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "attention_dropout": 0.0},
        "text_config": {theirs: getattr(t, mine) for mine, (theirs, _) in HUGGING_FACE_TEXT.items()} | {
            "model_type": "chinese_clip_text_model", "intermediate_size": 4 * t.width, "hidden_act": "gelu",
            "attention_probs_dropout_prob": t.dropout, "layer_norm_eps": 1e-12, "pad_token_id": 0}}


def hugging_face_tokenizer() -> Tokenizer:
    """Our tokenizer in the parts of the tokenizers library, which also add [CLS] and [SEP]. The ids are the
    same except for a few rare characters: ideographs 2B820 to 2B91F, and those newer than that library."""
    tokenizer = Tokenizer.from_str(data.wordpiece().to_str())
    # The library's own clean_text would also drop private-use characters, which BERT reads as [UNK].
    clean = [("[“”]", '"'), (r"[\t\n\r\p{Zs}]", " "), (r"[\x{fffd}\p{Cc}\p{Cf}]", "")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), by) for pattern, by in clean]
        + [normalizers.BertNormalizer(clean_text=False, lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
    return tokenizer


# ------------------------------------------------------------------------------------------------------------
# the command


def done(path: str, said: str = ""):
    """Print what was done, or the path, and a command to type next."""
    print(f"{said or path}\nnext: python -m tools.weights info {shlex.quote(path)}")


def info(file: str):
    """Print what a file is, without building a model."""
    path = find(file)
    state, config, layout = read(path)
    print(f"{path}: {layout}, {os.path.getsize(path):,} bytes, {len(state):,} tensors, "
          f"{sum(tensor.numel() for tensor in state.values()):,} numbers")
    if config:
        print(f"   its config says {describe(model.ModelConfig(*read_config(config, path)), model.MODELS)}")
    print(f"   its tensors look like {guess(state, model.MODELS) or 'none of ' + ', '.join(model.MODELS)}")


def convert(source: str, target: str, to: str):
    """Load any file and save it in another layout."""
    LAYOUTS[to](model.load(source)[0], target)
    done(target, f"wrote {target}")


def interpolate(first: str, second: str, target: str, share: float):
    """Save (1 - share) of one model's weights plus `share` of another's (WiSE-FT, Wortsman et al., 2022).
    WeightsError if the two have different sizes."""
    if not 0 <= share <= 1:
        raise WeightsError(f"--share {share}: expected 0 (all of A) to 1 (all of B)")
    one, other = model.load(first)[0], model.load(second)[0]
    if one.config != other.config:
        raise WeightsError(f"{first} is {describe(one.config, model.MODELS)}, {second} is "
                           f"{describe(other.config, model.MODELS)}; expected two of the same sizes")
    with torch.no_grad():
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values()):
            mine.copy_(torch.lerp(mine, theirs, share) if mine.is_floating_point() else theirs)
    model.save(one, target)
    done(target, f"wrote {target}: {1 - share:.0%} of {first}, {share:.0%} of {second}")


LAYOUTS = {"ours": model.save, "official": save_official, "huggingface": save_hugging_face}
COMMANDS = {"download": lambda name, to: done(fetch(name, to)), "info": info,
            "convert": convert, "interpolate": interpolate}


def main(argv: list[str] | None = None):
    parser = Flags("python -m tools.weights", description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    source = "a file, a folder of Hugging Face's, or a published name"
    part = commands.add_parser("download", help="fetch published weights (mirror: HF_ENDPOINT)")
    part.add_argument("name", choices=SOURCES)
    part.add_argument("--to", default=CACHE, metavar="FOLDER", help="default: %(default)s, for model.load")
    part = commands.add_parser("info", help="say what a file is")
    part.add_argument("file", metavar="FILE", help=source)
    part = commands.add_parser("convert", help="load any layout and write another")
    part.add_argument("source", metavar="IN", help=source)
    part.add_argument("target", metavar="OUT", help="a file; for huggingface a folder")
    part.add_argument("--to", required=True, choices=LAYOUTS, help="layout of OUT")
    part = commands.add_parser("interpolate", help="write the weights between two models of the same sizes")
    part.add_argument("first", metavar="A", help=source)
    part.add_argument("second", metavar="B", help=source)
    part.add_argument("target", metavar="OUT", help="a file, in our layout")
    part.add_argument("--share", type=float, default=0.5, metavar="X", help="of B (default: %(default)s)")
    arguments = vars(parser.parse_args(argv))  # under the names of the functions' parameters
    target = arguments.get("target", "")
    empty = arguments.get("to") == "huggingface" and os.path.isdir(target) and not os.listdir(target)
    if os.path.exists(target) and not empty:
        raise WeightsError(f"{target}: is there already; remove it or name another")
    if os.path.isfile(folder := os.path.dirname(target)):
        raise WeightsError(f"{target}: {folder} is a file; expected OUT in a folder, which need not exist")
    COMMANDS[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
