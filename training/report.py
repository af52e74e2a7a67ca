"""
What a run says: its settings before the first step, a line now and then, and at its end a table, a curve of
recall and, for the demo, zero-shot classification and a contact sheet. assets/font.ttf is a subset of Noto
Sans SC (see LICENSE) with the characters of sources/scenes.py: many machines have no Chinese font.
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import statistics
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
from sources.augment import as_rgb
from sources.classes import TEMPLATES, read_templates
from sources.layouts import open_pairs
from sources.pairs import DataError, Pairs
from training.compare import curves, table
from training.recipes import Config, cpu_has_bfloat16, warmup_steps

FONT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "font.ttf")
SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc",
                "STHeiti Light.ttc", "msyh.ttc", "simhei.ttf")  # Linux, macOS and Windows, found by name
STARTED = time.perf_counter()
LINE_COLOURS = ((214, 69, 65), (52, 109, 189), (39, 144, 88), (148, 84, 176), (230, 140, 30))

# ------------------------------------------------------------------------------------------------------------
# before the first step


def print_settings(cfg: Config, clip: model.ChineseCLIP, stream: data.Stream, valid: Pairs, total: int,
                   step: int, chunk_size: int):
    """Print what an act derived from its flags and its data, and advice where a setting is unusual."""
    def say(line: str):
        print(f"   {line}", flush=True)

    B, pairs, share = cfg.batch_size, len(stream.pairs), cfg.batch_size // world_size()
    frozen, vectors = (sum(p.numel() for p in clip.parameters() if test(p)) for test in (
        lambda p: not p.requires_grad, lambda p: p.requires_grad and p.ndim < 2))
    whose = "" if cfg.lora else "the image tower's "
    say(f"{sum(p.numel() for p in clip.parameters()):,} parameters"
        + f"; {whose}{frozen:,} are frozen, the others train" * bool(frozen)
        + f"; weight decay for all but {vectors:,} gains and biases" * bool(cfg.weight_decay))
    say(f"the towers compute in {str(clip.precision)[6:]}, {why_precision(cfg, clip)}")
    say(f"{pairs:,} training pairs; validation: {valid.image_count:,} images, {len(valid.texts):,} texts")
    if valid.image_count < 100:
        say(f"so few are found by chance: guessing has an R@10 of {min(100, 1000 / valid.image_count):.0f} "
            "%, and the best of many measurements is partly luck")
    chunks = math.ceil(share / chunk_size)
    cut = f" in {chunks} chunks of {chunk_size:,}" if chunks > 1 else ""
    say(f"batch {B:,} = {world_size()} x {share:,}{cut}; "
        f"{total:,} steps, {total * B:,} pairs, {total * B / pairs:.2f} epochs"
        + f"; from step {step:,}" * (step > 0) + ", which is the last" * (step == total))
    if B > pairs:
        say(f"a batch is larger than the set: every pair occurs in it {B // pairs:,} or {B // pairs + 1:,} "
            f"times; --batch-size {max(2, 2 ** (pairs.bit_length() - 1))} lessens that, and --targets multi "
            "tells them from negatives")
    if chunks > 1 and not (cfg.freeze_image or cfg.lora) and isinstance(clip.visual, model.ModifiedResNet):
        say("BatchNorm normalises each chunk by itself, so the result depends on --chunk-size")
    where = f" from batch {cfg.lr_batch:,} on" if cfg.lr_batch > 1 else ""
    say(f"peak learning rate {cfg.peak_lr:.2e}"
        + f"; the recipe's is {cfg.recipe_lr:.2e}{where}" * (cfg.peak_lr != cfg.recipe_lr)
        + f", with --lora three times that: {cfg.usual_lr:.2e} here" * bool(cfg.lora))
    trained_before = cfg.init or cfg.image_init or cfg.text_init  # a high rate can destroy that
    if trained_before and cfg.peak_lr > 4 * cfg.usual_lr:
        say("that is more than four times the recipe's rate for this batch: watch recall from step 0 on")
    warmup = warmup_steps(cfg, total)
    why = f", a tenth of the run; {cfg.warmup:,} would be over half" if warmup != cfg.warmup else ""
    say(f"warm-up {warmup:,} steps{why}")
    shared, floor = repeats(stream, B) if rank() == 0 else (0, 0)
    advice = f", which counts as wrong: the loss stays above {floor:.3f}; --targets multi counts it as right"
    say(f"guessing has a loss of ln {B:,} = {math.log(B):.2f}; {shared:.1%} of a batch share picture or "
        "caption with another" + (advice if floor > 0.01 and cfg.targets == "one-hot" else ""))


def why_precision(cfg: Config, clip: model.ChineseCLIP) -> str:
    """Why the towers compute in this precision, in words."""
    if cfg.precision:
        return "as --precision says"
    kind = "CPU" if clip.logit_scale.device.type == "cpu" else "GPU"
    if clip.precision == torch.bfloat16:
        return f"which this {kind} computes in"
    if kind == "CPU" and cpu_has_bfloat16():
        return "as small models gain nothing from bfloat16"
    return f"as this {kind} does not compute in bfloat16"


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
        self.losses: list[float] = []
        self.clock, self.since = time.perf_counter(), step
        if rank() == 0:
            path, kept = os.path.join(cfg.out, "log.jsonl"), []
            if history and os.path.isfile(path):
                with open(path, encoding="utf-8") as log:
                    kept = [line for line in log if line.endswith("}\n") and json.loads(line)["step"] <= step]
            replace_text(path, "".join(kept))
            self.losses = [entry["loss"] for entry in map(json.loads, kept) if "loss" in entry]
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
              f"image {t2i:.1f}, image to text {i2t:.1f}" + ", a new best" * bool(best and history[1:]),
              flush=True)
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
              f"in batch: text to image {t2i:.0%}, image to text {i2t:.0%}  "
              f"exp(logit_scale) {scale:.1f}  lr {lr:.1e}  "
              f"{rate:,.0f} pairs/s  {(self.total - step) * B / rate:,.0f} s left", flush=True)
        self.losses.append(loss)
        self.write({"step": step, "loss": loss, "in_batch_i2t": i2t, "in_batch_t2i": t2i,
                    "logit_scale": scale, "lr": lr, "pairs_per_second": rate})

    def skipped(self, batch: list[data.Batch]):
        """Name every broken pair once, however many epochs meet it."""
        for problem in sum((part.problems for part in batch), []):
            if problem not in self.broken:
                print(f"   broken pair number {len(self.broken) + 1} of rank {rank()}, left out: {problem}",
                      file=sys.stderr, flush=True)
            self.broken[problem] = self.broken.get(problem, 0) + 1

    def end(self, history: list[dict], clip: model.ChineseCLIP):
        """Write last.safetensors, and say what is left to say when an act is finished."""
        if self.broken:
            print(f"   rank {rank()} met {len(self.broken)} broken pairs {sum(self.broken.values())} times",
                  file=sys.stderr, flush=True)
        if advice := self.advice(history):
            print(f"   {advice}", flush=True)
        if self.file:
            self.file.close()
            model.save(clip, os.path.join(self.cfg.out, "last.safetensors"))

    def advice(self, history: list[dict]) -> str:
        """What to change if the run has learnt nothing, "" if it has. A loss that never left that of guessing
        means a rate that is too low, or so high that all features became the same; a loss that left it while
        recall fell means a rate that is too high for weights that were trained before, or too few pairs."""
        cfg, late = self.cfg, self.losses[len(self.losses) // 2:]  # one batch's loss says little
        if late and not cfg.teacher and sum(late) / len(late) > 0.97 * math.log(cfg.batch_size):
            change = "take more steps"
            if cfg.peak_lr > 2 * cfg.usual_lr:
                change = f"lower --lr {cfg.peak_lr:.1e} (the recipe's is {cfg.usual_lr:.1e})"
            elif cfg.peak_lr < 1e-4 and not cfg.lora:  # for example a recipe of fine-tuning at a small batch
                change = f"raise --lr {cfg.peak_lr:.1e} (random weights of a small model take 1e-3)"
            return (f"the loss never left that of guessing: {change}, or see whether captions belong to "
                    "their pictures")
        if history[0]["mean_recall"] == max(entry["mean_recall"] for entry in history) and self.total:
            return ("never better than at step 0: best.safetensors is the start itself; lower --lr, or find "
                    "more pairs")
        return ""


# ------------------------------------------------------------------------------------------------------------
# pictures


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | None:
    """Our font, or the first of this machine's that can draw all of the text; None if there is none."""
    for name in (FONT, *SYSTEM_FONTS):
        with contextlib.suppress(OSError):  # this machine does not have it
            found = ImageFont.truetype(name, size)
            absent = bytes(found.getmask("\U0010ffff"))  # the box that stands for what it cannot draw
            if all(char.isspace() or bytes(found.getmask(char)) != absent for char in text):
                return found
    return None


def curve(path: str, series: dict[str, list[list[tuple[float, float]]]], title: str, below="pairs seen"):
    """A PNG with a line for every name, the mean of its runs of points (x, percent), in a band from the
    lowest run to the highest. `below` says what x is."""
    width, height, left, top, right, bottom = 900, 520, 60, 50, 30, 60  # the last four are margins
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image, "RGBA")
    x_max = max(x for runs in series.values() for points in runs for x, _ in points) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_max * (width - left - right), height - bottom - y / 100 * (height - top - bottom)

    def write(x: float, y: float, text: str, size: int = 14, anchor: str = "la"):
        canvas.text((x, y), text, font=font(size), fill="black", anchor=anchor)

    write(left, 12, title, 20)
    for percent in range(0, 101, 20):
        canvas.line((*place(0, percent), *place(x_max, percent)), fill=(225, 225, 225))
        write(left - 10, place(0, percent)[1], str(percent), anchor="rm")
    tick = next(step for step in (m * 10**e for e in range(12) for m in (1, 2, 5)) if x_max <= 6 * step)
    for x in range(0, int(x_max) + 1, tick):
        write(place(x, 0)[0], height - bottom + 8, f"{x / 1000:g}k" if x >= 1000 else f"{x}", anchor="ma")
    write(width / 2, height - 24, below, anchor="mm")
    for i, (name, runs) in enumerate(series.items()):
        colour, y = LINE_COLOURS[i % len(LINE_COLOURS)], height - bottom - 12 - 22 * (len(series) - i)
        columns = [(points[0][0], [value for _, value in points]) for points in zip(*runs)]
        lows, highs = ([place(x, end(values)) for x, values in columns] for end in (min, max))
        canvas.polygon(lows + highs[::-1], fill=(*colour, 60))
        middle = [place(x, sum(values) / len(values)) for x, values in columns]
        canvas.line(middle, fill=colour, width=3, joint="curve")
        for cx, cy in middle:
            canvas.ellipse((cx - 4, cy - 4, cx + 4, cy + 4), fill=colour)
        canvas.line((width - 330, y, width - 300, y), fill=colour, width=3)
        write(width - 292, y, name[-30:], 16, "lm")
    image.save(path)


def contact_sheet(path: str, rows: list[tuple[str, list[list[tuple[Image.Image, bool]]]]],
                  headings: tuple[str, ...] = ("",)):
    """A PNG with a row for every query: the pictures that it retrieves, the right ones with a green frame, in
    a block for every heading. A query that no font here can draw is named by the number of its row, and
    printed."""
    thumb, gap, text = 128, 12, 36
    blocks, top = rows[0][1], text if any(headings) else 0
    *lefts, right = itertools.accumulate(
        (len(block) * (thumb + gap) + 2 * gap for block in blocks), initial=gap)
    sheet = Image.new("RGB", (right - 2 * gap, top + len(rows) * (thumb + gap + text) + gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for left, heading in zip(lefts, headings):
        canvas.text((left, gap), heading, font=font(16), fill=(110, 110, 110))
    for r, (query, blocks) in enumerate(rows):
        y = top + gap + r * (thumb + gap + text)
        found = font(20, query)
        if not found:
            print(f"   row {r + 1} of {path}, which no font here can write: {query}")
        canvas.text((gap, y), query[:42] if found else f"{r + 1}", font=found or font(20), fill="black")
        for left, block in zip(lefts, blocks):
            for c, (picture, right) in enumerate(block):
                x, below = left + c * (thumb + gap), y + text
                if right:
                    canvas.rectangle((x - 5, below - 5, x + thumb + 4, below + thumb + 4), fill=(40, 170, 80))
                small = as_rgb(picture).resize((thumb, thumb), Image.Resampling.BICUBIC)
                sheet.paste(small, (x, below))
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# the end of a run


def finish(histories: dict[str, list[dict]], acts: dict[str, Config]):
    """Print the table and write results.json and recall.png beside the acts' folders. histories: by act, what
    train.train returned."""
    rows = {}
    for act, history in histories.items():
        if not acts[act].init.startswith("@"):  # else it starts where another act ended
            rows[f"before {act}"] = history[0]
        best = max(history, key=lambda entry: entry["mean_recall"])
        rows[f"after {act}" + f", step {best['step']:,}" * (best is not history[-1])] = best
    compared = curves(histories)  # of --recipe compare
    last = list(acts.values())[-1]
    drawn = last.data.startswith("scenes-zh")
    print("\n" + (table(histories) if compared else recall_table(rows, TEACHES if drawn else {})))

    folder, best = os.path.dirname(last.out), os.path.join(last.out, "best.safetensors")
    names = "results.json", "recall.png", "retrieval.png", "page.html"
    numbers, plot, sheet, page = (os.path.join(folder, name) for name in names)
    write_json(numbers, histories)
    device = "cuda" if torch.cuda.is_available() and last.device != "cpu" else "cpu"
    shown = list(acts)[-len(compared):] if compared else acts  # of a comparison, its last seed
    with contextlib.redirect_stdout(None):  # what is loaded has just been written
        clips = {f"after {act}": model.load(os.path.join(acts[act].out, "best.safetensors"), device)[0]
                 for act in shown}
    for name, clip in clips.items():
        if drawn and name != "after english":
            look_at_scenes(name, clip)
    data = last.valid_data or last.data
    look_at_retrieval(clips, open_pairs(data, last.valid_split), sheet, last.context_length)
    starts = {act: cfg.init for act, cfg in acts.items() if cfg.data == last.data}
    curve(plot, compared or lines(histories, starts), "mean recall (%) on validation pairs")
    print(f"recall as a curve: {plot}\nas numbers: {numbers}\nthe weights: {best}")
    length = ["--context-length", str(last.context_length)] * (last.context_length != Config.context_length)
    print("next, what it finds and misses: " + shlex.join([
        "python", "-m", "tools.measure", "retrieval", "--model", last.out, "--data", data, "--split",
        last.valid_split, *length, "--page", page]))
    print(f"or search photos: python -m tools.search FOLDER 红色的猫 --model {shlex.quote(last.out)}")
    print(f"all of this took {time.perf_counter() - STARTED:.0f} s")


TEACHES = {  # what each row of the demo's table shows
    "before english": "measured on English pairs: random weights guess",
    "after english": "measured on English pairs: pictures and English captions share a space",
    "before stage1": "on Chinese pairs from here on: a new text tower beside that image tower guesses",
    "after stage1": "the text tower alone has trained: it names what the frozen image tower tells apart",
    "after stage2": "now both have trained: the image tower knows ink outlines, and kinds new to it",
}


def recall_table(rows: dict[str, dict], teaches: dict[str, str] = {}) -> str:
    """Results of `retrieval` by name, as a table of text, with what a row teaches below it."""
    width = max(20, *map(len, rows))
    lines = [f"{'':{width}}  mean | text to image: R@1  R@5 R@10 | image to text: R@1  R@5 R@10"]
    for name, result in rows.items():
        t2i, i2t = ("  ".join(f"{result[way][f'R@{k}']:5.1f}" for k in KS)
                    for way in ("text_to_image", "image_to_text"))
        lines.append(f"{name:{width}} {result['mean_recall']:5.1f} |          {t2i} |          {i2t}")
        lines += [f"    {words}" for row, words in teaches.items() if name.split(",")[0] == row]
    return "\n".join(lines)


def lines(histories: dict, starts: dict[str, str]) -> dict[str, list[list[tuple[float, float]]]]:
    """Mean recall against pairs seen, a line for every act; one that starts from another's weights ("@act")
    begins where that ends. starts: the acts to draw, and what each starts from."""
    result = {}
    for act, start in starts.items():
        seen = result.get(start[1:], [[(0, 0)]])[0][-1][0]
        result[act] = [[(seen + entry["samples"], entry["mean_recall"]) for entry in histories[act]]]
    return result


def look_at_scenes(name: str, clip: model.ChineseCLIP):
    """Zero-shot classification of pictures of one thing: its colour, and its kind, apart for the kinds that
    the English world has and those that only the Chinese one has."""
    kinds, colours, of_a_thing = scenes.kind_names("zh"), scenes.colour_names("zh"), scenes.coloured()
    pictures, kind_labels, colour_labels = zip(*(
        scenes.class_example("zh", i) for i in range(20 * len(kinds))))
    colour = zero_shot(clip, colours, pictures.__getitem__, torch.tensor(colour_labels), of_a_thing)
    kind = zero_shot(clip, kinds, pictures.__getitem__, torch.tensor(kind_labels), read_templates(TEMPLATES))
    new = scenes.new_kinds()

    def accuracy(names: set[str]) -> float:
        return statistics.mean(row["accuracy"] for row in kind["by_class"] if row["class"] in names)

    print(f"{name}, zero-shot: colours {colour['accuracy']:.1f} % (chance {colour['chance']:.0f}), kinds "
          f"{kind['accuracy']:.1f} % (chance {kind['chance']:.0f}); kinds that English pairs show too "
          f"{accuracy(set(kinds) - new):.1f} %, new kinds {accuracy(new):.1f} %")


def look_at_retrieval(clips: dict[str, model.ChineseCLIP], valid: Pairs, path: str, context_length: int):
    """A contact sheet of six captions, the picture that each belongs to, and those nearest to it, among
    theirs and the first 1,000, in the eyes of each model."""
    texts = valid.positives[:, 0].unique().tolist()
    queries = texts[:: max(1, min(10, len(texts) // 6))][:6]
    known = {(text, image) for text, image in valid.positives.tolist() if text in queries}
    images = sorted({image for _, image in known} | set(range(min(1000, valid.image_count))))
    own = dict(sorted(known, reverse=True))  # the first that belongs to each
    blocks = [[[(valid.image(own[q]), False)] for q in queries]]
    for clip in clips.values():
        features = encode_texts(clip, [valid.text(q) for q in queries], context_length)  # [6, E]
        scores = features @ encode_images(clip, lambda n: valid.image(images[n]), len(images)).T  # [6, N]
        found = scores.topk(min(max(2, 6 // len(clips)), len(images))).indices.tolist()
        blocks.append([[(valid.image(images[n]), (q, images[n]) in known) for n in row]
                       for q, row in zip(queries, found)])
    contact_sheet(path, [(valid.text(q), list(row)) for q, row in zip(queries, zip(*blocks))],
                  ("its picture", *(name.replace("english", "english (reads no Chinese)") for name in clips)))
    print(f"validation captions and the pictures they retrieve (nearest first; green: the right one): {path}")
