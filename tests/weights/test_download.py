"""weights/download.py against a local HTTP server that cuts, lies and forgets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub import CONTENT, FILE, NAME, PATH, SHA256

from weights import download
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


def test_a_file_is_fetched_once(hub, tmp_path):
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert hub.requests == [(PATH, None), ("/bytes", None)]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert len(hub.requests) == 2  # what is there is not asked for again


@pytest.mark.parametrize("cuts", [[1000], [150_000], [299_000], [50_000, 1000, 120_000]])
def test_cut_connections_are_resumed_where_they_ended(cuts, hub, tmp_path):
    hub.cuts = list(cuts)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    ranges = [asked for path, asked in hub.requests if path == "/bytes"]
    starts = [sum(cuts[:i]) for i in range(1, len(cuts) + 1)]
    assert ranges == [None] + [f"bytes={start}-" for start in starts]


def test_a_cut_inside_a_chunk(hub, tmp_path, capsys):
    hub.cuts = [12_345]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert hub.requests[-1] == ("/bytes", "bytes=12000-")
    assert "next try in 1 s, from byte 12,000" in capsys.readouterr().err


def test_what_an_earlier_process_left_is_used(hub, tmp_path):
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT[:123_456])
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert hub.requests[-1] == ("/bytes", "bytes=123456-")


def test_a_complete_part_needs_no_byte(hub, tmp_path):  # killed between the last byte and the name
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT)
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_part_that_is_too_long_is_begun_anew(hub, tmp_path):
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(CONTENT + b"more")
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_server_without_ranges_begins_anew(hub, tmp_path):
    hub.ranges, hub.cuts = False, [200_000]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_server_that_answers_with_another_range_is_asked_for_all(hub, tmp_path, capsys):
    hub.wrong_range, hub.cuts = True, [1000]
    arrived(fetch(NAME, str(tmp_path)), tmp_path)
    assert "asked for byte 1,000" in capsys.readouterr().err and hub.requests[-1] == ("/bytes", None)


def test_a_server_without_length(hub, tmp_path):
    hub.length = False
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_cut_that_no_length_tells_is_told_by_the_checksum(hub, tmp_path):
    hub.length, hub.cuts = False, [1000]
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


def test_openais_addresses_carry_their_checksum(hub, tmp_path, monkeypatch):
    for sha256, right in ((SHA256, True), ("1" * 64, False)):
        monkeypatch.setitem(download.SOURCES, NAME, f"{hub.endpoint}/clip/models/{sha256}/{FILE}")
        root = tmp_path / sha256
        if right:
            arrived(fetch(NAME, str(root)), root)
        else:
            assert "SHA-256" in refusal(root)


def test_every_openai_address_carries_one():
    urls = [url for url in download.SOURCES.values() if url.startswith(download.OPENAI)]
    assert len(urls) == 5
    for url in urls:
        assert len(url.split("/")[-2]) == 64 and int(url.split("/")[-2], 16)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_files_are_not_asked_for_again(status, hub, tmp_path):
    hub.statuses = [status] * 9
    message = refusal(tmp_path)
    assert f"{status}" in message and hub.endpoint + PATH in message and len(hub.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(status, hub, tmp_path):
    hub.statuses = [status] * 2
    arrived(fetch(NAME, str(tmp_path)), tmp_path)


def test_a_server_that_stalls_is_asked_again(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.3))
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
    assert len(hub.requests) == download.TRIES


def test_pauses_grow(hub, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    hub.statuses = [503] * 99
    refusal(tmp_path)
    assert pauses == [1, 2, 4, 8]


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody listens
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
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
    assert len([path for path, _ in hub.requests if path == "/bytes"]) == 1


def test_addresses_follow_the_endpoint(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert download.address("rbt3") == "https://huggingface.co/hfl/rbt3/resolve/main/pytorch_model.bin"
    monkeypatch.setenv("HF_ENDPOINT", "https://my.mirror/")
    assert download.address("rbt3") == "https://my.mirror/hfl/rbt3/resolve/main/pytorch_model.bin"
    assert download.address("openai-RN50").startswith(download.OPENAI)


def test_proxies_are_used(hub, tmp_path, monkeypatch):
    proxy = hub.endpoint  # sees the whole address of another host
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    hub.statuses = [404]
    refusal(tmp_path)
    assert hub.requests[0][0] == "http://hub.invalid" + PATH
