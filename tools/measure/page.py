"""
A measurement to look at: one HTML file that needs nothing else (pictures are inside, a browser has the fonts
for Chinese). Of retrieval how recall grows with K, and the captions whose picture ranks worst; of
classification the confusion matrix, and the pictures that were most surely taken for something else.

Shapes: N pictures or texts, C classes, E joint width.
"""

import base64
import html
import io

import torch
from PIL import Image

from tools.measure.metrics import TIE, nearest
from sources.pairs import Pairs
from common import replace_text

WORST = 24  # failures on a page
STYLE = """body { font: 15px sans-serif; margin: 2em; max-width: 1100px } td, th { padding: 3px 10px }
img { height: 110px; margin: 3px; border: 3px solid white } img.right { border-color: #28aa50 }
img.matrix { height: 440px; border: 1px solid #888; image-rendering: pixelated } p { margin: 1.6em 0 .2em }"""


def write_retrieval(
    path: str, title: str, table: str, pairs: Pairs, text_features: torch.Tensor,
    image_features: torch.Tensor, text_ranks: torch.Tensor, image_ranks: torch.Tensor,
):
    """Unit features [N_text, E], [N_image, E] and the ranks of `metrics.ranks`. The worst captions are shown
    with their best right picture (green) and the nearest of those that came before it."""
    parts = [preformatted(table), recall_curve({"text to image": text_ranks, "image to text": image_ranks})]
    worst = text_ranks.topk(min(WORST, int((text_ranks > 0).sum()))).indices
    first = nearest(text_features[worst], image_features, 6).tolist()
    parts.append(f"<h2>The {len(worst)} captions whose picture ranks worst</h2>"
                 "green: the picture; after it what came before it")
    for text, images in zip(worst.tolist(), first):
        right = pairs.positives[pairs.positives[:, 0] == text, 1]  # [its pictures]
        best = int(right[(image_features[right] @ text_features[text]).argmax()])
        place = f"<small>(place {text_ranks[text] + 1:,} of {len(image_features):,})</small>"
        parts.append(f"<p>{html.escape(pairs.text(text))} {place}</p>")
        before = [image for image in images if image not in right][: int(text_ranks[text])]
        shown = [best, *before]
        parts += [thumbnail(pairs.image(image, 128), image == best) for image in shown]
    write(path, title, parts)


def write_zeroshot(
    path: str, title: str, line: str, names: list[str], get_image, cosines: torch.Tensor, labels: torch.Tensor
):
    """Cosines [N, C] and labels [N], or [N, C] of 0 and 1 where a picture has several."""
    right = labels.bool() if labels.ndim == 2 else labels[:, None] == torch.arange(len(names))  # [N, C]
    has_one = right.any(dim=1)  # what shows no class cannot be mistaken for another
    lead = cosines.masked_fill(right, -torch.inf).max(dim=1)  # the best wrong class of every picture
    own = cosines.masked_fill(~right, -torch.inf).amax(dim=1)  # and its best right one
    wrong = (lead.values >= own - TIE) & has_one  # [N]
    taken = torch.nn.functional.one_hot(lead.indices, len(names)).float()
    mistakes = (right & wrong[:, None]).float().T @ taken  # [C, C], a row each true class
    counts = mistakes + (right & ~wrong[:, None]).sum(dim=0).float().diag()
    parts = [preformatted(line), confusion_matrix(counts, names), most_confused(counts, names)]
    worst = (lead.values - own).where(wrong, -torch.inf).topk(min(WORST, int(wrong.sum()))).indices.tolist()
    parts.append(f"<h2>The {len(worst)} pictures most surely taken for something else</h2>")
    for row in worst:
        is_one = "、".join(names[c] for c in right[row].nonzero().flatten().tolist())
        parts.append(f"<p>{html.escape(is_one)}: cosine {own[row]:.3f}, taken for "
                     f"{html.escape(names[lead.indices[row]])}: {lead.values[row]:.3f}</p>"
                     + thumbnail(get_image(row)))
    write(path, title, parts)


# ------------------------------------------------------------------------------------------------------------
# parts of a page


def recall_curve(ranks_of: dict[str, torch.Tensor]) -> str:
    """How many percent are found among the K nearest, for K from 1 to all there are (one side's queries are
    the other side's gallery), on a roughly logarithmic axis: an SVG."""
    most = max(len(ranks) for ranks in ranks_of.values())
    ks = [k * 10**power for power in range(len(str(most))) for k in (1, 2, 5)]
    ks = [1, *(k for k in ks[1:] if k < most), most]
    width, height, step = 64 * (len(ks) - 1), 300, 64
    drawn = [f'<line x1="0" x2="{width}" y1="{y}" y2="{y}" stroke="#ddd"/>'
             f'<text x="-8" y="{y + 4}" text-anchor="end">{100 - 100 * y // height}</text>'
             for y in range(0, height + 1, height // 5)]
    drawn += [f'<text x="{step * i}" y="{height + 20}" text-anchor="middle">{k:,}</text>'
              for i, k in enumerate(ks)]
    for line, (name, ranks) in enumerate(ranks_of.items()):
        shares = [(ranks[ranks >= 0] < k).float().mean().item() for k in ks]
        points = " ".join(f"{step * i},{height * (1 - share):.1f}" for i, share in enumerate(shares))
        colour = ("#d64541", "#346dbd")[line]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
                     f'<text x="{width - 8}" y="{height - 30 + 18 * line}" text-anchor="end" fill="{colour}">'
                     f"{name}</text>")
    return ("<h2>Found among the K nearest, percent; below: K</h2>"
            f'<svg viewBox="-50 -20 {width + 80} {height + 60}" width="{width + 80}">{"".join(drawn)}</svg>')


def confusion_matrix(counts: torch.Tensor, names: list[str]) -> str:
    """Counts [C, C], a row each true class, as a picture: black is all of a row, the diagonal is right."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    picture = Image.fromarray((255 * (1 - shares)).round().byte().numpy())
    return ("<h2>Confusion matrix</h2>a row each true class, a column each class named, black: all of a row"
            f"<br>{embedded(picture, 'PNG', 'matrix')}<br>from the top, and from the left: "
            + html.escape("、".join(names)))


def most_confused(counts: torch.Tensor, names: list[str]) -> str:
    mistakes = counts - counts.diag().diag()  # [C, C]
    most = mistakes.flatten().topk(min(WORST, int((mistakes > 0).sum()))).indices.tolist()
    rows = [f"<tr><td>{html.escape(names[true])}</td><td>{html.escape(names[taken])}</td>"
            f"<td>{int(counts[true, taken]):,} of {int(counts[true].sum()):,}</td></tr>"
            for true, taken in (divmod(place, len(names)) for place in most)]
    return "<table><tr><th>is</th><th>taken for</th><th>how often</th></tr>" + "".join(rows) + "</table>"


def thumbnail(image: Image.Image, right: bool = False) -> str:
    image = image.convert("RGB")
    image.thumbnail((220, 220))
    return embedded(image, "JPEG", "right" if right else "other")


def embedded(image: Image.Image, form: str, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, form)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" src="data:image/{form.lower()};base64,{encoded}">'


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def write(path: str, title: str, parts: list[str]):
    title = html.escape(title)
    head = f'<!DOCTYPE html><html lang="zh"><meta charset="utf-8"><title>{title}</title>'
    body = [f"<style>{STYLE}</style>", f"<h1>{title}</h1>", *parts, "</html>"]
    replace_text(path, "\n".join([head, *body]))
    print(f"to look at: {path}")
