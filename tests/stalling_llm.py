"""An LLM server that stalls: no answer is finished before the test lets it be."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from tests.fake_vllm import Handler, Server


class StallingLLM:
    """Takes every chat at once and says "to be"; a stream's first word comes before the stall."""

    def __init__(self, mute: bool = False) -> None:
        """Nothing listens until it is entered. ``mute``: no word comes before the stall."""
        self.go_on = threading.Event()
        self.taken = 0  # requests that have come
        self.left = 0  # those whose client closed the connection during the stall
        self._mute = mute
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[dict[str, Any]]:
        """Serve; what is given is the configuration of an LLM."""
        llm = self

        class Stalling(Handler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with llm._lock:
                    llm.taken += 1
                if body.get("stream"):
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream")
                    self.send_header("connection", "close")
                    self.end_headers()
                    if not llm._mute:
                        self.say({"content": "to "}, None)
                    if self.left_alone():
                        return
                    if llm._mute:
                        self.say({"content": "to "}, None)
                    self.say({"content": "be"}, None)
                    self.say({}, "stop")
                    self.wfile.write(b"data: [DONE]\n\n")
                elif not self.left_alone():
                    message = {"role": "assistant", "content": "to be"}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    self.answer({"choices": [choice]})

            def left_alone(self) -> bool:
                """Stall; whether the client has closed the connection meanwhile."""
                while not llm.go_on.wait(0.02):
                    readable, _, _ = select.select([self.connection], [], [], 0)
                    if readable and not self.connection.recv(1, socket.MSG_PEEK):
                        self.close_connection = True
                        with llm._lock:
                            llm.left += 1
                        return True
                return False

            def say(self, delta: dict[str, str], finish_reason: str | None) -> None:
                choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()

        server: ThreadingHTTPServer = Server(("127.0.0.1", 0), Stalling)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield {
                "backend": "openai", "model": "stalling", "retries": 0, "context_length": 2048,
                "url": f"http://127.0.0.1:{server.server_address[1]}",
            }  # fmt: skip
        finally:
            self.go_on.set()
            server.shutdown()
            thread.join()
            server.server_close()
