"""
A measurement to look at: one HTML file that needs nothing else, because the pictures are inside and a browser
has fonts for Chinese. For retrieval it shows how recall grows with K, and the captions whose picture ranks
worst; for classification the confusion matrix, and the pictures most surely taken for something else.
"""

import base64
import html
import io

import torch
from PIL import Image

from common import replace_text
from eval import TIE
from sources.augment import as_rgb
from sources.pairs import Pairs
from tools.measure.metrics import nearest

WORST = 24  # failures on a page
STYLE = """body { font: 15px sans-serif; margin: 2em; max-width: 1100px }
img { height: 110px; margin: 3px; border: 3px solid white } img.right { border-color: #28aa50 }
img.matrix { height: 440px; border: 1px solid #888; image-rendering: pixelated } p { margin: 1.6em 0 .2em }"""


def write_retrieval(path: str, title: str, table: str, pairs: Pairs, text_features, image_features, ranks):
    """Unit features [N_text, E] and [N_image, E], and their `eval.places`. Each of the worst captions stands
    with its best right picture (green) and the nearest of those that came before it."""
    text_ranks, image_ranks = ranks
    worst = text_ranks.topk(min(WORST, int((text_ranks > 0).sum()))).indices
    first = nearest(text_features[worst], image_features, 6).tolist()
    parts = [recall_curve({"text to image": text_ranks, "image to text": image_ranks}),
             f"<h2>The {len(worst)} captions whose picture ranks worst</h2>"
             "green: the picture; then those that came before it"]
    for text, images in zip(worst.tolist(), first):
        right = pairs.positives[pairs.positives[:, 0] == text, 1]  # numbers of its pictures
        best = int(right[(image_features[right] @ text_features[text]).argmax()])
        before = [image for image in images if image not in right][: int(text_ranks[text])]
        parts.append(f"<p>{html.escape(pairs.text(text))} "
                     f"<small>(place {text_ranks[text] + 1:,} of {len(image_features):,})</small></p>")
        parts += [embedded(pairs.image(image, 128), "right" if image == best else "other")
                  for image in (best, *before)]
    write(path, title, table, parts)


def write_zeroshot(path: str, title: str, line: str, names: list[str], get_image, cosines, labels):
    """Cosines [N, C] and labels: [N], or [N, C] of 0 and 1 where a picture shows several classes."""
    right = labels.bool() if labels.ndim == 2 else labels[:, None] == torch.arange(len(names))  # [N, C]
    lead = cosines.masked_fill(right, -torch.inf).max(dim=1)  # the best wrong class of every picture
    own = cosines.masked_fill(~right, -torch.inf).amax(dim=1)  # and the cosine of its best right one
    wrong = (lead.values >= own - TIE) & right.any(dim=1)  # [N]; a picture of no class cannot be mistaken
    taken = torch.nn.functional.one_hot(lead.indices, len(names)).float()
    mistakes = (right & wrong[:, None]).float().T @ taken  # [C, C], a row for each true class
    counts = mistakes + (right & ~wrong[:, None]).sum(dim=0).float().diag()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    matrix = Image.fromarray((255 * (1 - shares)).round().byte().numpy())
    worst = (lead.values - own).where(wrong, -torch.inf).topk(min(WORST, int(wrong.sum()))).indices.tolist()
    parts = ["<h2>Confusion matrix</h2>a row for each true class, a column for each class named; black is "
             f"the whole row<br>{embedded(matrix, 'matrix')}<br>from the top, and from the left: "
             + html.escape("、".join(names)),
             f"<h2>The {len(worst)} pictures most surely taken for something else</h2>"]
    for row in worst:
        is_one = "、".join(names[c] for c in right[row].nonzero().flatten().tolist())
        parts.append(f"<p>{html.escape(is_one)}: cosine {own[row]:.3f}, taken for "
                     f"{html.escape(names[lead.indices[row]])}: {lead.values[row]:.3f}</p>"
                     + embedded(get_image(row), "other"))
    write(path, title, line, parts)


def recall_curve(ranks_of: dict[str, torch.Tensor]) -> str:
    """An SVG of how many percent of the queries find a right answer among the K nearest, for K from 1 to all,
    on a roughly logarithmic axis. The gallery of one direction is the queries of the other."""
    most = max(len(ranks) for ranks in ranks_of.values())
    round_numbers = [k * 10**power for power in range(len(str(most))) for k in (1, 2, 5)]
    ks = [1, *(k for k in round_numbers if 1 < k < most), most]
    step, width, height = 64, 64 * (len(ks) - 1), 300
    drawn = [f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" stroke="#ddd"/>'
             f'<text x="-8" y="{y + 4}" text-anchor="end">{100 - 100 * y // height}</text>'
             for y in range(0, height + 1, height // 5)]
    drawn += [f'<text x="{step * i}" y="{height + 20}" text-anchor="middle">{k:,}</text>'
              for i, k in enumerate(ks)]
    for line, (name, ranks) in enumerate(ranks_of.items()):
        found = [(ranks[ranks >= 0] < k).float().mean().item() for k in ks]
        points = " ".join(f"{step * i},{height * (1 - share):.1f}" for i, share in enumerate(found))
        colour = ("#d64541", "#346dbd")[line]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{width - 8}" y="{height - 30 + 18 * line}" text-anchor="end" fill="{colour}">'
                     f"{name}</text>")
    return ("<h2>Found among the K nearest, in percent; below: K</h2>"
            f'<svg viewBox="-50 -20 {width + 80} {height + 60}" width="{width + 80}">{"".join(drawn)}</svg>')


def embedded(image: Image.Image, kind: str) -> str:
    """A picture inside the page: a "matrix" pixel by pixel, others small, "right" ones with a green frame."""
    file, form = io.BytesIO(), "PNG" if kind == "matrix" else "JPEG"
    if kind != "matrix":
        image = as_rgb(image).copy()
        image.thumbnail((220, 220))
    image.save(file, form)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" src="data:image/{form.lower()};base64,{encoded}">'


def write(path: str, title: str, result: str, parts: list[str]):
    title = html.escape(title)
    replace_text(path, "\n".join([
        f'<!DOCTYPE html><html lang="zh"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style>", f"<h1>{title}</h1>", f"<pre>{html.escape(result)}</pre>",
        *parts, "</html>"]))
