"""JSON as it leaves the gateway, which passes on whatever an LLM said."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi.responses import JSONResponse


def json_text(value: Any) -> str:
    """JSON of ``value`` that UTF-8 can hold, also of what neither has a form for.

    Half a surrogate pair leaves as it came, as an escape; NaN and infinity become null, as
    JavaScript has it.
    """
    try:
        text = _dumps(value, ensure_ascii=False)
        text.encode()
    except ValueError:
        return _dumps(_finite(value), ensure_ascii=True)
    return text


def _dumps(value: Any, ensure_ascii: bool) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class Json(JSONResponse):
    """A reply by `json_text`."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_text(content).encode()
