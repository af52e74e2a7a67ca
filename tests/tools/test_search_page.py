"""tools/search/server.py and page.html: what is served to whom, and the page in a real browser."""

import http.client
import io
import json
import os
import socket
import struct
import threading
import zlib

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import noise, shake
from PIL import Image

import model
from tools.search.index import Index
from tools.search.query import Search
from tools.search.server import Server

EVIL = "<img src=x onerror=\"document.title='owned'\">.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 pictures of noise, 10 of a folder below, one with a name that is HTML, one in TIFF."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(150):
        noise(40, 30, n).save(folder / f"{n}.png")
    (folder / "海边").mkdir()
    for n in range(10):
        noise(30, 40, 200 + n).save(folder / "海边" / f"b{n}.jpg")
    noise(30, 30, 300).save(folder / EVIL)
    noise(30, 30, 301).save(folder / "old.tiff")
    return folder


def start(photos, tmp_path, host: str = "127.0.0.1", grown: bool = True) -> Server:
    torch.manual_seed(0)
    clip = shake(model.ChineseCLIP(model.MODELS["ViT-tiny"])).eval()
    search = Search(clip, Index(str(tmp_path), clip, [os.fsencode(photos)]), 0.9999, paths=False)
    server = Server(search, host, 0, 2.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if grown:
        server.grow()
    return server


@pytest.fixture(scope="module")
def server(photos, tmp_path_factory):
    server = start(photos, tmp_path_factory.mktemp("index"))
    yield server
    server.shutdown()


def ask(server: Server, path: str, method: str = "GET", body=None, **headers) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def hits(server: Server, query: str = "") -> dict:
    status, body, _ = ask(server, f"/search?{query}")
    assert status == 200, body
    return json.loads(body)


# ------------------------------------------------------------------------------------------------------------
# what is asked for


def test_every_picture_is_found_once_however_one_scrolls(server, photos):
    found = []
    while more := hits(server, f"q=%E7%8C%AB&start={len(found)}&count=37")["hits"]:
        found += more
    assert len(found) == 162 == len({one["number"] for one in found})
    assert [one["cosine"] for one in found] == sorted((one["cosine"] for one in found), reverse=True)
    assert {os.path.basename(one["path"]) for one in found} >= {EVIL, "old.tiff", "b9.jpg", "0.png"}
    assert hits(server)["hits"][0]["cosine"] is None  # the newest, without a query
    assert len(hits(server, "count=100000")["hits"]) == 162  # at most 200


def test_filters_labels_and_more_like_this(server, photos):
    below = hits(server, f"q=x&folder={photos}/%E6%B5%B7%E8%BE%B9")
    assert below["total"] == 10 and all("海边" in one["path"] for one in below["hits"])
    assert hits(server, "until=1999")["total"] == 0
    one = below["hits"][3]
    assert hits(server, f"q=%23{one['number']}")["hits"][0]["number"] == one["number"]
    counts = json.loads(ask(server, "/search?words=%E7%8C%AB%0A%0A%E7%8B%97")[1])["counts"]
    assert sum(counts) == 162 and len(counts) == 2
    for c, count in enumerate(counts):
        some = hits(server, f"words=%E7%8C%AB%0A%E7%8B%97&word={c}&count=200")
        assert some["total"] == count and all(hit["word"] == "猫狗"[c] for hit in some["hits"])


def test_a_dropped_picture_finds_itself(server, photos):
    status, body, _ = ask(server, "/like", "POST", (photos / "7.png").read_bytes())
    term = json.loads(body)["term"]
    found = hits(server, f"q={term.replace('#', '%23')}")["hits"][0]
    assert status == 200 and found["path"].endswith("/7.png") and found["cosine"] > 0.999


def test_pictures_are_served_by_number(server, photos):
    numbers = {os.path.basename(hit["path"]): hit["number"] for hit in hits(server, "count=200")["hits"]}
    status, body, headers = ask(server, f"/picture/{numbers['3.png']}")
    assert (status, headers["Content-Type"]) == (200, "image/png") and body == (photos / "3.png").read_bytes()
    for path, size in ((f"/picture/{numbers['old.tiff']}", (30, 30)), (f"/thumb/{numbers['3.png']}", (40, 30))):
        _, body, headers = ask(server, path)
        with Image.open(io.BytesIO(body)) as image:
            assert (image.format, image.size, headers["Content-Type"]) == ("JPEG", size, "image/jpeg")
    os.rename(photos / "3.png", photos / "gone")
    assert ask(server, f"/picture/{numbers['3.png']}")[0] == ask(server, f"/thumb/{numbers['3.png']}")[0] == 404
    os.rename(photos / "gone", photos / "3.png")


def test_only_the_folders_of_the_command_are_served(photos, server, tmp_path):
    """The index may know others from an earlier command."""
    (folder := tmp_path / "other").mkdir()
    noise(40, 30, 999).save(folder / "secret.png")
    search = server.search
    other = Index(os.path.dirname(search.index.folder), search.clip, [os.fsencode(folder)])
    other.update(search.clip)
    number, = other.files([os.fsencode(folder)])["number"].tolist()
    assert other.path(number) and ask(server, f"/picture/{number}")[0] == ask(server, f"/thumb/{number}")[0] == 404
    assert hits(server)["total"] == 162 and hits(server, f"folder={folder}")["total"] == 0


def test_a_thumb_is_of_what_the_file_holds_now(server, photos):
    number = next(one["number"] for one in hits(server, "count=200")["hits"] if one["path"].endswith("/11.png"))
    before = ask(server, f"/thumb/{number}")[1]
    old = (photos / "11.png").read_bytes()
    Image.new("RGB", (40, 30), "red").save(photos / "11.png")
    assert ask(server, f"/thumb/{number}")[1] != before
    (photos / "11.png").write_bytes(old)
    assert ask(server, f"/thumb/{number}")[1] == before


def test_matches_are_marked_for_texts_alone(server):
    """A threshold is measured on texts with pictures; between pictures, or without a query, it means nothing."""
    server.least = -1.0
    try:
        assert all(one["match"] for one in hits(server, "q=%E7%8C%AB")["hits"])
        for query in ("", "q=%231", "q=%E7%8C%AB%20-%20%E7%8B%97"):
            assert not any(one["match"] for one in hits(server, query)["hits"])
    finally:
        server.least = 2.0


# ------------------------------------------------------------------------------------------------------------
# hostile requests


@pytest.mark.parametrize("path", [
    "/picture/../../etc/passwd", "/picture/%2e%2e%2fetc%2fpasswd", "/picture//etc/passwd", "/thumb/etc", "/thumb/-1",
    "/picture/99999999999999999999999", "/picture/", "/picture", "/../page.html", "/etc/passwd", "//etc/passwd",
    "/search?start=x", "/search?word=x", "/search?since=x", "/search?q=%2Fetc%2Fpasswd%20%2B", "/nothing", "/like",
    "/search?folder=%00", "/picture/1%00.png", "*", "/[::1/"])
def test_refused_paths(server, path):
    status, body, headers = ask(server, path)
    assert 400 <= status < 500 and b"root:" not in body and headers["Content-Type"].startswith("text/plain"), body


def test_a_path_is_a_text_to_the_page(server, photos):
    """A query that names a file is not read: it is words."""
    one = hits(server, f"q={photos}/7.png")["hits"][0]
    assert one["cosine"] < 0.999


@pytest.mark.parametrize("host, wanted", [
    ("evil.example", 421), ("evil.example:{port}", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("[::1", 421),
    ("localhost:{port}", 200), ("127.0.0.1:{port}", 200), ("[::1]:{port}", 200), ("localhostevil", 421)])
def test_only_its_own_name(server, host, wanted):
    host = host.format(port=server.server_address[1])
    assert ask(server, "/status", Host=host)[0] == wanted


def test_pages_of_other_sites_may_not_ask(server):
    own = f"127.0.0.1:{server.server_address[1]}"
    assert ask(server, "/status", Origin="https://evil.example")[0] == 403
    assert ask(server, "/status", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(server, "/like", "POST", b"x", Origin="null")[0] == 403
    status, _, headers = ask(server, "/status", Origin=f"http://{own}", Sec_Fetch_Site="same-origin")
    assert status == 200 and "Access-Control-Allow-Origin" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff" and "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(server, "/", "PUT", b"x")[0] == ask(server, "/", "DELETE")[0] == 501
    assert ask(server, "/", "POST", b"x")[0] == 405


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few hundred kB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(bytes(3751) * 30_000)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_dropped_files_that_are_no_pictures(server):
    for body, status, text in ((b"", 413, "at most 32 MB"), (b"no picture", 400, "cannot be decoded"),
                               (bomb(), 400, "DecompressionBomb"), (b"%PDF-1.4", 400, "cannot be decoded")):
        answer = ask(server, "/like", "POST", body)
        assert answer[0] == status and text in answer[1].decode() and "Traceback" not in answer[1].decode()
    assert ask(server, "/like", "POST", b"x", Content_Length=str(2**25 + 1))[0] == 413
    assert ask(server, "/like", "POST", b"x", Content_Length="-1")[0] == 413
    assert ask(server, "/like", "POST", b"x", Content_Length="x")[0] == 400


def test_ten_megabytes_of_header_and_half_requests(server):
    for start in (b"GET / HTTP/1.1\r\nX: ", b"GET /", b""):
        with socket.create_connection(server.server_address, timeout=20) as connection:
            try:
                connection.sendall(start + b"a" * 10**7 + b"\r\n\r\n")
                said = connection.recv(1000)
            except ConnectionError:
                said = b""
            assert not said or said.split(b" ")[1] in (b"400", b"414", b"431")
    assert ask(server, "/status")[0] == 200


def test_other_machines_need_the_token(photos, tmp_path):
    server = start(photos, tmp_path, "0.0.0.0", grown=False)
    try:
        assert len(server.token) > 20
        for path in ("/", "/status", "/thumb/1", "/?token=", "/?token=wrong", "/?token=%E7%8C%AB"):
            assert ask(server, path)[0] == 401, path
        assert ask(server, "/status", Cookie="token=wrong; a=b")[0] == 401
        status, _, headers = ask(server, f"/?token={server.token}")
        assert status == 200 and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
        assert ask(server, "/status", Cookie=f"a=b; token={server.token}")[0] == 200
        assert ask(server, "/status", Cookie=f"token={server.token}", Host="evil.example")[0] == 421
    finally:
        server.shutdown()


# ------------------------------------------------------------------------------------------------------------
# the page in a browser


@pytest.fixture
def browser(tmp_path):
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path / "profile")
    yield browser
    errors = [event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"]
    browser.close()
    assert not errors, errors


HITS, FIRST = "document.querySelectorAll('.hit').length", "document.querySelector('.hit')?.title"


def test_the_page(server, photos, browser):
    page = "http://127.0.0.1:{}/".format(server.server_address[1])
    browser.open(page)
    browser.wait(f"{HITS} >= 60")  # it fills at once
    browser.wait("[...document.querySelectorAll('.hit img')].slice(0, 12).every(it => it.naturalWidth)")
    browser.wait("document.activeElement.id == 'q'")

    before = browser.js(FIRST)
    browser.type("一只猫")  # it answers while one types
    browser.wait(f"{FIRST} != {json.dumps(before)} && document.querySelector('.hit span').textContent.includes('0.')")
    assert browser.js(FIRST) == hits(server, "q=%E4%B8%80%E5%8F%AA%E7%8C%AB")["hits"][0]["path"]

    for _ in range(20):  # it scrolls to the end
        browser.js("scrollTo(0, document.body.scrollHeight)")
        browser.js("new Promise(done => setTimeout(done, 150))")
    browser.wait(f"scrollTo(0, document.body.scrollHeight), {HITS} == 162")
    titles = browser.js("[...document.querySelectorAll('.hit')].map(it => it.title)")
    assert len(set(titles)) == 162 and any(title.endswith(EVIL) for title in titles)
    assert browser.js("document.title") == "zhclip"  # the name that is HTML was only text

    browser.js("document.querySelectorAll('.hit')[5].click()")  # the whole picture, and more like it
    browser.wait("document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth >= 30")
    browser.key("ArrowRight")
    browser.wait(f"document.querySelector('#about').textContent.includes({json.dumps(titles[6])})")
    browser.js("document.getElementById('more').click()")
    browser.wait(f"{FIRST} == {json.dumps(titles[6])}")
    assert browser.js("document.getElementById('q').value").startswith("#")

    browser.js("document.activeElement.blur()")
    browser.key("/")
    browser.wait("document.activeElement.id == 'q' && q.value.indexOf('/') < 0")
    browser.key("Escape")
    browser.wait("q.value == '' && document.querySelector('.hit span').textContent.indexOf('0.') < 0")
    browser.key("ArrowDown")
    browser.wait("document.activeElement.className == 'hit'")

    data = list((photos / "9.png").read_bytes())  # dropped on the page
    browser.js(f"""(() => {{ const carried = new DataTransfer()
        carried.items.add(new File([new Uint8Array({data})], "9.png", {{ type: "image/png" }}))
        document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer: carried, bubbles: true, cancelable: true }})) }})()""")
    browser.wait(f"{FIRST}?.endsWith('/9.png')")

    browser.js(f"folder.value = {json.dumps(str(photos / '海边'))}; folder.oninput()")
    browser.wait(f"{HITS} == 10")
    browser.js("folder.value = ''; q.value = ''; words.value = '猫\\n狗'; words.oninput()")
    browser.wait("document.querySelectorAll('.bar').length == 3 && document.querySelector('.hit span').textContent.match('猫|狗')")
    counts = [int(it) for it in browser.js("[...document.querySelectorAll('.bar span')].map(it => it.textContent)")]
    assert counts[0] == 162 == sum(counts[1:])
    browser.js("document.querySelectorAll('.bar')[2].click()")
    browser.wait(f"said.textContent.startsWith('{counts[2]} ')")

    browser.js("q.value = '猫 +'; q.oninput()")  # an error is a line, not a dead page
    browser.wait("said.className == 'wrong' && said.textContent.includes('a term is empty')")
    browser.js("q.value = '猫'; q.oninput()")
    browser.wait("said.className == ''")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(server, browser, width):
    browser.open("http://127.0.0.1:{}/".format(server.server_address[1]), width, 780, dark=True)
    browser.wait(f"{HITS} >= 60")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("q.getBoundingClientRect().width") > 200
    assert browser.js("getComputedStyle(document.body).colorScheme") == "light dark"


def test_pictures_appear_while_the_index_grows(photos, tmp_path, browser):
    server = start(photos, tmp_path, grown=False)
    try:
        browser.open("http://127.0.0.1:{}/".format(server.server_address[1]))
        assert browser.js(HITS) == 0
        server.grow()
        browser.wait(f"{HITS} >= 60")
    finally:
        server.shutdown()
