"""A model by its name on the hub: a small server speaks the hub's protocol, its own client downloads."""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.paths import ROOT
from tests.support.patience import finish
from tests.support.runs import save_tiny_model
from unlearn_ds.model.files import model_fingerprint

NAME, COMMIT = "owner/name", "a" * 40
CODE = f"""
from unlearn_ds.model.configs import ModelOptions, load_config
from unlearn_ds.model.files import model_fingerprint, model_folder
load_config(ModelOptions("{NAME}"))
print(model_fingerprint("{NAME}"), len(list(model_folder("{NAME}").glob("*.safetensors"))))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(the folder of the one model that is served, the server's address)."""
    folder = save_tiny_model(tmp_path / "model")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = sorted(folder.iterdir())
            if path.startswith(f"/{NAME}/resolve/"):
                file = folder / path.rsplit("/", 1)[1]
                self.reply(file.read_bytes() if file.exists() else None)
            elif "/tree/" in path:
                entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                self.reply(json.dumps(entries).encode())
            else:
                info = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
                self.reply(json.dumps(info).encode())

        def reply(self, content: bytes | None) -> None:
            self.send_response(200 if content is not None else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_weights_are_there_before_anything_depends_on_them(hub: tuple[Path, str], tmp_path: Path) -> None:
    """Else the first run would take the model for another one than the second, and caches of the two would not meet."""
    folder, address = hub
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    finished = finish([sys.executable, "-c", CODE], ROOT, os.environ | settings)
    assert finished.returncode == 0, finished.stderr[-3000:]
    fingerprint, count = finished.stdout.split()[-2:]
    assert fingerprint == model_fingerprint(str(folder))
    assert int(count) == len(list(folder.glob("*.safetensors"))) > 1
