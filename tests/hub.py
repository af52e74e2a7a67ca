"""A local server in the place of Hugging Face, which can cut, lie and forget."""

import hashlib
import http.server
import random
import threading

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME, FILE = "ViT-B-16", "clip_cn_vit-b-16.pt"
PATH = f"/OFA-Sys/chinese-clip-vit-base-patch16/resolve/main/{FILE}"


class Hub(http.server.ThreadingHTTPServer):
    """Serves CONTENT as Hugging Face does: an answer with X-Linked-ETag that redirects to where the bytes
    are."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True  # does it know Range?
        self.etag = f'"{SHA256}"'
        self.cuts = []  # bytes after which the next answers end
        self.statuses = []  # of the next answers, instead of a file
        self.requests = []  # (path, Range) of those that came
        self.length = True  # does it say Content-Length?
        self.wrong_range = False
        self.content_type = "application/octet-stream"
        self.stall = 0  # seconds without a byte, once
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()  # sees in 10 ms that it shall end

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub: Hub = self.server
        asked = self.headers.get("Range")
        hub.requests.append((self.path, asked))
        if hub.statuses:
            return self.answer(hub.statuses.pop(0), {"Content-Length": "0"})
        if self.path == PATH:
            etag = {"X-Linked-ETag": hub.etag} if hub.etag else {}
            return self.answer(302, {"Location": "/bytes", "Content-Length": "0"} | etag)
        if self.path != "/bytes" and not self.path.endswith(".pt"):
            return self.answer(404, {"Content-Length": "0"})
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and hub.ranges else 0
        if start >= len(CONTENT):
            return self.answer(416, {"Content-Range": f"bytes */{len(CONTENT)}", "Content-Length": "0"})
        headers = {"Content-Length": str(len(CONTENT) - start)} if hub.length else {"Connection": "close"}
        if asked and hub.ranges:
            first = start - 1 if hub.wrong_range else start
            headers["Content-Range"] = f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"
        headers["Content-Type"] = hub.content_type
        self.answer(206 if asked and hub.ranges else 200, headers)
        stall, hub.stall = hub.stall, 0
        threading.Event().wait(stall)
        cut = hub.cuts.pop(0) if hub.cuts else len(CONTENT)
        self.wfile.write(CONTENT[start : start + cut])
        self.close_connection = True
        return None

    def answer(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass
