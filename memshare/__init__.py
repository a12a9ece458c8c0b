"""memshare: LLM agents share memories, and the retriever that finds them keeps learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memshare.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    """The clients, imported when they are first asked for: every command imports this package."""
    if name in ("AsyncClient", "Client"):
        import memshare.client

        return getattr(memshare.client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
