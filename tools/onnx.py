"""
A model as two ONNX files: `export` writes them, OnnxCLIP stands for a model that computes with them.

    onnx/vision_model.onnx   pixel_values [B, 3, S, S] float32   ->  image_embeds [B, E] float32
    onnx/text_model.onnx     input_ids    [B, T] int64           ->  text_embeds  [B, E] float32

B is any number and T is 1 to 512; 0 in input_ids is padding, which changes no feature. Features are not
normalised. Names are those of transformers.js; a file above protobuf's 2 GB has its numbers in NAME_data.
`onnx` below is the package of that name. It, onnxscript and onnxruntime are optional.
"""

import contextlib
import functools
import glob
import importlib.util
import json
import logging
import os
import tempfile
import warnings

import numpy as np
import torch
from torch import nn

import model
from bert import PAD_ID, cut_padding
from data import preprocess
from weights.names import WeightsError
from weights.read import read_description
from weights.sizes import SkipInit, describe, read_config

FILES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # how the names of files end
TOWERS = {"vision": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}  # input, output
LARGE = 2**31 - 2**24  # bytes of numbers beside which a graph still fits into protobuf's 2 GB


def expect(*packages: str):
    """WeightsError if one of these packages is not installed."""
    if missing := [package for package in packages if not importlib.util.find_spec(package)]:
        raise WeightsError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


# ------------------------------------------------------------------------------------------------------------
# to ONNX


class TextTower(nn.Module):
    """ids [B, T] -> features [B, E]. Like `encode_text`, but no padding is cut: how much would depend on the
    ids, and a graph has the same nodes for all."""

    def __init__(self, clip: model.ChineseCLIP):
        super().__init__()
        self.bert, self.text_projection = clip.bert, clip.text_projection

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bert.encoder(self.bert.embeddings(ids), ids != PAD_ID) @ self.text_projection


def export(clip: model.ChineseCLIP, folder: str, dtype: str):
    """Write both towers of a float32 model. float16: all but input and output. int8: matrices, each column
    with a scale of its own, convolutions and tables in 8 bits, and activations rounded as they come. The 8
    bits are unsigned, for signed ones overflow on CPUs without AVX512-VNNI."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16
    os.makedirs(folder)
    S = clip.config.visual.resolution
    batch, length = torch.export.Dim("batch", max=2**20), torch.export.Dim("length", max=512)
    for name, tower, example, dims in (
            ("vision", clip.visual, torch.zeros(2, 3, S, S), {0: batch}),
            ("text", TextTower(clip).eval(), torch.full((2, 7), 101), {0: batch, 1: length})):
        path = os.path.join(folder, f"{name}_model{FILES[dtype]}.onnx")
        with tempfile.TemporaryDirectory(dir=folder) as room, quiet():
            plain = graph(tower, example, dims, room, *TOWERS[name])
            if dtype == "int8":
                quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QUInt8)
                continue
            proto = onnx.load(plain)
            if dtype == "float16":
                proto = convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True)
            large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGE
            onnx.save(proto, path, save_as_external_data=large, location=f"{os.path.basename(path)}_data")


def graph(tower: nn.Module, example: torch.Tensor, dims: dict, room: str, given: str, result: str) -> str:
    """The path of a float32 ONNX file in the folder `room`, its numbers beside it. onnxruntime computes once
    what depends on no input, such as the parts of a matrix, so that each is there once and as it is used."""
    import onnxruntime
    raw, plain = os.path.join(room, "raw.onnx"), os.path.join(room, "plain.onnx")
    with torch.no_grad():  # strict: otherwise len(x) in vit.py is a constant, the example's
        program = torch.export.export(tower, (example,), dynamic_shapes=(dims,), strict=True)
        torch.onnx.export(program, (), raw, input_names=[given], output_names=[result], dynamo=True,
                          dynamic_shapes=(dims,), verbose=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # for any machine
    options.optimized_model_filepath = plain
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "plain.data")
    onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    return plain


@contextlib.contextmanager
def quiet():
    """Drop what exporter and quantiser warn of, such as that torchvision is not installed."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------------
# from ONNX


def towers_in(folder: str) -> list[str]:
    """The ONNX files of towers in an exported folder, the vision model's first."""
    return [path for name in TOWERS for path in sorted(glob.glob(
        os.path.join(glob.escape(folder), "onnx", f"{name}_model*.onnx")))]


class OnnxCLIP(model.ChineseCLIP):
    """A ChineseCLIP whose towers are the files of a folder. onnxruntime computes them on the CPU, in as many
    threads as torch has. The parameters have shapes, but no values, except logit_scale."""

    def __init__(self, folder: str):
        """WeightsError if something in the folder is missing, damaged, or of another model than the rest."""
        expect("onnxruntime")
        import onnxruntime
        paths, description = towers_in(folder), os.path.join(folder, "config.json")
        names = [os.path.basename(path) for path in paths]
        if [name.split("_")[0] for name in names] != list(TOWERS) or not os.path.isfile(description):
            raise WeightsError(f"{folder}: has {', '.join(names)} in onnx/; expected one vision_model*.onnx, "
                               "one text_model*.onnx, and config.json beside onnx/; export it again")
        text = read_description(description)
        config = model.ModelConfig(*read_config(text, description))
        with SkipInit(), torch.device("meta"):
            super().__init__(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.logit_scale = nn.Parameter(torch.tensor(float(json.loads(text)["logit_scale"])))
            self.vision, self.text = (onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]) for path in paths)
        except Exception as error:  # onnxruntime has one of its own for every kind of damage
            raise WeightsError(f"{folder}: cannot be opened ({type(error).__name__}: {error!s:.150}); "
                               "export it again") from None
        S, E = config.visual.resolution, config.embed_dim
        found = self.vision.get_inputs()[0].shape[1:] + [
            tower.get_outputs()[0].shape[1] for tower in (self.vision, self.text)]
        if found != [3, S, S, E, E]:
            raise WeightsError(f"{folder}: its towers have the sizes {found}, its config.json says "
                               f"{[3, S, S, E, E]}; export it again")
        self.folder = os.path.join(folder, "onnx")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The bytes of the towers' files, from which tools/measure/kept.py knows a model again."""
        return {name: torch.from_numpy(np.memmap(os.path.join(self.folder, name), mode="c"))
                for name in sorted(os.listdir(self.folder))}

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.vision.run(None, {"pixel_values": pixels.numpy()})[0])

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.text.run(None, {"input_ids": cut_padding(ids).numpy()})[0])


def load(name: str, device: str | torch.device = "cpu", dtype: str = "float32"):
    """`model.load`, but `name` may also be a folder that `export` wrote a part of; it stays on the CPU and in
    its own precision."""
    if not towers_in(name):
        return model.load(name, device, dtype=dtype)
    clip = OnnxCLIP(name)
    print(f"loaded {name} (ONNX): {describe(clip.config, model.MODELS)}, "
          f"{', '.join(map(os.path.basename, towers_in(name)))}, on the CPU")
    return clip.eval(), functools.partial(preprocess, resolution=clip.config.visual.resolution)
