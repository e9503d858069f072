"""A Hugging Face hub of a few requests, on this machine: what is pushed to it lies in `repositories`."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "secret" * 5


class Hub:
    """repositories: name -> file -> bytes. `requests` holds (method, path, authorization)."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def _serve(self) -> None:
                body = self._body()
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                status, answer = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if self.command != "HEAD" else b"")

            do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                data = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        path, _, _ = path.partition("?")
        if path.startswith("/upload/"):  # as on the hub, an address that needs no token
            self.objects[path.removeprefix("/upload/")] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": f"Invalid credentials: {authorization}"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {})
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":  # the model card's front matter
            return (200, {"errors": [], "warnings": []}) if json.loads(body)["content"].startswith("---") else (400, {})
        name = next((known for known in self.repositories if f"/{known}" in path), None)
        if name is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            large = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return 200, {"files": large}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._upload_address(item) for item in json.loads(body)["objects"]],
            }
        if path.endswith("/commit/main"):
            return self._commit(name, body)
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": self.private[name], "tags": []}

    def _upload_address(self, item: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.url}/upload/{item['oid']}", "header": {}}}
        return {"oid": item["oid"], "size": item["size"], "authenticated": True, "actions": actions}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                if hashlib.sha256(data).hexdigest() != value["oid"]:
                    return 400, {"error": "the object is not what was promised"}
                self.repositories[name][value["path"]] = data
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}"}
