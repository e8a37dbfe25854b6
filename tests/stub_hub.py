"""The part of the hub's HTTP API that a push uses, on a socket: whoami, model info, create, preupload, commit; every
file in the commit itself, where the hub would ask for large ones apart."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubHub:
    """Repositories of one user, `me`."""

    def __init__(self):
        self.token, self.broken = "hf_test", False
        self.created: list[dict] = []
        self.existing: dict[str, bool] = {}
        """Repositories, and whether they are private."""
        self.files: dict[str, bytes] = {}

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, body):
        """(status, JSON)."""
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.created.append({"name": wanted["name"], "private": private})
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.existing:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.existing[name] = private
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path.endswith("/commit/main") and not self.broken:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {
                "commitUrl": f"{self.address}/me/mine/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        if "/tree/" in path:
            return 200, []
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.startswith("/api/models/") and method == "GET" and name in self.existing:
            return 200, {"id": name, "private": self.existing[name], "siblings": [], "sha": "0" * 40, "tags": []}
        return (403 if path.endswith("/commit/main") else 404), {"error": "no"}


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub

    def log_message(self, *_):
        pass

    def _reply(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            status, answer = 401, {"error": "Invalid token"}
        else:
            status, answer = self.hub.answer(self.command, self.path.partition("?")[0], body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _chunks(self):
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    do_GET = do_POST = do_PUT = _reply
