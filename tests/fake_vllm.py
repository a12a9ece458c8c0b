"""A process that answers as vLLM does, without a model: for tests of what stands before it.

python tests/fake_vllm.py PORT MODEL [SECONDS]: each answer takes SECONDS. Every likelihood is
minus the token's id; every chat is answered by PORT.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model, seconds = "", 0.0

    def do_GET(self) -> None:
        card = {"id": self.model, "root": self.model, "max_model_len": 2048}
        self.answer({"data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = str(self.server.server_address[1])
        if body.get("stream"):
            self.stream(name)
            return
        time.sleep(self.seconds)
        if "messages" in body:
            message = {"role": "assistant", "content": name}
            self.answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            return
        rows = [[None, *({str(i): {"logprob": -i}} for i in ids[1:])] for ids in body["prompt"]]
        self.answer({"choices": [{"index": i, "prompt_logprobs": r} for i, r in enumerate(rows)]})

    def stream(self, name: str) -> None:
        """Headers at once, as vLLM does; the first words only when it is their turn."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.flush()
        time.sleep(self.seconds)
        for word in (name, "!"):
            event = {"choices": [{"index": 0, "delta": {"content": word}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def fake_python(path: Path, model: Path, after: Path = Path("/")) -> Path:
    """For ``server.python``: it starts this instead of vLLM, and says which GPUs it was given.

    Not before the file ``after`` is there.
    """
    find = 'while [ "$1" != --port ]; do shift; done; port=$2'
    told = 'echo "port $port, GPUs ${CUDA_VISIBLE_DEVICES-all}"'
    path.write_text(
        f"#!/bin/sh\n{find}\n{told}\nuntil [ -e {after} ]; do sleep 0.1; done\n"
        f'exec {sys.executable} {__file__} "$port" {model}\n'
    )
    path.chmod(0o755)
    return path


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # five by default: more at once are reset


def main(port: int, model: str, seconds: float = 0.0) -> None:
    Handler.model, Handler.seconds = model, seconds
    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:]))
