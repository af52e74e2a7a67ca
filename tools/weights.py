"""
Weights as a command: fetch them, look into them, take them elsewhere. Typed as `python -m tools.weights`.

    python -m tools.weights download ViT-B-16
    python -m tools.weights info out/photos/scratch/best.safetensors
    python -m tools.weights convert clip_cn_vit-b-16.pt vit-b-16.safetensors --to ours
    python -m tools.weights convert vit-b-16.safetensors clip_cn_vit-b-16.pt --to official
    python -m tools.weights convert vit-b-16.safetensors vit-b-16-hf --to huggingface
    python -m tools.weights interpolate ViT-B-16 out/muge/muge/best.safetensors between.safetensors --share 0.5

To convert is to load and to save otherwise: what `model.load` refuses is not converted, and nothing has its
final name before it is complete.
"""

import argparse
import collections
import math
import os
import shutil
import sys

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

import data
from weights import download
import model
from common import replace, replace_text, write_json
from weights import read

# ------------------------------------------------------------------------------------------------------------
# to the official code and to transformers


def save_official(clip: model.ChineseCLIP, path: str):
    """A .pt that cn_clip.clip.load_from_name opens, and the official training script's --resume with
    --reset-optimizer."""
    state = {f"module.{key}": value for key, value in clip.state_dict().items()}
    content = {"epoch": 0, "step": 0, "name": model.describe(clip.config), "state_dict": state}
    replace(path, lambda temporary: torch.save(content, temporary))


def save_hugging_face(clip: model.ChineseCLIP, folder: str):
    """A folder that ChineseCLIPModel.from_pretrained and ChineseCLIPProcessor.from_pretrained open offline,
    under its name once it is complete. WeightsError for a ResNet, which transformers has no class for."""
    if not isinstance(clip.config.visual, model.ViTConfig):
        raise read.WeightsError(
            f"{folder}: transformers has no Chinese CLIP with a ResNet; --to official or --to ours")
    target, folder = folder, os.path.normpath(folder) + ".tmp"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier process that was killed
    resolution, context_length = clip.config.visual.resolution, 52
    write_json(os.path.join(folder, "config.json"), hugging_face_config(clip.config))
    write_json(os.path.join(folder, "preprocessor_config.json"), {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True, "size": {"height": resolution, "width": resolution}, "resample": 3,  # 3 is bicubic
        "do_center_crop": False,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": decimals(data.PIXEL_MEAN), "image_std": decimals(data.PIXEL_STD),
    })
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length,
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "mask_token": "[MASK]", "split_special_tokens": True,  # "[SEP]" in a caption is four words
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    })
    replace_text(os.path.join(folder, "tokenizer.json"), hugging_face_tokenizer().to_str(pretty=True))
    replace(os.path.join(folder, "vocab.txt"), lambda temporary: shutil.copy(data.VOCAB, temporary))
    read.write(os.path.join(folder, "model.safetensors"), read.to_hugging_face(clip.state_dict()),
                  {"format": "pt"})
    if os.path.isdir(target):  # an empty one, see `convert`
        os.rmdir(target)
    os.rename(folder, target)


def hugging_face_config(config: model.ModelConfig) -> dict:
    """config.json of a ChineseCLIPModel of these sizes, every number said: its defaults are another
    model's."""
    v, t = config.visual, config.text
    vision = {theirs: getattr(v, mine) for mine, (theirs, _) in model.HUGGING_FACE_VISION.items()}
    text = {theirs: getattr(t, mine) for mine, (theirs, _) in model.HUGGING_FACE_TEXT.items()}
    return {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "dtype": "float32",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),
        "vision_config": vision | {
            "model_type": "chinese_clip_vision_model", "num_attention_heads": v.width // v.head_width,
            "intermediate_size": 4 * v.width, "projection_dim": config.embed_dim, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "attention_dropout": 0.0},
        "text_config": text | {
            "model_type": "chinese_clip_text_model", "intermediate_size": 4 * t.width, "hidden_act": "gelu",
            "attention_probs_dropout_prob": t.dropout, "layer_norm_eps": 1e-12, "pad_token_id": 0},
    }


def hugging_face_tokenizer() -> Tokenizer:
    """Our tokenizer spelled in the parts of the tokenizers library, [CLS] and [SEP] added by itself. Same ids
    but for a few rare characters: ideographs 2B820 to 2B91F, and what Unicode named after that library."""
    tokenizer = Tokenizer.from_str(data.wordpiece().to_str())
    # the library's clean_text drops private-use characters too, which BERT reads as [UNK]
    clean = [("[“”]", '"'), (r"[\t\n\r\p{Zs}]", " "), (r"[\x{fffd}\p{Cc}\p{Cf}]", "")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), by) for pattern, by in clean]
        + [normalizers.BertNormalizer(clean_text=False, lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
    return tokenizer


def decimals(values) -> list[float]:
    """The numbers as they are published, without the digits that float32 adds."""
    return [round(float(value), 8) for value in values]


# ------------------------------------------------------------------------------------------------------------
# the command


def info(name_or_path: str):
    """What a file is, without building a model."""
    path = read.find(name_or_path)
    state, config, layout = read.read(path)
    numbers = sum(tensor.numel() for tensor in state.values())
    parts = collections.Counter()
    for key, tensor in state.items():
        parts[key.split(".")[0]] += tensor.numel()
    row = model.guess(state)
    print(f"{path}: {layout}, {os.path.getsize(path):,} bytes, {len(state):,} tensors, {numbers:,} numbers")
    for part, count in parts.most_common(12):
        print(f"   {count:>13,}  {part}")
    if config:
        print(f"   its config says {model.describe(model.config_from_json(config, path))}")
    print(f"   its tensors look like {row or 'none of ' + ', '.join(model.MODELS)}")
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        print(f"   temperature: cosines are multiplied by {state['logit_scale'].exp().item():.2f}")


def convert(source: str, target: str, layout: str):
    """Load any file, save it in another layout. WeightsError if `target` is there already: nothing is
    overwritten, but an empty folder becomes the folder of Hugging Face's."""
    empty = layout == "huggingface" and os.path.isdir(target) and not os.listdir(target)
    if os.path.exists(target) and not empty:
        raise read.WeightsError(f"{target}: is there already; remove it or name another")
    clip, _ = model.load(source)
    {"ours": model.save, "official": save_official, "huggingface": save_hugging_face}[layout](clip, target)
    print(f"wrote {target}")


def interpolate(first: str, second: str, target: str, share: float):
    """(1 - share) of one model's weights plus `share` of another's of the same sizes, such as the released
    one and what fine-tuning made of it: much of what was won is kept, and much of the generality that was
    lost comes back (WiSE-FT, Wortsman et al., 2022). WeightsError if they are not alike."""
    if not 0 <= share <= 1:
        raise read.WeightsError(f"--share {share}: expected 0 (all of A) to 1 (all of B)")
    if os.path.exists(target):
        raise read.WeightsError(f"{target}: is there already; remove it or name another")
    one, other = model.load(first)[0], model.load(second)[0]
    if one.config != other.config:
        raise read.WeightsError(f"{first} is {model.describe(one.config)}, {second} is "
                                   f"{model.describe(other.config)}; expected two of the same sizes")
    with torch.no_grad():
        for mine, theirs in zip(one.state_dict().values(), other.state_dict().values()):
            mine.copy_(torch.lerp(mine, theirs, share) if mine.is_floating_point() else theirs)
    model.save(one, target)
    print(f"wrote {target}: {1 - share:.0%} of {first}, {share:.0%} of {second}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m tools.weights", description="Published weights; files of other programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    names = ", ".join(download.SOURCES)
    part = commands.add_parser("download", help="fetch published weights", description=(
        f"Fetch published weights; resumes, checks, waits for others. Names: {names}. HF_ENDPOINT names a "
        "mirror of huggingface.co, HTTPS_PROXY a proxy."))
    part.add_argument("name", metavar="NAME", choices=download.SOURCES)
    part.add_argument("--to", default=download.CACHE, metavar="FOLDER",
                      help="default: %(default)s, where model.load looks")
    part = commands.add_parser("info", help="what is this file?", description="What a weights file is.")
    part.add_argument("file", metavar="FILE", help="a file, a folder of Hugging Face's, or a published name")
    part = commands.add_parser("convert", help="from any layout to another", description=(
        "Load any layout that model.load knows, write another."))
    part.add_argument("source", metavar="IN", help="a file, a folder of Hugging Face's, or a published name")
    part.add_argument("target", metavar="OUT", help="a file; for huggingface a folder")
    part.add_argument("--to", required=True, choices=("ours", "official", "huggingface"),
                      help="layout of OUT")
    part = commands.add_parser("interpolate", help="between two models", description=(
        "Weights between two models of the same sizes, as the released one and your fine-tuned one."))
    part.add_argument("first", metavar="A", help="a file, a folder of Hugging Face's, or a published name")
    part.add_argument("second", metavar="B", help="the same")
    part.add_argument("target", metavar="OUT", help="a file, in our layout")
    part.add_argument("--share", type=float, default=0.5, metavar="X", help="of B (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.command == "download":
            print(download.fetch(args.name, args.to))
        elif args.command == "info":
            info(args.file)
        elif args.command == "interpolate":
            interpolate(args.first, args.second, args.target, args.share)
        else:
            convert(args.source, args.target, args.to)
    except (read.WeightsError, download.DownloadError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where a download was")


if __name__ == "__main__":
    main()
