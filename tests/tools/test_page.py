"""tools/measure/page.py: what is on a page, and that it needs nothing else."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from eval import places
from sources.pairs import Pairs
from tools.measure import page

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple")


class Seven(Pairs):
    """Seven captions with a picture each; the caption of number 2 tries to be HTML."""

    texts = [f"第{row}张" for row in range(7)]
    texts[2] = "<script>alert(1)</script> & 好"
    image_count, positives = 7, torch.arange(7)[:, None].expand(7, 2)

    def text(self, row: int) -> str:
        return self.texts[row]

    def image(self, row: int, size: int = 0) -> Image.Image:
        return Image.new("RGBA", (300, 200), COLOURS[row])


def pictures(text: str, kind: str) -> list[tuple[int, int, int]]:
    """The middle pixel of every picture of this class, decoded from the page itself."""
    found = re.findall(rf'<img class="{kind}" src="data:image/\w+;base64,([^"]+)">', text)
    images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]
    return [image.getpixel((image.width // 2, image.height // 2)) for image in images]


def near(pixel, colour: str) -> bool:
    wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return all(abs(a - b) < 8 for a, b in zip(pixel, wanted))


class Balanced(HTMLParser):
    """Every element that opens also closes."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert all(value.startswith("data:") for name, value in attributes if name in ("src", "href"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def whole(path) -> str:
    text = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and "<script" not in text
    return text


def test_retrieval_shows_the_worst_captions_beside_their_picture(tmp_path):
    """Captions 2 and 5 find each other's picture; all others their own."""
    images = torch.eye(7)
    texts = images[[0, 1, 5, 3, 4, 2, 6]]
    found = places(texts, images, Seven.positives)
    path = tmp_path / "a.html"
    page.write_retrieval(str(path), "model & data", "a <table>", Seven(), texts, images, found)
    text = whole(path)
    assert "model &amp; data" in text and "a &lt;table&gt;" in text
    shown = re.findall(r"<p>(.*?) <small>\(place (\d+) of 7\)", text)
    assert sorted(shown) == sorted([("第5张", "7"), ("&lt;script&gt;alert(1)&lt;/script&gt; &amp; 好", "7")])
    order = [2, 5] if "script" in shown[0][0] else [5, 2]  # both at the same place, so either may come first
    assert [near(pixel, COLOURS[row]) for pixel, row in zip(pictures(text, "right"), order)] == [True, True]
    first = pictures(text, "other")
    assert near(first[0], COLOURS[order[1]])  # the one it was taken for
    lines = re.findall(r'points="([^"]+)"', text)
    assert len(lines) == 2 and lines[0].split()[0] == "0,85.7" and lines[0].split()[-1].endswith(",0.0")


def test_classification_shows_what_was_taken_for_what(tmp_path):
    """Of seven pictures of three classes two blue ones are called 船, one of them more surely."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    cosines = torch.nn.functional.one_hot(labels, 3).float()
    cosines[5] = torch.tensor([0.0, 0.8, 0.5])
    cosines[6] = torch.tensor([0.0, 0.9, 0.5])
    names = ["猫", "船", "<花>"]
    page.write_zeroshot(str(tmp_path / "b.html"), "t", "71 %", names, Seven().image, cosines, labels)
    text = whole(tmp_path / "b.html")
    assert re.findall(r"<p>(.*?)</p>", text) == ["&lt;花&gt;: cosine 0.500, taken for 船: 0.900",
                                                 "&lt;花&gt;: cosine 0.500, taken for 船: 0.800"]
    assert [near(*pair) for pair in zip(pictures(text, "other"), ("purple", "yellow"))] == [True, True]
    encoded = re.search(r'class="matrix" src="data:image/png;base64,([^"]+)"', text)[1]
    matrix = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert list(matrix.tobytes()) == [0, 255, 255, 255, 0, 255, 255, 85, 170]
    assert "from the left: 猫、船、&lt;花&gt;" in text


def test_pictures_of_several_classes(tmp_path):
    labels = torch.tensor([[1, 1, 0], [0, 1, 1]])
    cosines = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    page.write_zeroshot(str(tmp_path / "c.html"), "t", "", ["猫", "船", "花"], Seven().image, cosines, labels)
    text = whole(tmp_path / "c.html")
    assert re.findall(r"<p>(.*?)</p>", text) == ["船、花: cosine 0.300, taken for 猫: 0.700"]
    encoded = re.search(r'class="matrix" src="data:image/png;base64,([^"]+)"', text)[1]
    matrix = Image.open(io.BytesIO(base64.b64decode(encoded)))
    # the first picture is right, about 猫 and 船; the second shows 船 and 花, and both are taken for 猫
    assert list(matrix.tobytes()) == [0, 255, 255, 128, 128, 255, 0, 255, 255]


def test_a_picture_of_no_class_is_no_mistake(tmp_path):
    labels, cosines = torch.tensor([[0, 0], [1, 0]]), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    page.write_zeroshot(str(tmp_path / "e.html"), "t", "", ["猫", "船"], Seven().image, cosines, labels)
    assert "The 0 pictures" in whole(tmp_path / "e.html") and "inf" not in whole(tmp_path / "e.html")


def test_what_came_before_and_no_more(tmp_path):
    """The picture of caption 0 is second: one other is shown, though six are nearest."""
    images, texts = torch.eye(7), torch.eye(7)
    texts[0] = torch.nn.functional.normalize(torch.tensor([0.6, 0.8, 0.1, 0, 0, 0, 0]), dim=0)
    found = places(texts, images, Seven.positives)
    page.write_retrieval(str(tmp_path / "f.html"), "t", "", Seven(), texts, images, found)
    text = whole(tmp_path / "f.html")
    assert [near(pixel, COLOURS[1]) for pixel in pictures(text, "other")] == [True]
    assert [near(pixel, COLOURS[0]) for pixel in pictures(text, "right")] == [True]


def test_nothing_went_wrong(tmp_path):
    images = torch.eye(7)
    found = places(images, images, Seven.positives)
    page.write_retrieval(str(tmp_path / "d.html"), "t", "", Seven(), images, images, found)
    assert "The 0 captions" in whole(tmp_path / "d.html")


@pytest.mark.parametrize("count, ks", [
    (7, ["1", "2", "5", "7"]), (10, ["1", "2", "5", "10"]), (1200, "1 2 5 10 20 50 100 200 500 1,000 1,200".split())])
def test_the_curve_ends_where_everything_is_found(count, ks):
    curve = page.recall_curve({"one way": torch.arange(count), "the other": torch.arange(1)})
    assert re.findall(r'text-anchor="middle">([\d,]+)<', curve) == ks
    assert f' {64 * (len(ks) - 1)},0.0" fill' in curve


@pytest.mark.parametrize("ranks, shares", [([0, 0], [100.0, 100.0]), ([-1, 1], [0.0, 100.0])])
def test_the_curve_leaves_out_what_has_no_answer(ranks, shares):
    curve = page.recall_curve({"one way": torch.tensor(ranks)})
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', curve)[1].split()]
    assert heights[:2] == [300 * (1 - share / 100) for share in shares]


def test_a_transparent_picture_is_shown_on_white_and_left_as_it_is():
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    assert near(pictures(page.embedded(image, "other"), "other")[0], "white")
    image = Image.new("RGB", (300, 200))
    page.embedded(image, "other")
    assert image.size == (300, 200)
