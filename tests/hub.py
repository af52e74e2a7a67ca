"""A local server in the place of Hugging Face and ModelScope, which can cut, lie and forget."""

import hashlib
import http.server
import json
import random
import re
import threading
import urllib.parse

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME, FILE = "ViT-B-16", "clip_cn_vit-b-16.pt"
PATH = f"/OFA-Sys/chinese-clip-vit-base-patch16/resolve/main/{FILE}"


class Hub(http.server.ThreadingHTTPServer):
    """Serves files as Hugging Face does: an answer with X-Linked-ETag that redirects to where the bytes are;
    and as ModelScope does: the bytes at once, and SHA-256 in a list."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {PATH: CONTENT}  # path on Hugging Face -> bytes; every .pt that is none of them is CONTENT
        self.ranges = True  # does it know Range?
        self.etag = None  # instead of the SHA-256
        self.cuts = []  # bytes after which the next answers end, those to a question for one byte left out
        self.statuses = []  # of the next answers, instead of a file
        self.down = ()  # of "huggingface" and "modelscope", which always answer 503
        self.requests = []  # (path, Range) of those that came, those for one byte left out
        self.tokens = []  # (path, Authorization) of those that had one
        self.length = True  # does it say Content-Length?
        self.wrong_range = False
        self.short = 0  # bytes that the next answer has less than it says in Content-Range
        self.elsewhere = False  # are the bytes on a host of another name?
        self.content_type = "application/octet-stream"
        self.stall = 0  # seconds without a byte, once
        self.delay = 0  # seconds before each answer
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()  # sees in 10 ms that it shall end

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, path: str, content: bytes):
        """path: owner/name/file or datasets/owner/name/file"""
        repository, file = path.rsplit("/", 1)
        self.files[f"/{repository}/resolve/main/{file}"] = content


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub: Hub = self.server
        threading.Event().wait(hub.delay)
        asked, path = self.headers.get("Range"), urllib.parse.unquote(self.path)
        if asked != "bytes=0-0":
            hub.requests.append((self.path, asked))
        if token := self.headers.get("Authorization"):
            hub.tokens.append((self.path, token))
        if hub.statuses:
            return self.answer(hub.statuses.pop(0), {"Content-Length": "0"})
        host = "modelscope" if path.startswith("/api/v1/models/") else "huggingface"
        if host in hub.down:
            return self.answer(503, {"Content-Length": "0"})
        if listed := re.fullmatch(r"/api/v1/models/AI-ModelScope/([^/]+)/repo/files\?Revision=master", path):
            start = f"/OFA-Sys/{listed[1]}/resolve/main/"
            files = [{"Path": name.removeprefix(start), "Sha256": (hub.etag or hashlib.sha256(content).hexdigest()).strip('"')}
                     for name, content in hub.files.items() if name.startswith(start)]
            body = json.dumps({"Data": {"Files": files}}).encode()
            self.answer(200, {"Content-Length": str(len(body))})
            return self.wfile.write(body)
        if path in hub.files:
            etag = f'"{hashlib.sha256(hub.files[path]).hexdigest()}"' if hub.etag is None else hub.etag
            host = hub.endpoint.replace("127.0.0.1", "localhost") if hub.elsewhere else ""
            return self.answer(302, {"Location": f"{host}/bytes{self.path}", "Content-Length": "0"}
                               | ({"X-Linked-ETag": etag} if etag else {}))
        if one := re.fullmatch(r"/api/v1/models/AI-ModelScope/(.+)/repo\?Revision=master&FilePath=(.+)", path):
            path = f"/bytes/OFA-Sys/{one[1]}/resolve/main/{one[2]}"
        content = hub.files.get(path.removeprefix("/bytes"), CONTENT if path.endswith(".pt") else None)
        if content is None:
            return self.answer(404, {"Content-Length": "0"})
        return self.send(hub, content, asked)

    def send(self, hub: Hub, content: bytes, asked: str | None):
        start, stop = 0, len(content)
        if asked and hub.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        if start >= len(content):
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
        said = stop
        if stop - start > 1:
            stop, hub.short = stop - hub.short, 0
        headers = {"Content-Length": str(stop - start)} if hub.length else {"Connection": "close"}
        if asked and hub.ranges:
            wrong = hub.wrong_range and start
            headers["Content-Range"] = f"bytes {start - 1 if wrong else start}-{said - 1}/{len(content)}"
        headers["Content-Type"] = hub.content_type
        self.answer(206 if asked and hub.ranges else 200, headers)
        if stop - start > 1 or not hub.ranges:
            stall, hub.stall = hub.stall, 0
            threading.Event().wait(stall)
            stop = min(stop, start + (hub.cuts.pop(0) if hub.cuts and asked != "bytes=0-0" else stop))
        try:
            self.wfile.write(content[start:stop])
        except OSError:  # whoever asked has heard enough
            pass
        self.close_connection = True
        return None

    def answer(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass
