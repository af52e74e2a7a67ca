"""
The page: one HTML file and a small server for it, on this machine alone unless --host says otherwise.

A picture is named by its number in the index, never by a path, and only those below the command's folders are
served. Requests under the name of another host are refused (DNS rebinding), and so are those that the page of
another site makes. Other machines need the token that the server prints. Nothing is sent elsewhere.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import torch
from PIL import Image

from common import UserError
from sources.augment import as_rgb
from sources.pairs import decode, read_picture, upright
from tools.search.index import shown
from tools.search.query import Search

UPLOAD, MOST = 2**25, 200  # bytes of a picture that is dropped on the page, hits in an answer
BY_BROWSERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy": "default-src 'none'; img-src "
    "'self' data:; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


class Refused(UserError):
    """A request that gets another status than 400: Refused(status, text)."""


class Server(ThreadingHTTPServer):
    """What the threads of all requests share."""

    def __init__(self, search: Search, host: str, port: int, least: float):
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror}; try another --port") from None
        self.search, self.least, self.stopping = search, least, False
        self.stale, self.fresh_until = False, 0.0
        is_loopback = ipaddress.ip_address(self.server_address[0]).is_loopback
        self.token = "" if is_loopback else secrets.token_urlsafe(16)
        self.status = dict(done=0, total=0, seconds=0, line="")

    def grow(self):
        """Index what is new, while others search."""
        started = time.monotonic()

        def progress(done: int, total: int):
            if self.stopping and done < total:
                raise UserError("stopped; the same command goes on")
            self.status |= dict(done=done, total=total, seconds=time.monotonic() - started)
            self.stale = True
        try:
            line = self.search.index.update(self.search.clip, progress)
        except Exception as error:  # whatever it is, searching goes on
            line = str(error)
        self.status |= dict(line=line, total=self.status["done"])
        print(line, flush=True)

    def refresh(self):
        """Look at what is new, but spend at most a tenth of the time on it."""
        started = time.monotonic()
        if self.stale and started > self.fresh_until:
            self.stale = False
            self.search.refresh()
            self.fresh_until = time.monotonic() + 10 * (time.monotonic() - started)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # else a browser went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection. http.server itself bounds lines and headers."""

    protocol_version, timeout = "HTTP/1.1", 30

    def do_GET(self):
        status, cookie = 200, {}
        try:
            url = urlsplit(self.path)
            asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
            cookie = self.check(url.path, asked.get("token", ""))
            kind, body = self.answer(url.path, asked)
        except (ValueError, LookupError, ArithmeticError) as error:  # UserError is a ValueError
            status = error.args[0] if isinstance(error, Refused) else 400
            text = str(error.args[-1]) if isinstance(error, UserError) else "a request without a meaning"
            kind, body = "text/plain", text.encode(errors="replace")
            self.close_connection = True  # what was refused may still be coming
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (HEADERS | cookie | {"Content-Length": len(body), "Content-Type": (
                kind if kind.startswith("image/") else f"{kind}; charset=utf-8")}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass

    def check(self, path: str, token: str) -> dict[str, str]:
        """Refused if the caller may not ask -> the cookie that lets its browser ask again."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            ipaddress.ip_address((urlsplit(f"//{host}").hostname or "").replace("localhost", "127.0.0.1"))
        except ValueError:
            raise Refused(421, f"{host!r} is no name of this server; use its address in numbers") from None
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if path != "/" and (foreign or origin and urlsplit(origin).netloc != host):
            raise Refused(403, "only its own page may ask this server")
        found = re.search(r"(?:^|;\s*)token=([\w-]+)", self.headers.get("Cookie", ""))
        own, given = self.server.token, token or (found[1] if found else "")
        if own and not hmac.compare_digest(given.encode(), own.encode()):
            raise Refused(401, "open the address that the server printed, with its token")
        return {"Set-Cookie": f"token={own}; HttpOnly; SameSite=Strict; Path=/"} if own else {}

    def answer(self, path: str, asked: dict[str, str]) -> tuple[str, dict | bytes]:
        """-> (media type, body)."""
        server, search = self.server, self.server.search
        _, what, *number = path.split("/")
        if (self.command == "POST") != (path == "/like"):
            raise Refused(405, "expected GET, and POST for /like alone")
        if what in ("thumb", "picture"):
            return self.picture(what, int(number[0]))
        if path == "/like":
            return "application/json", {"term": self.like()}
        if path == "/status":
            return "application/json", server.status
        if path == "/":
            with open(os.path.join(os.path.dirname(__file__), "page.html"), "rb") as page:
                return "text/html", page.read()
        if path != "/search":
            raise Refused(404, "not found")
        words = tuple(filter(None, map(str.strip, asked.get("words", "").splitlines())))
        start, count = max(0, int(asked.get("start", 0))), min(int(asked.get("count", 60)), MOST)
        with search.lock:
            if not start:  # not while somebody scrolls
                server.refresh()
            ranking = search.ranking(*(asked.get(name, "") for name in ("q", "folder", "since", "until")),
                                     words, int(asked.get("word", -1)))
            best = search.best_word(words)[1] if words else torch.zeros(0, dtype=torch.long)  # [N]
            hits = ranking.first(start + count)[start:]
        return "application/json", {
            "total": ranking.total, "counts": best.bincount(minlength=len(words)).tolist(), "hits": [{
                "number": hit.number, "path": shown(hit.path), "date": hit.date, "alike": len(hit.alike),
                "twins": hit.alike[:50], "cosine": hit.score if ranking.by_cosine else None,
                "match": ranking.by_text and hit.score >= server.least,
                "word": words[best[hit.file]] if words else ""} for hit in hits]}

    def picture(self, what: str, number: int) -> tuple[str, bytes]:
        """A picture of the index, small or whole; as a JPEG if browsers do not show its format."""
        index = self.server.search.index
        if (path := index.path(number)) is None:
            raise Refused(404, "not in the index, or gone")
        if what == "thumb":
            return "image/jpeg", index.thumb(path)
        image = decode(content := read_picture(os.fsdecode(path)), shown(path))
        if image.format in BY_BROWSERS:
            return Image.MIME[image.format], content
        as_rgb(upright(image)).save(jpeg := io.BytesIO(), "JPEG", quality=90)
        return "image/jpeg", jpeg.getvalue()

    def like(self) -> str:
        """Encode the picture in the body -> its term."""
        size = int(self.headers.get("Content-Length", 0))
        if not 0 < size <= UPLOAD:
            raise Refused(413, f"expected a picture of at most {UPLOAD >> 20} MB")
        image = decode(self.rfile.read(size), "what was dropped")
        with self.server.search.lock:
            return self.server.search.drop(image)


def serve(search: Search, host: str, port: int, least: float):
    """Until Ctrl-C. least: the cosine from which a picture that a text finds is marked. UserError if the port
    is taken."""
    server = Server(search, host, port, least)
    host, port = server.server_address
    if host == "0.0.0.0":  # all of this machine's addresses: print the one by which others know it
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_way:
            any_way.connect(("192.0.2.1", 9))  # asks for the way there, and sends nothing
            host, _ = any_way.getsockname()
    secret = f"?token={server.token}" * bool(server.token)
    print(f"http://{host}:{port}/{secret}  (Ctrl-C ends it)", flush=True)
    grower = threading.Thread(target=server.grow)
    grower.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.stopping = True  # then the thread ends after the pictures that it is encoding
    grower.join()
