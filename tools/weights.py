"""
Weights as a command, `python -m tools.weights`: download them, look into them, convert them, mix models.

    python -m tools.weights download ViT-B-16 muge       # data sets, too
    python -m tools.weights info vit-b-16.safetensors
    python -m tools.weights convert vit-b-16.safetensors clip_cn_vit-b-16.pt --to official
    python -m tools.weights convert vit-b-16.safetensors vit-b-16-onnx --to onnx --dtype float16
    python -m tools.weights interpolate ViT-B-16 out/muge/muge/best.safetensors new.safetensors --sweep MUGE

To convert is to load and to save in another layout. What `model.load` refuses is not converted, a file gets
its final name only when it is complete, and nothing is overwritten.
"""

import contextlib
import copy
import dataclasses
import math
import os
import shlex
import shutil

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

import data
import model
from common import Flags, one_line_errors, replace, replace_text, write_json
from eval import retrieval
from sources.layouts import open_pairs
from sources.named import CLASSES, PAIRS, at_hand
from tools import onnx
from training.report import curve
from weights.download import CACHE, HUBS, SOURCES, fetch
from weights.names import WeightsError, to_hugging_face
from weights.read import find, read, write
from weights.sizes import HUGGING_FACE_TEXT, HUGGING_FACE_VISION, describe, guess, read_config

# ------------------------------------------------------------------------------------------------------------
# to the official code, to transformers and to ONNX


def save_official(clip: model.ChineseCLIP, path: str):
    """A .pt for cn_clip.clip.load_from_name, and for --resume --reset-optimizer of its training script."""
    state = {f"module.{key}": value for key, value in clip.state_dict().items()}
    content = {"epoch": 0, "step": 0, "name": describe(clip.config, model.MODELS), "state_dict": state}
    replace(path, lambda temporary: torch.save(content, temporary))


def save_hugging_face(clip: model.ChineseCLIP, target: str):
    """A folder that ChineseCLIPModel.from_pretrained and ChineseCLIPProcessor.from_pretrained open offline.
    WeightsError for a ResNet, for which transformers has no class."""
    if not isinstance(clip.config.visual, model.ViTConfig):
        raise WeightsError(f"{target}: transformers has no Chinese CLIP with a ResNet; --to official or ours")
    with whole_folder(target) as folder:
        write_json(os.path.join(folder, "config.json"), hugging_face_config(clip.config))
        save_preprocessing(clip.config.visual.resolution, folder)
        write(os.path.join(folder, "model.safetensors"), to_hugging_face(clip.state_dict()), {"format": "pt"})


def save_onnx(clip: model.ChineseCLIP, target: str, dtype: str = "float32"):
    """A folder with both towers as ONNX files (tools/onnx.py), laid out as transformers.js expects it. A
    ResNet's config.json holds our own config, for transformers has none."""
    onnx.expect("onnx", "onnxruntime", "onnxscript")
    is_vit = isinstance(clip.config.visual, model.ViTConfig)
    config = hugging_face_config(clip.config) if is_vit else dataclasses.asdict(clip.config)
    with whole_folder(target) as folder:
        write_json(os.path.join(folder, "config.json"), config | {"logit_scale": clip.logit_scale.item()})
        save_preprocessing(clip.config.visual.resolution, folder)
        onnx.export(clip, os.path.join(folder, "onnx"), dtype)


@contextlib.contextmanager
def whole_folder(target: str):
    """A new folder to write into, which gets the name `target` when it is complete."""
    folder = os.path.normpath(target) + ".tmp"
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    os.makedirs(folder)
    yield folder
    os.rename(folder, target)  # which may be an empty folder


def save_preprocessing(resolution: int, folder: str):
    """How pictures become pixels and captions become ids, as transformers and tokenizers read it."""
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
    clean = [("[“”]", '"'), (r"[\t\n\r\p{Zs}]", " "), ("[\ufffd\\p{Cc}\\p{Cf}]", "")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), by) for pattern, by in clean]
        + [normalizers.BertNormalizer(clean_text=False, lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
    return tokenizer


# ------------------------------------------------------------------------------------------------------------
# the command


def done(path: str, said: str = "", then: str = "weights info"):
    """Print what was done, or the path, and a command to type next."""
    print(f"{said or path}\nnext: python -m tools.{then} {shlex.quote(path)}")


def download(names: list[str], to: str, hub: str):
    """Fetch published files, from `hub` if it has them."""
    os.environ["ZHCLIP_HUB"] = hub
    for name in names:
        then = "curate check" if name in PAIRS else "measure prompts --model ViT-B-16 --data"
        done(fetch(name, to)) if name in SOURCES else done(at_hand(name, to), then=then)


def info(file: str):
    """Print what a file is, without building a model."""
    path = find(file)
    state, config, layout = read(path)
    print(f"{path}: {layout}, {os.path.getsize(path):,} bytes, {len(state):,} tensors, "
          f"{sum(tensor.numel() for tensor in state.values()):,} numbers")
    if config:
        print(f"   its config says {describe(model.ModelConfig(*read_config(config, path)), model.MODELS)}")
    print(f"   its tensors look like {guess(state, model.MODELS) or 'none of ' + ', '.join(model.MODELS)}")


def convert(source: str, target: str, to: str, dtype: str | None):
    """Load any file and save it in another layout; dtype: of ONNX files, None for any other layout."""
    LAYOUTS[to](model.load(source)[0], target, **({"dtype": dtype} if dtype else {}))
    done(target, f"wrote {target}", "search ~/Pictures --serve --model" if to == "onnx" else "weights info")


def interpolate(sources: list[str], target: str, share: float | None, sweep: list[str]):
    """Save the mean of several models' weights (a uniform soup: "Model soups", Wortsman et al., 2022) or, of
    two, (1 - share) of the first plus `share` of the second ("Robust fine-tuning of zero-shot models",
    WiSE-FT, Wortsman et al., 2022). With data sets to `sweep`, measure the way between the two, draw it, and
    let `share` be by default where the recall is best. WeightsError if the models have different sizes."""
    if len(sources) < 2 or len(sources) > 2 and (sweep or share is not None):
        raise WeightsError(f"{len(sources)} models: --share and --sweep take two, a mean two or more")
    if share is not None and not 0 <= share <= 1:
        raise WeightsError(f"--share {share}: expected 0 (all of the first) to 1 (all of the second)")
    pairs = {name: open_pairs(name, "valid") for name in sweep}  # a fault in them need not wait
    clips = [model.load(source)[0] for source in sources]
    for source, clip in zip(sources, clips):
        if clip.config != clips[0].config:
            raise WeightsError(f"{sources[0]} is {describe(clips[0].config, model.MODELS)}, {source} is "
                               f"{describe(clip.config, model.MODELS)}; expected models of the same sizes")
    mean, *others = (clip.state_dict() for clip in clips)
    if sweep:
        lines = recall_between(clips[0], mean, *others, pairs)
        if share is None:
            share = max(range(11), key=lambda n: sum(points[n][1] for points in lines.values())) / 10
    for count, other in enumerate(others, 2):
        mean = mixture(mean, other, 1 / count if share is None else share)
    clips[0].load_state_dict(mean)
    model.save(clips[0], target)
    if sweep:
        curve(f"{target}.png", {name: [points] for name, points in lines.items()},
              "mean recall (%) on validation pairs", f"% of {sources[1]}")
        print(f"the curve: {target}.png")
    done(target, f"wrote {target}: " + (f"the mean of {', '.join(sources)}" if share is None else
                                        f"{1 - share:.0%} of {sources[0]}, {share:.0%} of {sources[1]}"))


def mixture(one: dict, other: dict, share: float) -> dict[str, torch.Tensor]:
    """The state dict (1 - share) * one + share * other; BatchNorm's counters are the other's."""
    return {name: torch.lerp(value, other[name], share) if value.is_floating_point() else other[name]
            for name, value in one.items()}


def recall_between(clip, one: dict, other: dict, pairs: dict) -> dict[str, list[tuple[float, float]]]:
    """The mean recall on each of the named pairs when a model like `clip` has 0, 10, ... 100 % of `other` and
    the rest of `one`, printed as it is measured -> {name: [(percent, mean recall), ...]}."""
    between = copy.deepcopy(clip).to("cuda" if torch.cuda.is_available() else "cpu")
    lines = {name: [] for name in pairs}
    print("share  mean recall  text to image R@1  image to text R@1")
    for percent in range(0, 101, 10):
        between.load_state_dict(mixture(one, other, percent / 100))
        for name, some in pairs.items():
            found = retrieval(between, some)
            lines[name].append((percent, found["mean_recall"]))
            print(f"{percent:3} %  {found['mean_recall']:11.1f}  {found['text_to_image']['R@1']:17.1f}  "
                  f"{found['image_to_text']['R@1']:17.1f}   {name}", flush=True)
    return lines


LAYOUTS = {"ours": model.save, "official": save_official, "huggingface": save_hugging_face, "onnx": save_onnx}
COMMANDS = {"download": download, "info": info, "convert": convert, "interpolate": interpolate}


def main(argv: list[str] | None = None):
    parser = Flags("python -m tools.weights", description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    source = "a file, a folder of Hugging Face's, or a published name"
    part = commands.add_parser("download", help="fetch published weights and data (mirror: HF_ENDPOINT)")
    part.add_argument("names", nargs="+", choices=(*SOURCES, *PAIRS, *CLASSES), metavar="NAME",
                      help="weights: " + ", ".join(SOURCES) + "; data: " + ", ".join((*PAIRS, *CLASSES)))
    part.add_argument("--to", default=CACHE, metavar="FOLDER", help="default: %(default)s")
    part.add_argument("--from", dest="hub", default=os.environ.get("ZHCLIP_HUB", HUBS[0]), choices=HUBS,
                      help="the host to ask first (default: %(default)s, or ZHCLIP_HUB)")
    part = commands.add_parser("info", help="say what a file is")
    part.add_argument("file", metavar="FILE", help=source)
    part = commands.add_parser("convert", help="load any layout and write another")
    part.add_argument("source", metavar="IN", help=source)
    part.add_argument("target", metavar="OUT", help="a file; for huggingface and onnx a folder")
    part.add_argument("--to", required=True, choices=LAYOUTS, help="layout of OUT")
    part.add_argument("--dtype", choices=onnx.FILES, help="numbers of --to onnx (default: float32)")
    part = commands.add_parser("interpolate", help="write the mean of models, or a point between two")
    part.add_argument("sources", nargs="+", metavar="IN", help=source)
    part.add_argument("target", metavar="OUT", help="a file, in our layout")
    part.add_argument("--share", type=float, metavar="X", help="of the second of two (default: the mean)")
    part.add_argument("--sweep", nargs="+", default=[], metavar="DATA", help="measure recall on these sets' "
                      "validation pairs at shares of 0, 0.1 ... 1, draw it in OUT.png, take the best share")
    arguments = vars(parser.parse_args(argv))  # under the names of the functions' parameters
    target = arguments.get("target", "")
    if arguments.get("dtype") and arguments["to"] != "onnx":
        parser.error(f"--dtype {arguments['dtype']}: only --to onnx has a choice")
    folder = arguments.get("to") in ("huggingface", "onnx")
    empty = folder and os.path.isdir(target) and not os.listdir(target)
    picture = f"{target}.png" if arguments.get("sweep") else target
    for path in (target, picture):
        if os.path.exists(path) and not empty:
            raise WeightsError(f"{path}: is there already; remove it or name another")
    if os.path.isfile(folder := os.path.dirname(target)):
        raise WeightsError(f"{target}: {folder} is a file; expected OUT in a folder, which need not exist")
    COMMANDS[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
