"""How lists of captions are read, line by line."""

import pickle

import pytest

from sources import pairs
from sources.pairs import DataError, lines_of, parse_json, read_csv, read_jsonl, require


def test_a_list_with_one_broken_line(tmp_path):
    """Four lines, of which the second is blank and the third is no JSON: a reader stops there and says why."""
    path = tmp_path / "train.jsonl"
    path.write_bytes('{"text": "甲"}\n\n{"text": \n{"text": "乙"}\n'.encode())
    rows = read_jsonl(str(path))
    assert next(rows) == (1, 0, {"text": "甲"})
    with pytest.raises(DataError, match="train.jsonl line 3: not JSON .*; write one JSON object per line") as caught:
        next(rows)
    assert caught.value.kind == "not JSON"
    path.write_bytes('{"text": "甲"}\n\n{"text": "乙"}'.encode())
    assert list(read_jsonl(str(path))) == [(1, 0, {"text": "甲"}), (3, 17, {"text": "乙"})]


def test_pieces_of_a_file_hold_each_line_once(tmp_path):
    """Wherever it is cut, also at or beside a line end: a line belongs to the piece in which it begins."""
    path = tmp_path / "lines"
    path.write_bytes(b"one\n\nthree\r\n" + b"four" * 5 + b"\nlast")
    whole = list(lines_of(str(path)))
    assert [line for _, _, line in whole] == [b"one\n", b"\n", b"three\r\n", b"four" * 5 + b"\n", b"last"]
    assert [offset for _, offset, _ in whole] == [0, 4, 5, 12, 33]
    for size in range(1, 40):
        starts = range(0, 37, size)
        pieces = [list(lines_of(str(path), start, start + size)) for start in starts]
        assert [line[1:] for piece in pieces for line in piece] == [line[1:] for line in whole]
        assert all([line[0] for line in piece] == list(range(1, len(piece) + 1)) for piece in pieces)


def test_the_rest_of_a_line_that_is_too_long_is_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "LIMIT", 8)
    path = tmp_path / "lines"
    path.write_bytes(b"short\n" + b"x" * 30 + b"\nend")
    assert [line for _, _, line in lines_of(str(path))] == [b"short\n", b"x" * 8, b"end"]
    assert [line for _, _, line in lines_of(str(path), 10, 20)] == []


@pytest.mark.parametrize("line, kind", (
    (b"\xff", "not UTF-8"), (b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[1]", "not JSON")))
def test_what_is_no_json_object_says_why(line, kind):
    with pytest.raises(DataError, match="^here: ") as caught:
        parse_json(line, "here")
    assert caught.value.kind == kind
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "") == {"a": 1}  # with a byte order mark


def test_a_key_has_several_names():
    keys = (("image", "dir"), ("text",))
    assert require({"text": "甲", "dir": "a.png"}, keys, "") == ["a.png", "甲"]
    with pytest.raises(DataError, match=r"here: no 'image'; expected image or dir and text, got \['text'\]"):
        require({"text": "甲"}, keys, "here")


def test_a_csv_goes_on_behind_a_broken_row(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"image,text\na.png,one,two\nb.png,\xff\nc.png,three\nd.png\n")
    rows = [(number, row) for number, _, row in read_csv(str(path))]
    assert [(number, row.kind) for number, row in rows[:2]] == [(2, "not CSV"), (3, "not UTF-8")]
    assert rows[2:] == [(4, {"image": "c.png", "text": "three"}), (5, {"image": "d.png", "text": None})]


def test_a_fault_keeps_its_kind_from_process_to_process():
    error = pickle.loads(pickle.dumps(DataError("a.tar: not a tar", "not a tar")))
    assert (str(error), error.kind) == ("a.tar: not a tar", "not a tar") and DataError("x").kind == ""
