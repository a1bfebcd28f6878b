"""A hub on loopback, for tests: the endpoints that huggingface_hub and ModelScope's library ask when they download."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories are {id: {path: bytes}}, for data sets and models alike.

    `answer_with` (id -> HTTP status) makes a repository fail; `cut_after` breaks the line after so many bytes of a
    file, once for each entry; `requests` records (method, path, Range header).
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos, self.answer_with, self.cut_after, self.requests = repos, {}, [], []
        self.fail_first = 0  # so many file requests are answered with 503
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.respond(self, body=True)

            def do_HEAD(self):
                hub.respond(self, body=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def respond(self, request, body: bool) -> None:
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        address = urlsplit(request.path)
        path = unquote(address.path)
        repo = next((name for name in self.repos if f"/{name}/" in f"{path}/"), None)
        status = self.answer_with.get(repo, 404 if repo is None else 200)
        if status != 200:
            self.send(request, status, b'{"error": "as the test asked"}', body)
        elif "/api/v1/" in path:
            self.modelscope(request, path, repo, parse_qs(address.query), body)
        elif f"/{repo}/tree/" in path:
            self.send_json(request, [self.entry(repo, name) for name in self.repos[repo]])
        elif path.startswith("/api/"):
            siblings = [{"rfilename": e["path"], "size": e["size"], "lfs": e.get("lfs")}
                        for e in (self.entry(repo, name) for name in self.repos[repo])]  # fmt: skip
            self.send_json(request, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self.send_file(request, repo, path.partition(f"/resolve/{COMMIT}/")[2], body)

    def entry(self, repo: str, name: str) -> dict:
        """As a hub lists a file; .jsonl, .safetensors and .gz are kept as large files, with their SHA-256."""
        content = self.repos[repo][name]
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith((".jsonl", ".safetensors", ".gz")):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        return entry

    def modelscope(self, request, path: str, repo: str, query: dict, body: bool) -> None:
        if path.endswith(("/repo/tree", "/repo/files")):
            page = int(query.get("PageNumber", ["1"])[0])
            files = [{"Path": n, "Name": n, "Type": "blob", "Size": len(c), "Sha256": hashlib.sha256(c).hexdigest()}
                     for n, c in self.repos[repo].items()] if page == 1 else []  # fmt: skip
            data = {"Files": files, "TotalCount": len(self.repos[repo])}
            self.send_json(request, {"Code": 200, "Success": True, "Data": data, "TotalCount": len(self.repos[repo])})
        elif "FilePath" in query:
            self.send_file(request, repo, query["FilePath"][0], body)
        else:
            self.send_json(request, {"Code": 200, "Success": True, "Data": {"Id": 1, "Name": repo}})

    def send_json(self, request, content) -> None:
        self.send(request, 200, json.dumps(content).encode(), True, {"Content-Type": "application/json"})

    def send_file(self, request, repo: str, name: str, body: bool) -> None:
        if body and self.fail_first:
            self.fail_first -= 1
            return self.send(request, 503, b"busy", body)
        if name not in self.repos[repo]:
            return self.send(request, 404, b"no such file", body, {"X-Error-Code": "EntryNotFound"})
        content, entry = self.repos[repo][name], self.entry(repo, name)
        headers = {"ETag": f'"{entry.get("lfs", {}).get("sha256") or entry["oid"]}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}  # fmt: skip
        asked, status = request.headers.get("Range"), 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            last = int(last) if last else len(content) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        self.send(request, status, content, body, headers)

    def send(self, request, status: int, content: bytes, body: bool, headers: dict = {}) -> None:
        request.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream"} | headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        is_file = "ETag" in headers
        if body and is_file and self.cut_after and len(content) > self.cut_after[0]:
            request.wfile.write(content[: self.cut_after.pop(0)])
            request.close_connection = True
            request.connection.close()
        elif body:
            request.wfile.write(content)
