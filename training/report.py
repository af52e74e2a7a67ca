"""
What a run leaves for a person to look at: a table, a curve of recall and, for the demo, zero-shot
classification and a contact sheet of Chinese queries with the pictures they retrieve. Drawn with Pillow;
font.ttf is a subset of Noto Sans SC (see LICENSE) with the characters of sources/scenes.py, because many machines
have no Chinese font.
"""

import os

import torch
from PIL import Image, ImageDraw, ImageFont

import model
from sources import scenes
from common import write_json
from training.recipes import Config
from sources.layouts import open_pairs
from eval import encode_images, encode_texts, recall_table, zero_shot
from sources.classes import TEMPLATES, read_templates

FONT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "font.ttf")
LINE_COLOURS = ((214, 69, 65), (52, 109, 189), (39, 144, 88), (148, 84, 176), (230, 140, 30))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


def curve(path: str, series: dict[str, list[tuple[float, float]]], title: str):
    """Lines of (x, y in percent), one a name, over a common x axis in thousands, as a PNG."""
    width, height, left, top, right, bottom = 900, 520, 60, 50, 30, 60
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    x_max = max(x for points in series.values() for x, _ in points) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_max * (width - left - right), height - bottom - y / 100 * (height - top - bottom)

    canvas.text((left, 12), title, font=font(20), fill="black")
    for percent in range(0, 101, 20):
        canvas.line((*place(0, percent), *place(x_max, percent)), fill=(225, 225, 225))
        canvas.text(
            (place(0, percent)[0] - 10, place(0, percent)[1]),
            str(percent),
            font=font(14),
            fill="black",
            anchor="rm",
        )
    for tick in range(6):
        canvas.text(
            (place(x_max * tick / 5, 0)[0], height - bottom + 8),
            f"{x_max * tick / 5 / 1000:.0f}k",
            font=font(14),
            fill="black",
            anchor="ma",
        )
    canvas.text((width / 2, height - 24), "pairs seen", font=font(14), fill="black", anchor="mm")
    for i, (name, points) in enumerate(series.items()):
        colour = LINE_COLOURS[i % len(LINE_COLOURS)]
        canvas.line([place(x, y) for x, y in points], fill=colour, width=3, joint="curve")
        for x, y in points:
            cx, cy = place(x, y)
            canvas.ellipse((cx - 4, cy - 4, cx + 4, cy + 4), fill=colour)
        canvas.line((left + 20, top + 12 + 22 * i, left + 50, top + 12 + 22 * i), fill=colour, width=3)
        canvas.text((left + 58, top + 12 + 22 * i), name, font=font(16), fill="black", anchor="lm")
    image.save(path)


def contact_sheet(path: str, rows: list[tuple[str, list[tuple[Image.Image, bool]]]]):
    """Each row: a query above the images it retrieves, best first; the right answer has a green frame."""
    thumb, gap, text = 128, 12, 30
    width = max(len(images) for _, images in rows) * (thumb + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (thumb + gap + text) + gap), "white")
    canvas = ImageDraw.Draw(sheet)
    for r, (query, images) in enumerate(rows):
        y = gap + r * (thumb + gap + text)
        canvas.text((gap, y), query, font=font(20), fill="black")
        for c, (picture, right) in enumerate(images):
            x = gap + c * (thumb + gap)
            if right:
                canvas.rectangle(
                    (x - 5, y + text - 5, x + thumb + 4, y + text + thumb + 4), fill=(40, 170, 80)
                )
            sheet.paste(
                picture.convert("RGB").resize((thumb, thumb), Image.Resampling.BICUBIC), (x, y + text)
            )
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
    write_json(os.path.join(folder, "results.json"), histories)
    if last.data == "scenes-zh":
        look_at_scenes(folder, best)
    plot = os.path.join(folder, "recall.png")
    starts = {act: cfg.init for act, cfg in acts.items() if cfg.data == last.data}
    curve(plot, lines(histories, starts), "mean recall (%) on validation captions")
    print(f"recall as a curve: {plot}\nas numbers: {os.path.join(folder, 'results.json')}\n"
          f"the weights: {best}")


def lines(histories: dict, starts: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Mean recall against pairs seen, one line a way of training: an act that starts from another's weights
    ("@act") continues its line. starts: the acts to draw, and what each starts from."""
    way_of, result = {}, {}
    for act, start in starts.items():
        before = start[1:] if start[:1] == "@" and start[1:] in way_of else ""
        way = f"{way_of[before]}, {act}" if before else act
        points = result.pop(way_of[before]) if before else []
        seen = points[-1][0] if points else 0
        result[way] = points + [(seen + entry["samples"], entry["mean_recall"]) for entry in histories[act]]
        way_of[act] = way
    return result


def look_at_scenes(folder: str, path: str):
    """Zero-shot classification in the Chinese world, by colour and by kind, and a contact sheet of retrieval,
    with the weights at `path`."""
    clip, _ = model.load(path)
    kinds, colours = scenes.kind_names("zh"), scenes.colour_names("zh")
    examples = [scenes.class_example("zh", i) for i in range(20 * len(kinds))]
    pictures, kind_labels, colour_labels = zip(*examples)
    of_a_thing = [f"一张{{}}{kind}的图片" for kind in kinds]  # a colour is always some thing's
    for what, names, labels, templates in (("colour", colours, colour_labels, of_a_thing),
                                           ("kind", kinds, kind_labels, read_templates(TEMPLATES))):
        result = zero_shot(clip, names, lambda row: pictures[row], torch.tensor(labels), templates)
        print(f"zero-shot, {what} of a single thing: {result['accuracy']:.1f} % of {len(labels)} pictures, "
              f"{len(names)} names, {len(templates)} templates; {result['chance']:.1f} % by chance")
    valid = open_pairs("scenes-zh", "valid")
    queries = range(0, 60, 10)
    scores = (
        encode_texts(clip, [valid.texts[q] for q in queries])
        @ encode_images(clip, valid.image, valid.image_count).T
    )  # [6, N]
    sheet = os.path.join(folder, "retrieval.png")
    contact_sheet(
        sheet,
        [
            (valid.texts[q], [(valid.image(i), i == q) for i in row.topk(6).indices.tolist()])
            for q, row in zip(queries, scores)
        ],
    )
    print(f"unseen captions and the pictures they retrieve (green: the right one): {sheet}")
