"""A hub on this machine: as much of the Hugging Face protocol as creating, uploading and fetching a model takes."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    files: dict[str, dict[str, bytes]]  # by repository

    def log_message(self, *args):
        pass

    def _send(self, body, status=200, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            row = json.loads(body)
            repo = f"{row.get('organization') or 'me'}/{row['name']}"
            self.files.setdefault(repo, {})
            self._send({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            rows = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._send({"files": [{"path": row["path"], **regular} for row in rows]})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.files[repo][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self._send(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:
            self._send({"error": f"what is {path}?"}, 404)

    def do_GET(self):
        path = self.path.split("?")[0]
        parts = path.strip("/").split("/")
        if path.startswith("/api/models/"):
            repo = "/".join(parts[2:4])
            if repo not in self.files:
                self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}.items())
                return
            listing = [{"rfilename": name} for name in self.files[repo]]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.files[repo].items()]  # fmt: skip
            found = {"id": repo, "sha": COMMIT, "siblings": listing, "tags": [], "private": False}
            self._send(tree if "tree" in parts else found)
        elif "resolve" in parts:
            data = self.files["/".join(parts[:2])].get("/".join(parts[4:]))
            if data is None:
                self._send({}, 404, {"X-Error-Code": "EntryNotFound"}.items())
            else:
                self._send(data, headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}.items())
        else:
            self._send({"error": f"what is {path}?"}, 404)

    do_HEAD = do_GET  # noqa: N815 - http.server's name


@contextmanager
def hub():
    """The address of a hub, and what it holds: repository -> file -> bytes."""
    files = {}
    handler = type("Standin", (Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
