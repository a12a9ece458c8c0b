"""Clients of a gateway that asks for keys."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

from memshare.pool.keys import KeyRing


class Caller:
    """A client with a key of these rights."""

    def __init__(self, client: TestClient, principal: str, *limits: int, **rights: str) -> None:
        named = {pool.replace("every", "*"): what.split() for pool, what in rights.items()}
        app: Any = client.app
        ring = KeyRing(app.state.gateway.shared.store.database)
        made = ring.create(principal, named, *limits)  # type: ignore[arg-type]
        self.key, self.secret = made
        self.client = client

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.secret}", **more.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **more)

    def add(self, pool: str, prompt: str, **more: Any) -> Any:
        items = [{"pool": pool, "prompt": prompt, "answer": f"of {prompt}"}]
        return self("POST", "/v1/memories", json={"items": items, **more})

    def search(self, pool: str, query: str) -> Any:
        body = {"pool": pool, "query": query, "k": 50}
        return self("POST", "/v1/memories/search", json=body)

    def chat(self, **memory: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "memory": memory}
        return self("POST", "/v1/chat/completions", json=body)
