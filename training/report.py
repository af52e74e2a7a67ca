"""
What a run says: its settings before the first step, a line now and then, and at its end a table, a curve of
recall and, for the demo, zero-shot classification and a contact sheet. assets/font.ttf is a subset of Noto
Sans SC (see LICENSE) with the characters of sources/scenes.py: many machines have no Chinese font.
"""

import contextlib
import json
import math
import os
import sys
import time

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import model
from common import rank, replace_text, world_size, write_json
from eval import KS, encode_images, encode_texts, zero_shot
from loss import in_batch_accuracy
from sources import scenes
from sources.classes import TEMPLATES, read_templates
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs
from training.recipes import Config, warmup_steps

FONT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "font.ttf")
LINE_COLOURS = ((214, 69, 65), (52, 109, 189), (39, 144, 88), (148, 84, 176), (230, 140, 30))

# ------------------------------------------------------------------------------------------------------------
# before the first step


def print_settings(cfg: Config, clip: model.ChineseCLIP, stream: data.Stream, valid: Pairs, total: int,
                   step: int, chunk_size: int):
    """Print what an act derived from its flags and its data, and advice where a setting is unusual."""
    def say(line: str):
        print(f"   {line}", flush=True)

    B, pairs, share = cfg.batch_size, len(stream.pairs), cfg.batch_size // world_size()
    trained = [p for p in clip.parameters() if p.requires_grad]
    parts = clip.parameters(), trained, [p for p in trained if p.ndim < 2]
    say("{:,} parameters, {:,} train, {:,} without decay".format(*(sum(p.numel() for p in x) for x in parts)))
    say(f"{pairs:,} training pairs; validation: {valid.image_count:,} images, {len(valid.texts):,} texts")
    chunks = math.ceil(share / chunk_size)
    cut = f" in {chunks} chunks of {chunk_size:,}" if chunks > 1 else ""
    say(f"batch {B:,} = {world_size()} x {share:,}{cut}; "
        f"{total:,} steps, {total * B:,} pairs, {total * B / pairs:.2f} epochs; from step {step:,}")
    if B > pairs:
        say(f"a batch is larger than the set: every pair occurs in it {B // pairs:,} times or once more; "
            "--targets multi tells them from negatives, a smaller --batch-size needs less time")
    if chunks > 1 and not cfg.freeze_image and isinstance(clip.visual, model.ModifiedResNet):
        say("BatchNorm normalises each chunk by itself, so the result depends on --chunk-size")
    say(f"peak lr {cfg.peak_lr:.2e}; the recipe's is {cfg.recipe_lr:.2e} from batch {cfg.lr_batch:,} on")
    trained_before = cfg.init or cfg.image_init or cfg.text_init  # a high rate can destroy that
    if trained_before and cfg.peak_lr > 4 * cfg.recipe_lr * min(1, B / cfg.lr_batch):
        say("that is more than four times the recipe's rate for this batch: watch recall from step 0 on")
    warmup = warmup_steps(cfg, total)
    why = f", a tenth of the run; {cfg.warmup:,} would be over half" if warmup != cfg.warmup else ""
    say(f"warm-up {warmup:,} steps{why}")
    shared, floor = repeats(stream, B) if rank() == 0 else (0, 0)
    advice = f" and keep the loss above {floor:.3f}: --targets multi"
    say(f"loss by chance ln {B:,} = {math.log(B):.2f}; {shared:.1%} of a batch share picture or caption "
        "with another" + (advice if floor > 0.01 and cfg.targets == "one-hot" else ""))


def repeats(stream: data.Stream, batch_size: int, batches: int = 0) -> tuple[float, float]:
    """-> (the share of pairs whose picture or caption another pair of the batch has, the lowest loss that
    one-hot targets then allow), each a mean over a run's first batches; 0: as many as make 8,192 pairs, 1 to
    8. n equal captions get the same probabilities, so each gets at most 1/n, which costs ln n."""
    batches = batches or max(1, min(8, 8192 // batch_size))
    found = [(0.0, 0.0)]  # adds nothing to the sums, but there are sums if no pair can be read
    for step in range(batches):
        first, keys = data.first_position(step, batch_size, len(stream.pairs)), []
        for index in map(stream.index, range(first, first + batch_size)):
            with contextlib.suppress(DataError):
                keys.append(stream.keys(index, stream.pairs.caption(index)))
        if keys:
            counts = [column.unique(return_inverse=True, return_counts=True)[1:]
                      for column in torch.tensor(keys).T]  # of the pictures, of the captions
            counts = torch.stack([count[inverse] for inverse, count in counts], dim=1)  # [B, 2]
            found.append(((counts > 1).any(dim=1).float().mean().item(),
                          counts.float().log().mean(dim=0).max().item()))
    return tuple(sum(column) / batches for column in zip(*found))


# ------------------------------------------------------------------------------------------------------------
# during the run


class Log:
    """The lines of a run, for people on stdout and as JSON in log.jsonl; broken pairs on stderr."""

    def __init__(self, cfg: Config, total: int, step: int, history: list[dict]):
        """step, history: what is saved of this run. log.jsonl keeps no line that was written after that."""
        self.cfg, self.total, self.file = cfg, total, None
        self.broken: dict[str, int] = {}  # problem -> how often it was met
        self.clock, self.since = time.perf_counter(), step
        if rank() == 0:
            path, kept = os.path.join(cfg.out, "log.jsonl"), []
            if history and os.path.isfile(path):
                with open(path, encoding="utf-8") as log:
                    kept = [line for line in log if line.endswith("}\n") and json.loads(line)["step"] <= step]
            replace_text(path, "".join(kept))
            self.file = open(path, "a", encoding="utf-8")

    def write(self, entry: dict):
        if self.file:
            print(json.dumps(entry), file=self.file, flush=True)

    def measurement(self, history: list[dict], clip: model.ChineseCLIP):
        """Log what was measured last, and write best.safetensors if it is the best so far."""
        entry = history[-1]
        best = entry is max(history, key=lambda one: one["mean_recall"])
        t2i, i2t = entry["text_to_image"]["R@1"], entry["image_to_text"]["R@1"]
        print(f"   step {entry['step']:>6,}  validation: mean recall {entry['mean_recall']:.1f}, R@1 text to "
              f"image {t2i:.1f}, image to text {i2t:.1f}{', the best so far' if best else ''}", flush=True)
        self.write(entry)
        if best and rank() == 0:
            model.save(clip, os.path.join(self.cfg.out, "best.safetensors"))
        self.clock, self.since = time.perf_counter(), entry["step"]

    def step(self, step: int, loss: float, features, clip, optimizer: torch.optim.Optimizer):
        """The loss beside that of guessing, in-batch accuracies, the factor, the rate, the time left."""
        (i2t, t2i), B = in_batch_accuracy(*features[:2]), self.cfg.batch_size
        scale, lr = clip.logit_scale.exp().item(), optimizer.param_groups[0]["lr"]
        rate = (step - self.since) * B / max(time.perf_counter() - self.clock, 1e-9)
        print(f"   step {step:>6,}/{self.total:,}  loss {loss:.3f} (chance {math.log(B):.2f})  "
              f"in batch i2t {i2t:.0%} t2i {t2i:.0%}  scale {scale:.1f}  lr {lr:.1e}  "
              f"{rate:,.0f} pairs/s  {(self.total - step) * B / rate:,.0f} s left", flush=True)
        self.write({"step": step, "loss": loss, "in_batch_i2t": i2t, "in_batch_t2i": t2i,
                    "logit_scale": scale, "lr": lr, "pairs_per_second": rate})

    def skipped(self, batch: list[data.Batch]):
        """Name every broken pair once, however many epochs meet it."""
        for problem in sum((part.problems for part in batch), []):
            if problem not in self.broken:
                print(f"   rank {rank()} skips a pair, its number {len(self.broken) + 1}: {problem}",
                      file=sys.stderr, flush=True)
            self.broken[problem] = self.broken.get(problem, 0) + 1

    def end(self, history: list[dict], clip: model.ChineseCLIP):
        """Write last.safetensors, and say what is left to say when an act is finished."""
        if self.broken:
            print(f"   rank {rank()} met {len(self.broken)} broken pairs {sum(self.broken.values())} times",
                  file=sys.stderr, flush=True)
        if history[0]["mean_recall"] == max(entry["mean_recall"] for entry in history) and self.total:
            print("   never better than at step 0: best.safetensors is the start itself; lower --lr, or more "
                  "pairs", flush=True)
        if self.file:
            self.file.close()
            model.save(clip, os.path.join(self.cfg.out, "last.safetensors"))


# ------------------------------------------------------------------------------------------------------------
# pictures


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


def curve(path: str, series: dict[str, list[tuple[float, float]]], title: str):
    """A PNG with a line for every name, of points (pairs seen, percent)."""
    width, height, left, top, right, bottom = 900, 520, 60, 50, 30, 60  # the last four are margins
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    x_max = max(x for points in series.values() for x, _ in points) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_max * (width - left - right), height - bottom - y / 100 * (height - top - bottom)

    def write(x: float, y: float, text: str, size: int = 14, anchor: str = "la"):
        canvas.text((x, y), text, font=font(size), fill="black", anchor=anchor)

    write(left, 12, title, 20)
    for percent in range(0, 101, 20):
        canvas.line((*place(0, percent), *place(x_max, percent)), fill=(225, 225, 225))
        write(left - 10, place(0, percent)[1], str(percent), anchor="rm")
    for x in (x_max * tick / 5 for tick in range(6)):
        write(place(x, 0)[0], height - bottom + 8, f"{x / 1000:.0f}k", anchor="ma")
    write(width / 2, height - 24, "pairs seen", anchor="mm")
    for i, (name, points) in enumerate(series.items()):
        colour, y = LINE_COLOURS[i % len(LINE_COLOURS)], top + 12 + 22 * i
        canvas.line([place(*point) for point in points], fill=colour, width=3, joint="curve")
        for cx, cy in (place(*point) for point in points):
            canvas.ellipse((cx - 4, cy - 4, cx + 4, cy + 4), fill=colour)
        canvas.line((left + 20, y, left + 50, y), fill=colour, width=3)
        write(left + 58, y, name, 16, "lm")
    image.save(path)


def contact_sheet(path: str, rows: list[tuple[str, list[tuple[Image.Image, bool]]]]):
    """A PNG with a row for every query: the pictures that it retrieves. The right one has a green frame."""
    thumb, gap, text = 128, 12, 30
    width = max(len(images) for _, images in rows) * (thumb + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (thumb + gap + text) + gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for r, (query, images) in enumerate(rows):
        y = gap + r * (thumb + gap + text)
        canvas.text((gap, y), query, font=font(20), fill="black")
        for c, (picture, right) in enumerate(images):
            x, below = gap + c * (thumb + gap), y + text
            if right:
                canvas.rectangle((x - 5, below - 5, x + thumb + 4, below + thumb + 4), fill=(40, 170, 80))
            sheet.paste(picture.convert("RGB").resize((thumb, thumb), Image.Resampling.BICUBIC), (x, below))
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# the end of a run


def finish(histories: dict[str, list[dict]], acts: dict[str, Config]):
    """Print the table and write results.json and recall.png beside the acts' folders. histories: by act, what
    train.train returned."""
    rows = {}
    for act, history in histories.items():
        if not acts[act].init:  # an act that goes on from another starts where that one ended
            rows[f"before {act}"] = history[0]
        rows[f"after {act}"] = max(history, key=lambda entry: entry["mean_recall"])
    print("\n" + recall_table(rows))

    last = list(acts.values())[-1]
    folder, best = os.path.dirname(last.out), os.path.join(last.out, "best.safetensors")
    numbers, plot = (os.path.join(folder, name) for name in ("results.json", "recall.png"))
    write_json(numbers, histories)
    if last.data == "scenes-zh":
        look_at_scenes(folder, best)
    starts = {act: cfg.init for act, cfg in acts.items() if cfg.data == last.data}
    curve(plot, lines(histories, starts), "mean recall (%) on validation captions")
    print(f"recall as a curve: {plot}\nas numbers: {numbers}\nthe weights: {best}")


def recall_table(rows: dict[str, dict]) -> str:
    """Results of `retrieval` by name, as a table of text."""
    width = max(20, *map(len, rows))
    lines = [f"{'':{width}}  mean | text to image: R@1  R@5 R@10 | image to text: R@1  R@5 R@10"]
    for name, result in rows.items():
        t2i, i2t = ("  ".join(f"{result[way][f'R@{k}']:5.1f}" for k in KS)
                    for way in ("text_to_image", "image_to_text"))
        lines.append(f"{name:{width}} {result['mean_recall']:5.1f} |          {t2i} |          {i2t}")
    return "\n".join(lines)


def lines(histories: dict, starts: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Mean recall against pairs seen, a line for every way of training: an act that starts from another's
    weights ("@act") continues its line. starts: the acts to draw, and what each starts from."""
    result = {}
    for act, start in starts.items():
        before = next((way for way in result if start == "@" + way.split(", ")[-1]), "")
        points = result.pop(before, [])
        seen = points[-1][0] if points else 0
        result[f"{before}, {act}" if before else act] = points + [
            (seen + entry["samples"], entry["mean_recall"]) for entry in histories[act]]
    return result


def look_at_scenes(folder: str, path: str):
    """Zero-shot classification of scenes and a contact sheet of retrieval, with the weights at `path`."""
    clip, _ = model.load(path)
    kinds, colours = scenes.kind_names("zh"), scenes.colour_names("zh")
    pictures, kind_labels, colour_labels = zip(*(
        scenes.class_example("zh", i) for i in range(20 * len(kinds))))
    of_a_thing = [f"一张{{}}{kind}的图片" for kind in kinds]  # every colour belongs to a thing
    for what, names, labels, templates in (("colour", colours, colour_labels, of_a_thing),
                                           ("kind", kinds, kind_labels, read_templates(TEMPLATES))):
        result = zero_shot(clip, names, lambda row: pictures[row], torch.tensor(labels), templates)
        print(f"zero-shot, {what} of a single thing: {result['accuracy']:.1f} % of {len(labels)} pictures, "
              f"{len(names)} names, {len(templates)} templates; {result['chance']:.1f} % by chance")
    valid = open_pairs("scenes-zh", "valid")
    queries, sheet = range(0, 60, 10), os.path.join(folder, "retrieval.png")
    texts = encode_texts(clip, [valid.texts[q] for q in queries])  # [6, E]
    scores = texts @ encode_images(clip, valid.image, valid.image_count).T  # [6, N]
    contact_sheet(sheet, [(valid.texts[q], [(valid.image(i), i == q) for i in row.topk(6).indices.tolist()])
                          for q, row in zip(queries, scores)])
    print(f"unseen captions and the pictures they retrieve (green: the right one): {sheet}")
