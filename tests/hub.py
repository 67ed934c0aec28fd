"""A stand-in for the Hub on the loopback interface: serves folders as repositories, and remembers what passes."""

import base64
import contextlib
import functools
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from safetensors.torch import load_file, save_file

import tiny

COMMIT = "c" * 40
FILES = "/{repo_id}/resolve/{revision}/{filename}"


class Hub:
    """Repositories in `folder`: models/OWNER/NAME and datasets/OWNER/NAME.

    Attributes:
        url: what HF_ENDPOINT has to be.
        fetched: the files that were downloaded, as OWNER/NAME/FILE.
        created: repositories that were made here, or are to be here already, and whether they are private.
        uploaded: the files that were committed, by their names in the repository.
        tokens: what requests to upload were signed with.
        stumbles: how many of the next requests fail.
        gated: repositories, as OWNER/NAME, whose licence nobody has accepted.
        environment: variables that lead the commands here, and nowhere else.
    """

    def __init__(self, folder: Path, port: int):
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.fetched: list[str] = []
        self.created: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.stumbles = 0
        self.gated: set[str] = set()
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def with_places(self) -> list[str]:
        """The uploaded files that name a place on this machine: an absolute path, anywhere in their bytes."""
        roots = "|".join(["home", "root", "tmp", "usr", "var", "opt", "mnt", "Users", tempfile.gettempdir().strip("/")])
        return [name for name, content in self.uploaded.items() if re.search(rf"/({roots})/".encode(), content)]

    def files_of(self, repository: str) -> list[str]:
        """What was downloaded of a repository, in its own names."""
        return sorted({name.removeprefix(f"{repository}/") for name in self.fetched if name.startswith(repository)})


class Handler(BaseHTTPRequestHandler):
    """As much of the Hub's API as finding, downloading and uploading files needs."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, hub: Hub):
        self.hub = hub
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.stumbles:
            self.hub.stumbles -= 1
            return self.answer({"error": "try again"}, 503)
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        if file := re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
            if file[2] in self.hub.gated:
                return self.answer({"error": "Access is restricted"}, 401, {"X-Error-Code": "GatedRepo"})
            return self.send_file(file[1] or "models/", file[2], file[3])
        found = re.fullmatch(r"api/(models|datasets)/([\w.-]+/[\w.-]+)(/revision/[^/]+)?(/tree/[^/]+(/.*)?)?", path)
        if found and found[2] in self.hub.created and not found[4]:
            return self.answer({"id": found[2], "sha": COMMIT, "private": self.hub.created[found[2]], "siblings": []})
        if not found or not (root := self.hub.folder / found[1] / found[2]).is_dir():
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found[4]:
            return self.send_tree(root, (found[5] or "").strip("/"), "true" in str(parse_qs(url.query)).lower())
        names = [{"rfilename": str(file.relative_to(root))} for file in _files(root)]
        about = {"id": found[2], "sha": COMMIT, "siblings": names, "tags": [], "private": False, "gated": False}
        return self.answer(about | {"lastModified": "2025-01-01T00:00:00.000Z", "downloads": 1, "likes": 1})

    def do_POST(self) -> None:
        body = self.body().decode()
        if taken := self.take(body):
            self.hub.tokens.add(self.headers.get("Authorization"))
            return self.answer(taken)
        found = re.fullmatch(r"api/(models|datasets)/([\w.-]+/[\w.-]+)/paths-info/[^/]+", unquote(self.path).strip("/"))
        if not found:
            return self.answer({}, 404)
        root = self.hub.folder / found[1] / found[2]
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        return self.answer([_entry(root, root / name) for name in asked if (root / name).exists()])

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def take(self, body: str) -> dict[str, Any] | None:
        """The answer to a step of an upload; None to another request."""
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.hub.created.setdefault(name, asked.get("visibility") == "private")
            return {"url": f"{self.hub.url}/{name}", "name": name}
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return {"files": kinds}
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.hub.url}/someone/it/commit/0", "commitOid": COMMIT, "success": True}
        return None

    def send_tree(self, root: Path, below: str, recursive: bool) -> None:
        if not (root / below).is_dir():
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        found = sorted((root / below).rglob("*") if recursive else (root / below).iterdir())
        return self.answer([_entry(root, path) for path in found])

    def send_file(self, kind: str, repository: str, name: str) -> None:
        file = self.hub.folder / kind / repository / name
        if not file.is_file():
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        if self.command == "GET":
            self.hub.fetched.append(f"{repository}/{name}")
        headers = {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers)
        return self.send(200, content, headers)

    def answer(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(values).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve the repositories in a folder."""
    hubs: list[Hub] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, hub=hubs[0])) as server:
        hubs.append(Hub(folder, server.server_port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hubs[0]
        server.shutdown()


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@functools.cache
def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "d" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": _hash(path), "size": path.stat().st_size}


def released(folder: Path, *, sdxl: bool = False) -> Path:
    """A tiny checkpoint with all that lies beside it where such models were released: the same weights many times."""
    tiny.checkpoint(folder, sdxl=sdxl)
    for file in sorted(folder.glob("*/*.safetensors")):
        weights = load_file(file)
        half = {name: tensor.half() for name, tensor in weights.items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        stem = file.stem.replace("model", "pytorch_model") if file.stem == "model" else file.stem
        torch.save(weights, file.with_name(f"{stem}.bin"))
        torch.save(half, file.with_name(f"{stem}.fp16.bin"))
        for name in ("flax_model.msgpack", "diffusion_flax_model.msgpack", "model.onnx", "openvino_model.bin"):
            (file.parent / name).write_text("another library's")
    for name in ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.non_ema.bin"):
        (folder / "unet" / name).write_text("weights before averaging")
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt", "v1-inference.yaml", "README.md"):
        (folder / name).write_text("not in diffusers' layout")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\nA card")
    if sdxl:
        return folder
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"feature_extractor_type": "CLIPFeature"}')
    (folder / "safety_checker").mkdir()
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (folder / "safety_checker" / name).write_text("{}")
    return folder
