"""What is raised about an encoder; here, so that whoever handles it need not load torch."""

from __future__ import annotations


class EncoderError(RuntimeError):
    """An encoder that can't be found, read or used; the message says what to do."""
