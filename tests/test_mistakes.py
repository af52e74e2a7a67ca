"""What people get wrong in their first hour, and the one line that each of them then reads.

MISTAKES has what was typed, in a folder of small sets and weights that `room` makes, and below it the exit code
and the last line. `train` stands for train.py with a small model. A line says where, what was expected and what
to do. Most mistakes are those of users of the official code (its issues on GitHub) and of newcomers here.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from unittest import mock

import pytest
import torch
from checkpoints import RN, VIT, built, official
from conftest import ROOT, TINY, write_folder, write_tar
from PIL import Image
from stand_ins import write_classes, write_folders, write_official

import model
from sources import pairs

TRAIN = ["train.py", *TINY[2:], "--steps", "2"]
GOOD = '{"image": "train0.png", "text": "一只猫"}'


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Good sets, sets with one fault each, and weights."""
    room = tmp_path_factory.mktemp("room")
    write_folder(room / "photos", 8)

    def spoiled(name: str, file: str, text: str, encoding: str = "utf-8"):
        """A copy of photos in which one file has this text."""
        shutil.copytree(room / "photos", room / name)
        (room / name / file).write_text(text, encoding=encoding)

    spoiled("colon", "train.jsonl", GOOD + '\n{"image"： "train1.png", "text": "两只狗"}')
    spoiled("array", "train.jsonl", "[\n" + GOOD + "\n]")
    spoiled("gbk", "train.jsonl", GOOD.replace("猫", "小狗"), "gbk")
    spoiled("keys", "train.jsonl", '{"picture": "train0.png", "text": "一只猫"}')
    spoiled("absent", "train.jsonl", GOOD.replace("train0", "train99"))
    spoiled("windows", "train.jsonl", '{"image": "2024\\\\train0.png", "text": "一只猫"}')
    spoiled("number", "valid.jsonl", '{"image": "valid0.png", "text": 7}')
    spoiled("broken", "valid0.png", "no picture")
    spoiled("empty", "train.jsonl", "")
    shutil.copytree(room / "photos", room / "album")
    (room / "album" / "valid.jsonl").unlink()
    for name, text in (("commas", "image,text\ntrain0.png,一只猫，一只狗\ntrain1.png,猫,狗"), ("columns", "file,words\n")):
        shutil.copytree(room / "album", room / name)
        (room / name / "train.jsonl").unlink()
        (room / name / "train.csv").write_text(text, encoding="utf-8")

    for name in ("muge", "no-texts", "misnamed", "no-list", "stranger", "twice", "base64", "withheld"):
        for split in ("train", "valid"):
            write_official(room / name, split)
    (room / "no-texts" / "train_texts.jsonl").unlink()
    write_official(room / "withheld", "test", answers=False)
    for name, old, new in (("misnamed", '"image_ids"', '"image_id"'), ("no-list", "[100]", "100"),
                           ("stranger", "[103]", "[103, 999]")):
        path = room / name / "train_texts.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    for name, old, new in (("twice", "\n101\t", "\n100\t"), ("base64", "100\t", "100\t!")):
        path = room / name / "valid_imgs.tsv"
        path.write_text(path.read_text().replace(old, new))
    write_tar(room / "shards" / "train-000000.tar", [("0.png", b""), ("0.txt", b"a")])

    write_classes(room / "goods")
    for name in ("numbered", "english", "short", "gbk-labels"):
        shutil.copytree(room / "goods", room / name)
    (room / "numbered" / "label_cn.txt").unlink()
    shutil.rmtree(room / "english")
    write_folders(room / "english", "apple_pie", "fried_rice")
    shutil.rmtree(room / "short" / "test" / "001")
    (room / "gbk-labels" / "label_cn.txt").write_text("猫\n船\n花\n", encoding="gbk")

    model.save(built(VIT), str(room / "vit.safetensors"))
    model.save(built(RN), str(room / "rn.safetensors"))
    torch.save(official(built(VIT).state_dict()), room / "official.pt")
    os.makedirs(room / "out" / "muge")
    shutil.copy(room / "vit.safetensors", room / "out" / "muge" / "best.safetensors")
    (room / "page.pt").write_text("<html>404</html>")
    Image.new("RGB", (8, 8)).save(room / "photo.png")
    return room


def last_line(words: list[str]) -> tuple[int, str]:
    """Exit code and last line of a command, which must not have begun to train."""
    said, signals = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in signals]
    program, code = words[0], 0
    with (mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said)):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # Python would print it
                code = print(end.code, file=said) or 1
    for number, handler in zip(signals, handlers):  # train.py has its own
        signal.signal(number, handler)
    text = said.buffer.getvalue().decode()
    assert "Traceback" not in text and "step      1" not in text, text
    return code, text.strip().split("\n")[-1]


MISTAKES = r"""
train.py --stepz 3
    2 error: unrecognized arguments: --stepz 3; add --help to see the flags
train.py --model ViT-B-17
    2 error: argument --model: invalid choice: 'ViT-B-17' (choose from ...); add --help to see the flags
train.py --recipe mug
    2 error: argument --recipe: invalid choice: 'mug' (choose from ...); add --help to see the flags
train.py --recipe scratch --data photos
    2 error: --recipe scratch needs --model; for example --model RN-mini for a laptop
train --recipe scratch --data photos --batch-size 1
    2 error: --batch-size 1: expected 2 or more
train --recipe scratch --data photos --lr -1
    2 error: --lr -1.0: expected 0 or more
train --recipe scratch --data photos --context-length 600
    2 error: --context-length 600: expected 2 to 512
train --recipe muge --data photos
    2 error: --recipe muge needs --init; --recipe scratch trains from nothing, and --init ViT-B-16 is a released model
train.py --data photos
    2 error: --data: --recipe demo draws its own pairs and starts from nothing; for your pairs --recipe muge --init ViT-B-16 (fine-tuning) or --recipe scratch (from nothing)
train --recipe scratch --data potos
    1 error: potos: no such folder; expected a folder with train_imgs.tsv and train_texts.jsonl, train.jsonl, train.csv or train-*.tar, or tar shards, scenes-en or scenes-zh, or one of muge, flickr30k-cn, coco-cn
train --recipe scratch --data photos/train.jsonl
    1 error: photos/train.jsonl: a file; name the folder that it is in, photos
train --recipe scratch --data '~/photos'
    1 error: ~/photos: no such folder; quoted, ~ is not the home folder; expected a folder with train_imgs.tsv and train_texts.jsonl, train.jsonl, train.csv or train-*.tar, or tar shards, scenes-en or scenes-zh, or one of muge, flickr30k-cn, coco-cn
train --recipe scratch --data 'photos\2024'
    1 error: photos\2024: no such folder; folders are separated by /; expected a folder with train_imgs.tsv and train_texts.jsonl, train.jsonl, train.csv or train-*.tar, or tar shards, scenes-en or scenes-zh, or one of muge, flickr30k-cn, coco-cn
train --recipe scratch --data album
    1 error: album: no split 'valid' in it, only train; `python -m tools.curate split album NEW` makes a set that has one, and train.py takes another set as --valid-data
train --recipe scratch --data photos --out photo.png
    2 error: --out: photo.png is a file; name a folder, which need not exist
train --recipe scratch --data photos --out '~/out'
    2 error: --out ~/out: expected a path with /; quoted, ~ is not the home folder
train --recipe scratch --data photos --device cuda
    2 error: --device cuda: torch finds no GPU here
train --recipe scratch --data colon
    1 error: colon/train.jsonl line 2: not JSON (Expecting ':' delimiter at character 9); write one JSON object per line
train --recipe scratch --data array
    1 error: array/train.jsonl line 1: not JSON (Expecting value at character 3); write one JSON object per line, without [ and ] around all and commas between
train --recipe scratch --data gbk
    1 error: gbk/train.jsonl line 1: not UTF-8 (invalid start byte); save it as UTF-8, for example by `iconv -f GBK -t UTF-8 OLD > NEW`
train --recipe scratch --data keys
    1 error: keys/train.jsonl line 1: no 'image'; expected image or file_name or filepath or dir and text or caption or title, got ['picture', 'text']
train --recipe scratch --data absent
    1 error: absent/train.jsonl line 1: there is no picture train99.png in absent; put it there or drop the line
train --recipe scratch --data windows
    1 error: windows/train.jsonl line 1: there is no picture 2024\train0.png in windows; name it by its path there, with /
train --recipe scratch --data number
    1 error: number/valid.jsonl line 1: the caption is 7, not text; write a string
train --recipe scratch --data broken
    1 error: broken/valid0.png: the picture cannot be decoded (none of JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000); fetch it again or drop it
train --recipe scratch --data empty
    1 error: empty/train.jsonl: empty; expected lines that each have a picture and its text
train --recipe scratch --data commas --valid-data photos
    1 error: commas/train.csv line 3: more cells than columns, '狗' is one too many; put a text with a comma in it in "quotes"
train --recipe scratch --data columns --valid-data photos
    1 error: columns/train.csv line 1: no 'image'; expected image or file_name or filepath or dir and text or caption or title, got ['file', 'words']
train --recipe scratch --data no-texts
    1 error: no-texts/train_texts.jsonl: not there; expected a TSV of pictures (`id <tab> base64`) and a JSONL of captions (objects with text_id, text, image_ids)
train --recipe scratch --data misnamed
    1 error: misnamed/train_texts.jsonl: no caption has any image_ids, so there is nothing to learn or to measure recall on; its first line has ['text_id', 'text', 'image_id']
train --recipe scratch --data no-list
    1 error: no-list/train_texts.jsonl line 1: image_ids is 100; expected a list of ids, in brackets
train --recipe scratch --data stranger
    1 error: stranger/train_texts.jsonl line 4: image id 999 is not in stranger/train_imgs.tsv; add the picture or drop the id
train --recipe scratch --data twice
    1 error: twice/valid_imgs.tsv line 2: image id 100 again, first seen on line 1; drop one of them
train --recipe scratch --data base64
    1 error: base64/valid_imgs.tsv line 1 (image id 100): broken base64 (Only base64 data is allowed), which begins with '!iVBORw0KGgo'; write the picture again
train --recipe scratch --data 'shards/train-{000000..000003}.tar'
    2 error: --data shards/train-{000000..000003}.tar: a pattern has no validation split; name one by --valid-data
train --recipe scratch --data 'shards/train-{000000..000003}.tar' --valid-data photos
    1 error: shards/train-000001.tar: no such shard, of the 4 that were asked for
train --recipe stage2 --data photos --init rn.safetensors
    1 error: rn.safetensors: is RN-tiny, not ViT-tiny (--model RN-tiny): 31 missing (...)
train --recipe stage2 --data photos --init vit
    1 error: vit: no such file or folder, and none of the published names ...
train --recipe stage2 --data photos --init page.pt
    1 error: page.pt: not a readable checkpoint (BadZipFile: File is not a zip file); is it complete, and a PyTorch or safetensors file, not a Git LFS pointer to one?
train --recipe stage2 --data photos --init vit.safetensors --cache-features 2
    2 error: --cache-features: only a frozen image tower has features to cache; --freeze-image
train --recipe stage2 --data photos --init photos
    1 error: photos: no weights in this folder; expected exactly one .pt in it, or one of ...
eval.py retrieval --model out --data photos
    1 error: out: no weights in this folder; expected one of those below it, such as muge
eval.py retrieval --model vit.safetensors --data photos --split tst
    1 error: photos: no split 'tst' in it, only train, valid
eval.py retrieval --model vit.safetensors --data withheld --split test
    1 error: withheld/test_texts.jsonl: no caption has any image_ids, so there is nothing to learn or to measure recall on
eval.py retrieval --model ViT-B/17 --data photos
    1 error: ViT-B/17: no such file or folder, and none of the published names ...
eval.py retrieval --model vit.safetensors --data photos --out photos
    2 error: --out: photos is a folder; expected the name of a file; add --help to see the flags
eval.py zeroshot --model vit.safetensors --data numbered
    1 error: numbered/test/000: no Chinese name, which the model needs; put the pictures of each class into a folder with its Chinese name, such as 水果, or write the names into numbered/label_cn.txt, line 1 for folder 000, or give --labels, a file or one of labels/
eval.py zeroshot --model vit.safetensors --data photos
    1 error: photos: 0 folders in it; put the pictures of each class into a folder with its Chinese name, such as 水果, or write the names into photos/label_cn.txt, line 1 for folder 000, or give --labels, a file or one of labels/
eval.py zeroshot --model vit.safetensors --data english
    1 error: english/apple_pie: no Chinese name, which the model needs; put the pictures of each class into a folder with its Chinese name, such as 水果, or write the names into english/label_cn.txt, line 1 for folder 000, or give --labels, a file or one of labels/
eval.py zeroshot --model vit.safetensors --data goods --labels fruit
    1 error: fruit: neither a file with a class name on each line nor one of ...
eval.py zeroshot --model vit.safetensors --data gbk-labels
    1 error: gbk-labels/label_cn.txt: not UTF-8 (invalid start byte); save it as UTF-8, for example by `iconv -f GBK -t UTF-8 OLD > NEW`
eval.py zeroshot --model vit.safetensors --data short
    1 error: short/test: no pictures of 1 of 3 classes, looked for 船 or 001; add them, or leave these classes out (the same name twice is two)
tools.weights convert vit.safetensors official.pt --to official
    1 error: official.pt: is there already; remove it or name another
tools.weights convert rn.safetensors hf --to huggingface
    1 error: hf: transformers has no Chinese CLIP with a ResNet; --to official or ours
tools.weights download ViT-B-17
    2 error: argument NAME: invalid choice: 'ViT-B-17' (choose from ...); add --help to see the flags
tools.curate check potos
    1 error: potos: no such folder; expected a folder with train_imgs.tsv and train_texts.jsonl, train.jsonl, train.csv or train-*.tar, or tar shards, scenes-en or scenes-zh, or one of muge, flickr30k-cn, coco-cn
tools.curate filter photos album
    1 error: album: already there; name a new folder
tools.curate check album --workers 0
    1 next: python -m tools.curate split album album-split --valid 0.1
tools.curate split photos new --valid 0.1
    1 error: photos: has train, valid; expected a split train, and no split valid yet
tools.curate split album new --valid 2
    1 error: --valid 2.0: expected a share of the pairs, over 0 and under 1
tools.measure classify --model vit.safetensors --data album --out found.csv
    1 error: album/label_cn.txt: not there; expected --labels, a file of class names or one of labels/
tools.measure zeroshot --model vit.safetensors --data goods --labels gbk-labels/label_cn.txt
    1 error: gbk-labels/label_cn.txt: not UTF-8 (invalid start byte); save it as UTF-8, for example by `iconv -f GBK -t UTF-8 OLD > NEW`
tools.measure retrieval --model vit.safetensors --data photos --predictions p.jsonl --split valid
    1 error: --top-k 10: every query of --predictions gets that many answers, but text-to-image has only 8 to choose from
tools.measure reproduce table2 --model vit.safetensors --data photos
    1 error: table2 is measured on MUGE; expected one of these or more, by name or such as --data MUGE=path/to/it, got photos
train.py --recipe scratch --model ViT-tiny --data photos --init vit.safetensors
    2 error: --init: --recipe scratch has the rate of random weights, which would destroy those; --recipe direct keeps them, or give --lr
train --recipe stage2 --data photos --init vit.safetensors --augment flip
    2 error: argument --augment: invalid choice: 'flip' (choose from 'none', 'crop', 'auto'); add --help to see the flags
"""
ROWS = [tuple(row.split("\n    ")) for row in re.split(r"\n(?=\S)", MISTAKES.strip())]


@pytest.mark.parametrize("command, wanted", ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_answered_with_one_line(command, wanted, room, tmp_path, monkeypatch):
    """`wanted` is the exit code and the last line, in which ... stands for a list that is too long to repeat."""
    if "--device cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(room)
    monkeypatch.setattr(pairs, "CACHE", str(room / "cache"))
    program, *flags = shlex.split(command)
    code, line = last_line([*TRAIN, "--out", str(tmp_path), *flags] if program == "train" else [program, *flags])
    assert re.fullmatch(re.escape(wanted).replace(r"\.\.\.", ".+"), f"{code} {line}"), line


@pytest.mark.parametrize("call, wanted", [
    (lambda clip: model.preprocess("photo.png"), "a str; expected a picture of PIL, as from Image.open(file)"),
    (lambda clip: clip.encode_text("一只猫"), "'一只猫': expected ids [B, T], from model.tokenize(captions)"),
    (lambda clip: clip.encode_image("photo.png"), "photo.png: expected preprocess(image)[None]"),
    (lambda clip: clip.encode_image(torch.zeros(3, 32, 32)), "torch.Size([3, 32, 32]): expected preprocess(image)[None]"),
    (lambda clip: clip.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
     "torch.Size([1, 3, 32, 32]): expected preprocess(image)[None]"),
    (lambda clip: model.load("vit.safetensors", dtype="int8"), "dtype='int8', jit=False: expected float32, bfloat16, float16, and jit=False"),
    (lambda clip: model.load("rbt3"), "rbt3: this is no whole model but a tower to start training from; use it with "
     "`train.py --image-init` (OpenAI's or LAION's CLIP) or `--text-init` (a BERT)"),
])
def test_a_wrong_call_is_answered_with_one_line(call, wanted):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(built(VIT))
    assert str(caught.value) == wanted
