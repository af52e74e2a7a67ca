"""weights/transfer.py against a local HTTP server that cuts, lies and forgets."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub import CONTENT, FILE, NAME, PATH, SHA256

from weights import download, transfer
from weights.download import fetch
from weights.names import WeightsError


def part(root: Path) -> Path:
    return root / NAME / f"{FILE}.part"


def arrived(path: str, root: Path):
    """The whole file under its name, and nothing unfinished beside it."""
    assert path == str(root / NAME / FILE)
    assert Path(path).read_bytes() == CONTENT and not part(root).exists()


def refusal(root: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        fetch(NAME, str(root))
    assert "\n" not in str(caught.value) and not (root / NAME / FILE).exists()
    return str(caught.value)


BYTES = "/bytes" + PATH


def ranges(hub) -> list[str]:
    return [asked for path, asked in hub.requests if path == BYTES]


def test_a_file_is_fetched_once(hub, tmp_path):
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert hub.requests == [(BYTES, "bytes=0-299999")]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert len(hub.requests) == 1  # what is there is not asked for again


@pytest.mark.parametrize("cuts", [[1000], [150_000], [299_000], [50_000, 1000, 120_000]])
def test_cut_connections_are_resumed_where_they_ended(cuts, hub, tmp_path):
    hub.cuts = list(cuts)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    starts = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    assert ranges(hub) == [f"bytes={start}-299999" for start in starts]


def test_several_ranges_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "BLOCK", 70_000)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert sorted(ranges(hub)) == sorted(f"bytes={start}-{min(start + 69_999, 299_999)}"
                                         for start in range(0, 300_000, 70_000))


@pytest.mark.parametrize("seed", range(5))
def test_blocks_arrive_in_order_and_without_holes_whatever_breaks(seed, hub, tmp_path, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(transfer, "BLOCK", rng.choice([999, 10_000, 33_333]))
    hub.cuts = [rng.choice([0, 1, 500, 10**6, 10**6, 10**6]) for _ in range(40)]
    monkeypatch.setattr(transfer, "TRIES", 40)
    monkeypatch.setattr(download, "TRIES", 40)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_an_answer_that_is_shorter_than_it_says_leaves_no_hole(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "BLOCK", 100_000)
    hub.short, hub.etag = 30_000, ""
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert re.search("it ended at byte [12]?70,000|it ended at byte 270,000", capsys.readouterr().err)


def test_without_a_checksum_the_length_is_compared(hub, tmp_path):
    hub.etag = ""
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT + b"more")
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_cut_inside_a_chunk(hub, tmp_path, capsys):
    hub.cuts = [12_345]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert hub.requests[-1] == (BYTES, "bytes=12000-299999")
    assert "next try in 1 s, from byte 12,000" in capsys.readouterr().err


def test_what_an_earlier_process_left_is_used(hub, tmp_path):
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT[:123_456])
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert ranges(hub) == ["bytes=123456-299999"]


def test_a_complete_part_needs_no_byte(hub, tmp_path):  # killed between the last byte and the name
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


@pytest.mark.parametrize("other", [CONTENT + b"more", b"other" + CONTENT[5:100_000], b"other" + CONTENT[5:]])
def test_a_part_of_another_version_is_begun_anew(other, hub, tmp_path, capsys):
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(other)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert "what was there before does not fit, starting again" in capsys.readouterr().err


def test_a_server_without_ranges_begins_anew(hub, tmp_path):
    hub.ranges, hub.cuts = False, [200_000]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_server_that_answers_with_another_range_is_not_believed(hub, tmp_path, capsys):
    hub.wrong_range, hub.cuts = True, [1000]
    assert "asked for byte 1,000" in refusal(tmp_path) and part(tmp_path).read_bytes() == CONTENT[:1000]


def test_a_server_without_length(hub, tmp_path):
    hub.length = False
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_cut_that_no_length_tells_is_told_by_the_checksum(hub, tmp_path):
    hub.length, hub.ranges, hub.cuts = False, False, [1000] * 2
    assert SHA256 in refusal(tmp_path) and not part(tmp_path).exists()


def test_wrong_checksum(hub, tmp_path):
    hub.etag = '"' + "0" * 64 + '"'
    message = refusal(tmp_path)
    assert "SHA-256" in message and SHA256 in message and "0" * 64 in message
    assert not part(tmp_path).exists()  # or the next try would only add to the damage


@pytest.mark.parametrize("etag", ["", '"abc"', f'W/"{SHA256.upper()}"'])
def test_unknown_and_weak_checksums(etag, hub, tmp_path):
    hub.etag = etag
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_files_are_not_asked_for_again(status, hub, tmp_path):
    hub.statuses = [status] * 9
    message = refusal(tmp_path)
    assert f"{status}" in message and hub.endpoint + PATH in message and len(hub.statuses) == 7  # of each host
    assert ("HF_TOKEN" in message) == (status != 404)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(status, hub, tmp_path):
    hub.statuses = [status] * 2
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_server_that_stalls_is_asked_again(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "TIMEOUT", (1, 0.3))
    hub.stall = 2
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert "next try in 1 s" in capsys.readouterr().err


def test_tries_are_bounded_without_ranges_too(hub, tmp_path):
    hub.ranges, hub.cuts = False, [100_000, 200_000] * 50  # each second one further than the one before
    assert "nothing came" in refusal(tmp_path)
    assert len(hub.requests) < 30


def test_a_web_page_is_not_taken_for_the_file(hub, tmp_path):
    hub.etag, hub.content_type = "", "text/html; charset=utf-8"
    assert "sends a web page" in refusal(tmp_path)


def test_a_file_without_a_published_checksum_is_said_to_be_unchecked(hub, tmp_path, capsys):
    hub.etag = ""
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert "publishes no SHA-256" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WeightsError, match="XDG_CACHE_HOME"):
        fetch(NAME, str(tmp_path / "file"))


def test_tries_are_bounded(hub, tmp_path):
    hub.statuses = [503] * 99
    message = refusal(tmp_path)
    assert "HF_ENDPOINT" in message and str(tmp_path / NAME / FILE) in message
    assert len(hub.statuses) == 99 - 2 - transfer.TRIES  # two of the first host, as there is another


def test_pauses_grow(hub, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    hub.statuses = [503] * 99
    refusal(tmp_path)
    assert pauses == [1, 1, 2, 4, 8]


def test_offline(monkeypatch, tmp_path):
    for variable in ("HF_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nobody listens
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    message = refusal(tmp_path)
    assert "offline" in message and "http://127.0.0.1:1" in message and str(tmp_path / NAME / FILE) in message


@pytest.mark.parametrize("endpoint", ["my.mirror", "ftp://my.mirror", "http://"])
def test_endpoints_that_are_no_address(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in refusal(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_disk_that_fills_up_on_the_way(hub, tmp_path):
    part(tmp_path).parent.mkdir()
    part(tmp_path).symlink_to("/dev/full")
    assert "No space left" in refusal(tmp_path)


def test_two_processes_at_once(hub, tmp_path):
    command = [sys.executable, "-c", f"from weights import download; print(download.fetch({NAME!r}))"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    root = tmp_path / "zhclip"
    for process in both:
        arrived(process.communicate(timeout=60)[0].strip(), root)
    assert len(hub.requests) == 1
