"""``memshare generations|trainings push``, as a user runs it, against a local server: the hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from memshare.config import Config
from memshare.retrieval.encoder import Encoder
from memshare.training.export import export
from memshare.training.outcome import write_result
from tests.retrieving import fill, make_config, open_store, publish_now
from tests.tiny import tiny_encoder

ROOT = Path(__file__).parents[3]


class Hub:
    """Takes what a push sends: a repository, and one commit whose files travel inside it."""

    def __init__(self) -> None:
        self.refuse: int | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.made: list[dict[str, Any]] = []
        self.message = ""
        self.files: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((self.path, self.headers.get("authorization")))
                status, told = outer.answer(self.path, body)
                data = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuse is not None:
            return self.refuse, {"error": "no"}
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.url}/org/model"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/org/model/preupload/main":
            names = [item["path"] for item in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": name, **plain} for name in names]}
        if path == "/api/models/org/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.message = line["value"]["summary"]
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            return 200, {"commitUrl": f"{self.url}/org/model/commit/abc", "commitOid": "abc"}
        return 404, {"error": f"unknown {path}"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run folder with two generations."""
    folder = tmp_path_factory.mktemp("push")
    made = make_config(folder / "run", tiny_encoder(folder / "tiny"))
    encoder = Encoder.from_folder(folder / "tiny", device="cpu")
    with open_store(made) as store:
        fill(store, "p", 6)
        publish_now(store, made, encoder)
        publish_now(store, made, encoder, parent=1)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": str(made.run.dir)}}))
    return made


def push(
    config: Config, url: str, *more: str, token: str | None = "hf_token"
) -> subprocess.CompletedProcess[str]:
    folder = config.run.dir.parent
    words = ["generations", "push", "main", "org/model", "--config", str(folder / "config.yaml")]
    return command(folder, url, *words, *more, token=token)


def command(
    folder: Path, url: str, *words: str, token: str | None = "hf_token"
) -> subprocess.CompletedProcess[str]:
    hidden = ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(
        [sys.executable, "-m", "memshare.cli", *words],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip


def encoder_folder(config: Config, number: int) -> Path:
    return config.retriever_dir / f"{number:06d}" / "encoder"


def on_disk(config: Config, number: int) -> dict[str, bytes]:
    return files_in(encoder_folder(config, number))


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_encoder_is_pushed_and_nothing_else(config: Config, hub: Hub) -> None:
    done = push(config, hub.url, "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/model/commit/abc" in done.stdout
    assert hub.files == on_disk(config, 2)
    assert "README.md" in hub.files and "model.safetensors" in hub.files
    assert hub.message == "Generation 2 of retriever main"
    assert [(item["name"], item["visibility"]) for item in hub.made] == [("model", "private")]
    assert {token for path, token in hub.asked if "models" in path} == {"Bearer hf_token"}


def test_an_earlier_generation_can_be_pushed(config: Config, hub: Hub) -> None:
    done = push(config, hub.url, "--number", "1")
    assert done.returncode == 0, done.stderr
    assert hub.files == on_disk(config, 1) and hub.message.startswith("Generation 1")
    assert "visibility" not in hub.made[0]  # the owner's default


def test_a_dry_run_shows_all_and_asks_nobody(config: Config, hub: Hub) -> None:
    done = push(config, hub.url, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert (encoder_folder(config, 2) / "README.md").read_text() in done.stdout
    assert all(f" {name}\n" in done.stdout for name in on_disk(config, 2))
    assert "index.faiss" not in done.stdout and "ids.npy" not in done.stdout
    assert hub.asked == []


@pytest.mark.parametrize(("status", "said"), [(401, "not accepted"), (403, "may not write")])
def test_a_refused_token_is_told(config: Config, hub: Hub, status: int, said: str) -> None:
    hub.refuse = status
    done = push(config, hub.url)
    assert done.returncode == 2 and done.stdout == ""
    assert str(status) in done.stderr and said in done.stderr and "HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_token_is_told_before_anything_is_sent(config: Config, hub: Hub) -> None:
    done = push(config, hub.url, token=None)
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and hub.asked == []


def test_an_unreachable_hub_is_told(config: Config) -> None:
    done = push(config, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "http://127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr


def test_what_is_not_there_or_not_whole_is_not_pushed(config: Config, hub: Hub) -> None:
    done = push(config, hub.url, "--number", "7")
    assert done.returncode == 2 and "no generation 7" in done.stderr
    card = encoder_folder(config, 1) / "README.md"
    whole = card.read_text()
    card.write_text(whole.replace("encoder", "decoder"))
    try:
        done = push(config, hub.url, "--number", "1")
    finally:
        card.write_text(whole)
    assert done.returncode == 2 and "encoder/README.md" in done.stderr
    assert hub.asked == []


def test_a_trainings_encoder_is_pushed(tmp_path: Path, hub: Hub) -> None:
    output = tmp_path / "banking"
    words = ("trainings", "push", str(output), "org/model")
    done = command(tmp_path, hub.url, *words)
    assert done.returncode == 2 and "no training has ended well" in done.stderr
    output.mkdir()
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    export(encoder, output / "encoder", {"base_model": "tiny"})
    write_result(output, "stopped")
    done = command(tmp_path, hub.url, *words)
    assert done.returncode == 2 and "(stopped)" in done.stderr and hub.asked == []
    write_result(output, "trained")
    done = command(tmp_path, hub.url, *words, "--dry-run", token=None)
    assert done.returncode == 0 and "README.md\n" in done.stdout and hub.asked == []
    done = command(tmp_path, hub.url, *words)
    assert done.returncode == 0, done.stderr
    assert f"files pushed: {hub.url}/org/model/commit/abc" in done.stdout
    assert hub.files == files_in(output / "encoder") and "model.safetensors" in hub.files
    assert hub.message == "Encoder of training banking"
