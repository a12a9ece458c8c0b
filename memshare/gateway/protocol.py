"""HTTP as uvicorn reads it, but for headers without end."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16  # about: what one read brings is looked at as a whole


class BoundedHeaders(HttpToolsProtocol):
    """A connection that ends where a request has too much beside its body.

    That is its line, headers, and what a chunked body has besides. httptools keeps all of it, and
    whoever sends it needs no key; the body has its bound in `StrictRequest`.
    """

    _beside = 0

    def data_received(self, data: bytes) -> None:
        """Read on; the callbacks begin the count anew."""
        self._beside += len(data)
        super().data_received(data)
        if self._beside <= MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(f"The request's headers have more than {MAX_HEAD_BYTES} bytes.")
        else:  # in the middle of an answer
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._beside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request's end."""
        self._beside = 0
        super().on_message_complete()
