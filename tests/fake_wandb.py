"""A W&B service for tests: answers as far as a run needs, keeps what it was sent, can fall silent.

What cloud and SDK say to each other is no public interface; this is what wandb 0.31 asks for.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"id": "UA==", "name": "memshare", "entity": {"id": "RQ==", "name": "me"}}


class FakeWandb(ThreadingHTTPServer):
    """``received``: everything it was sent; once ``silent`` it takes connections and says nothing.

    ``opened`` counts runs, ``history`` are the rows of figures that one was sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.received: list[bytes] = []
        self.opened = 0
        self.history: list[dict[str, Any]] = []
        self.silent = threading.Event()
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.silent.is_set():
            self.server.over.wait()
            return
        self.server.received.append(body)
        if self.path.endswith("/file_stream"):
            sent = json.loads(body).get("files") or {}
            rows = sent.get("wandb-history.jsonl", {"content": []})["content"]
            self.server.history += map(json.loads, rows)
        answer = json.dumps(self._graphql(body) if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _any

    def _graphql(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        assert found is not None
        data: dict[str, Any] = {}
        if found[1] == "UpsertBucket":
            self.server.opened += 1
            run = {"id": "QQ==", "name": asked["variables"]["name"], "project": _PROJECT}
            data = {"upsertBucket": {"bucket": {**run, "config": "{}"}, "inserted": True}}
        elif found[1] == "RunResumeStatus":
            data = {"model": {**_PROJECT, "bucket": self._bucket()}}
        elif found[1] == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/files/{name}"}
                     for name in asked["variables"]["files"]]  # fmt: skip
            data = {"createRunFiles": {"runID": "QQ==", "uploadHeaders": [], "files": files}}
        return {"data": data}

    def _bucket(self) -> dict[str, Any] | None:
        """What is known of a run that is continued."""
        if not self.server.history:
            return None
        last = {"_step": self.server.history[-1]["_step"], "_runtime": 1}
        known = {"summaryMetrics": json.dumps(last), "historyTail": json.dumps([json.dumps(last)])}
        counts = {"historyLineCount": len(self.server.history), "eventsLineCount": 0}
        names = {"id": "QQ==", "name": "a1", "displayName": "a1", "config": "{}", "tags": []}
        rest = {"logLineCount": 0, "wandbConfig": '{"t": 1}', "eventsTail": "[]"}
        return {**names, **known, **counts, **rest}

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    server = FakeWandb()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
