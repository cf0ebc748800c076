"""A stand-in for the Hugging Face hub: the HTTP requests of a push, on loopback, answered from memory.

Input: the requests of huggingface_hub's own client (repositories, branches, pre-upload, LFS batch, PUT, commit).
Output: `repos[name]`, with the requested visibility and, per branch, the bytes of every file as they arrived. LFS
objects are kept under the SHA-256 of the bytes that arrived, so a commit with another hash does not find them.
Example: after `rmcore push DIR me/rm`, `repos["me/rm"]["branches"]["main"]["config.json"]` has the bytes of the file.

Written from the requests of huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py).
"""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Serves on a free port of the loopback; `address` is for HF_ENDPOINT. `refuse`: paths answered with 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.refuse: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        body = self._body()
        name = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() == name:
            self.server.objects[name] = body
        self._answer(200, {})

    def do_GET(self) -> None:
        self._route(b"")

    def do_POST(self) -> None:
        self._route(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(self, body: bytes) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.seen.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path.startswith(self.server.refuse or "no path"):
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            owner, name, what, *rest = [*path.removeprefix("/api/models/").split("/"), "", ""]
            repo = self.server.repos.get(f"{owner}/{name}")
            if repo is None:
                self._answer(404, {"error": "Repository not found"})
            else:
                self._repository(f"{owner}/{name}", repo, what, "/".join(rest).rstrip("/"), body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        made = name not in self.server.repos
        if made:
            self.server.repos[name] = {"private": asked.get("private"), "asked": asked, "branches": {"main": {}}}
        self._answer(200 if made else 409, {"url": f"{self.server.address}/{name}", "error": "exists", "id": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/put/{one['oid']}", "header": {}}}}
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _repository(self, name: str, repo: dict[str, Any], what: str, branch: str, body: bytes) -> None:
        branches = repo["branches"]
        if what == "branch":
            made = branch not in branches
            branches.setdefault(branch, {})
            self._answer(200 if made else 409, {"error": "Reference already exists"})
        elif what == "preupload":
            asked = json.loads(body)["files"]
            large = (".safetensors", "tokenizer.json")  # as .gitattributes of the hub's new repositories say
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            self._answer(200, {"files": modes})
        elif what == "commit":
            for line in body.decode().splitlines():
                self._apply(branches[branch], json.loads(line))
            commit = hashlib.sha1(body).hexdigest()
            self._answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self._answer(200, {"id": name, "sha": "0" * 40, "siblings": [], "private": repo["private"]})

    def _apply(self, files: dict[str, bytes], line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = self.server.objects[value["oid"]]
