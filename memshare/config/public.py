"""A configuration as it may be shown: all of it but passwords, tokens and keys.

API keys are no settings (`LLMConfig.api_key_env` names a variable), but secrets get into URLs, into
what is passed to vLLM's server, and into its environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from memshare.config.llm import VLLMServerConfig

HIDDEN = "***"
_NAMES = r"(?:pass(?:word|wd|phrase)|secret|token|credentials?|auth|(?:api)?key)"
_USER_INFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^:/@\s]*)(?P<rest>\S*)@", re.I)
_PARAMETER = re.compile(rf"([?&;][\w.-]*{_NAMES}=)[^&;\s#]*", re.I)
_FLAG = re.compile(rf"--(?:[\w.]+[-_.])*{_NAMES}", re.I)


def public(config: BaseModel) -> dict[str, Any]:
    """Every setting of a section or the whole tree, in plain types; secrets are ``***``.

    Hidden are passwords in URLs (of HTTP ones the user as well, which may be a token), parameters
    of URLs that are named like secrets, vLLM's flags of such names, and its environment's values.
    """
    if isinstance(config, VLLMServerConfig):
        hidden = {"args": _flags(config.args), "env": dict.fromkeys(config.env, HIDDEN)}
        config = config.model_copy(update=hidden)
    return {name: _plain(getattr(config, name)) for name in type(config).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return public(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_secrets(str(value))


def shown_command(args: Sequence[str]) -> str:
    """A command line without what `public` hides: of its URLs, and of flags named like secrets."""
    return without_secrets(" ".join(_flags(args)))


def without_secrets(text: str) -> str:
    """``text``, such as a command line, without what `public` hides of URLs in it."""
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER_INFO.sub(_bare, text))


def _bare(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"]
    if scheme.lower() in ("http", "https"):
        return f"{scheme}://{HIDDEN}@"
    return f"{scheme}://{user}:{HIDDEN}@" if found["rest"] else found[0]


def _flags(args: Sequence[str]) -> tuple[str, ...]:
    """Arguments of a command line without the values of flags that are named like secrets."""
    shown: list[str] = []
    secret = False
    for arg in args:
        name, equals, _ = arg.partition("=")
        if arg.startswith("--"):
            named = _FLAG.fullmatch(name) is not None
            secret = named and not equals
            shown.append(f"{name}={HIDDEN}" if named and equals else arg)
        else:  # a flag may take several
            shown.append(HIDDEN if secret else arg)
    return tuple(shown)
