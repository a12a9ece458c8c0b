"""JSON as it leaves the gateway, which passes on whatever an LLM said."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi.responses import JSONResponse


def json_bytes(value: Any) -> bytes:
    """JSON of ``value`` in UTF-8, also of what neither has a form for.

    Half a surrogate pair leaves as it came, as an escape; NaN and infinity become null, as
    JavaScript has it.
    """
    try:
        return _dumps(value, ensure_ascii=False)
    except ValueError:
        return _dumps(_finite(value), ensure_ascii=True)


def _dumps(value: Any, ensure_ascii: bool) -> bytes:
    text = json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class Json(JSONResponse):
    """A reply by `json_bytes`."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_bytes(content)
