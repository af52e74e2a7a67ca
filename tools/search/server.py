"""
The page: one HTML file and a small server for it, on this machine alone unless --host says otherwise.

A picture is named by its number in the index, never by a path. Requests under the name of another host are
refused, because a foreign site could let its name point here, and so are those that the page of another site
makes. Other machines need the token that the server prints. Nothing is sent elsewhere.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import mimetypes
import os
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from common import UserError
from eval import encode_images
from sources.augment import as_rgb
from sources.pairs import decode, read_picture, upright
from tools.search.index import shown
from tools.search.query import Search, remember

UPLOAD, MOST = 2**25, 200  # bytes of a picture that is dropped on the page, hits in an answer
BY_BROWSERS = {f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "bmp", "avif")}
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy": "default-src 'none'; img-src "
    "'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"}


class Refused(UserError):
    """A request that gets another status than 400: Refused(status, text)."""


class Server(ThreadingHTTPServer):
    """What the threads of all requests share."""

    def __init__(self, search: Search, host: str, port: int, least: float):
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror}; try another --port") from None
        self.search, self.least, self.stale, self.stopping = search, least, False, False
        is_loopback = ipaddress.ip_address(self.server_address[0]).is_loopback
        self.token = "" if is_loopback else secrets.token_urlsafe(16)
        self.status = dict(done=0, total=0, seconds=0, line="")

    def grow(self):
        """Index what is new, while others search."""
        started = time.monotonic()

        def progress(done: int, total: int):
            if self.stopping:
                raise UserError("stopped; the same command goes on")
            self.status |= dict(done=done, total=total, seconds=time.monotonic() - started)
            self.stale = True
        try:
            line = self.search.index.update(self.search.clip, self.search.roots, progress)
        except UserError as error:
            line = str(error)
        self.status |= dict(line=line, done=self.status["total"])
        print(line, flush=True)

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
            answer = self.answer(url.path, asked)
            if isinstance(answer, dict):
                answer = "application/json", json.dumps(answer).encode()
            kind, body = answer
        except (ValueError, LookupError, ArithmeticError) as error:  # UserError is a ValueError
            status = error.args[0] if isinstance(error, Refused) else 400
            kind, body = "text/plain", str(error.args[-1]).encode(errors="replace")
            self.close_connection = True  # what was refused may still be coming
        is_image = kind.startswith("image/")
        self.send_response(status)
        for name, value in (HEADERS | cookie | {
                "Content-Type": kind if is_image else f"{kind}; charset=utf-8", "Content-Length": len(body),
                "Cache-Control": "private, max-age=600" if is_image else "no-store"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass

    def check(self, path: str, token: str) -> dict[str, str]:
        """Refused if the caller may not ask -> the cookie that lets a new browser in."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            ipaddress.ip_address((urlsplit(f"//{host}").hostname or "").replace("localhost", "127.0.0.1"))
        except ValueError:
            raise Refused(421, f"{host!r} is no name of this server; use its address in numbers") from None
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if path != "/" and (foreign or origin and urlsplit(origin).netloc != host):
            raise Refused(403, "only its own page may ask this server")
        own = f"token={self.server.token}"
        if self.server.token and hmac.compare_digest(f"token={token}".encode(), own.encode()):
            return {"Set-Cookie": f"{own}; HttpOnly; SameSite=Strict; Path=/"}
        if self.server.token and not any(hmac.compare_digest(one.strip().encode(), own.encode())
                                         for one in self.headers.get("Cookie", "").split(";")):
            raise Refused(401, "open the address that the server printed, with its token")
        return {}

    def answer(self, path: str, asked: dict[str, str]) -> dict | tuple[str, bytes]:
        """-> what becomes JSON, or (media type, body)."""
        server, search = self.server, self.server.search
        _, what, *number = path.split("/")
        if (self.command == "POST") != (path == "/like"):
            raise Refused(405, "expected GET, and POST for /like alone")
        if path == "/like":
            return {"term": self.like()}
        if what in ("thumb", "picture"):
            return self.picture(what, int(number[0]))
        if path == "/":
            with open(os.path.join(os.path.dirname(__file__), "page.html"), "rb") as page:
                return "text/html", page.read()
        if path == "/status":
            return server.status
        if path not in ("/search", "/labels"):
            raise Refused(404, "not found")
        words = tuple(filter(None, map(str.strip, asked.get("words", "").splitlines())))
        start, count = max(0, int(asked.get("start", 0))), min(int(asked.get("count", 60)), MOST)
        with search.lock:
            if server.stale and not start:  # not while somebody scrolls
                server.stale = False
                search.refresh()
            best, _ = search.best_word(words) if words else ([], [])
            if path == "/labels":
                return {"counts": best.bincount(minlength=len(words)).tolist() if words else []}
            narrow = {name: asked.get(name, "") for name in ("folder", "since", "until")}
            narrow |= {"words": words, "word": int(asked.get("word", -1))}
            ranking = search.ranking(asked.get("q", ""), **narrow)
            hits = ranking.first(start + count)[start:]
        return {"total": ranking.total, "hits": [{
            "number": hit.number, "path": shown(hit.path), "date": hit.date, "alike": hit.alike,
            "cosine": hit.score if ranking.by_cosine else None, "match": hit.score >= server.least > -1,
            "word": words[best[hit.file]] if words else ""} for hit in hits]}

    def picture(self, what: str, number: int) -> tuple[str, bytes]:
        """A picture of the index, small or whole; as a JPEG if browsers do not show its format."""
        path, row = self.server.search.index.path(number)
        if path is None:
            raise Refused(404, "not in the index, or gone")
        if what == "thumb":
            return "image/jpeg", self.server.search.index.thumb(path, row)
        content, kind = read_picture(path), mimetypes.guess_type(shown(path))[0]
        if kind not in BY_BROWSERS:
            image = as_rgb(upright(decode(content, shown(path))))
            image.save(jpeg := io.BytesIO(), "JPEG", quality=90)
            kind, content = "image/jpeg", jpeg.getvalue()
        return kind, content

    def like(self) -> str:
        """Encode the picture in the body -> its term."""
        size = int(self.headers.get("Content-Length", 0))
        if not 0 < size <= UPLOAD:
            raise Refused(413, f"expected a picture of at most {UPLOAD >> 20} MB")
        image, search = upright(decode(self.rfile.read(size), "what was dropped")), self.server.search
        term = f"#{secrets.token_hex(3)}x"  # no number of the index
        with search.lock:
            remember(search.dropped, term, lambda: encode_images(search.clip, lambda _: image, 1)[0])
        return term


def serve(search: Search, host: str, port: int, least: float):
    """Until Ctrl-C. least: the cosine from which a picture is marked."""
    server = Server(search, host, port, least)
    address = "http://{}:{}/".format(*server.server_address) + f"?token={server.token}" * bool(server.token)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    grower = threading.Thread(target=server.grow)
    grower.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.stopping = True  # then the thread keeps what it has encoded
    grower.join()
