"""A TCP proxy on this machine that a test can cut: nothing passes, and nobody is told."""

from __future__ import annotations

import selectors
import socket
import threading
from types import TracebackType

_BLOCK = 1 << 16


class Proxy:
    """Forwards to ``127.0.0.1:target``. While cut, connections stay open and bytes wait or go."""

    def __init__(self, target: int) -> None:
        """Listen on a free port, `port`."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._ends: list[socket.socket] = []
        self._closed = False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Proxy:
        """Start forwarding."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every connection."""
        self._closed = True
        self._whole.set()
        self._thread.join()

    def cut(self) -> None:
        """From now on nothing is forwarded and no connection accepted; none is closed either."""
        self._whole.clear()

    def mend(self) -> None:
        """Forward again, what waited first."""
        self._whole.set()

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(timeout=0.05):
                    self._whole.wait()
                    if key.data is None:
                        self._accept(selector)
                    else:
                        self._forward(selector, key.fileobj, key.data)
                self._whole.wait()
            for end in self._ends:
                end.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # the server is down: so is this end
            near.close()
            return
        self._ends += [near, far]
        selector.register(near, selectors.EVENT_READ, far)
        selector.register(far, selectors.EVENT_READ, near)

    def _forward(
        self, selector: selectors.BaseSelector, source: object, target: socket.socket
    ) -> None:
        assert isinstance(source, socket.socket)
        try:
            block = source.recv(_BLOCK)
            if block:
                target.sendall(block)
                return
        except OSError:
            pass
        for end in (source, target):
            if end.fileno() >= 0 and end in {key.fileobj for key in selector.get_map().values()}:
                selector.unregister(end)
            end.close()
