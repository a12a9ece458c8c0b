"""A gateway's Python client, sync and async. Imports httpx and nothing heavier.

with memshare.Client("http://127.0.0.1:8000", key="ms-...") as client:
    client.add("main", "How do I boil an egg?", "Seven minutes in boiling water.")
    print(client.chat("How long does an egg take?", pool="main").text)
"""

from memshare.client.aio import AsyncClient
from memshare.client.errors import (
    AuthenticationError,
    ConflictError,
    ConnectionFailed,
    GatewayError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from memshare.client.replies import (
    AddResult,
    ChatChunk,
    ChatReply,
    Found,
    Generation,
    Generations,
    Memory,
    Page,
    Standing,
)
from memshare.client.sync import Client

__all__ = [
    "AddResult",
    "AsyncClient",
    "AuthenticationError",
    "ChatChunk",
    "ChatReply",
    "Client",
    "ConflictError",
    "ConnectionFailed",
    "Found",
    "GatewayError",
    "Generation",
    "Generations",
    "InvalidRequest",
    "Memory",
    "NotFound",
    "Overloaded",
    "Page",
    "PermissionDenied",
    "Standing",
    "Unavailable",
]
