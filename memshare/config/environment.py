"""Environment variables as settings: sections without regard to case, lists and null as in YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.sources.types import EnvNoneType

from memshare.config.document import parse

_NULL = frozenset({"null", "Null", "NULL", "~"})  # YAML's, but for nothing at all, which is text


class Environment(EnvSettingsSource):
    """pydantic's source, but for values that are no JSON, and for names that a user gave.

    Where keys are names (of pools, of LLMs), the ``trees`` of the other sources tell how one is
    spelled, whatever the case in the variable; else it is new, and spelled as there. ``unclear``
    has a line for each variable that fits two names.
    """

    def __init__(self, settings: type[BaseSettings], trees: Sequence[Mapping[str, Any]]) -> None:
        """Reads the environment."""
        super().__init__(settings, env_parse_none_str="null")
        self._trees = trees
        self.unclear: list[str] = []
        names = [name for name in os.environ if name.upper().startswith(self.env_prefix)]
        self._variables = {self._key(name): name for name in names}
        given = {key: os.environ[name] for key, name in self._variables.items()}
        self.env_vars = {
            key: EnvNoneType("null") if text in _NULL else text for key, text in given.items()
        }

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """As for ``--set``; what is no YAML stays text, which the check refuses with all else."""
        try:
            return parse(value)
        except yaml.YAMLError:
            return value

    def gave(self, location: Sequence[int | str], value: Any) -> str | None:
        """The variable that gave the setting at ``location`` this ``value``, if one did."""
        key = self._joined(location)
        given = self.env_vars.get(key)
        given = None if isinstance(given, EnvNoneType) else given
        return self._variables.get(key) if given == value else None

    def _joined(self, words: Sequence[int | str]) -> str:
        return self.env_prefix.lower() + (self.env_nested_delimiter or "").join(map(str, words))

    def _key(self, variable: str) -> str:
        """How ``variable`` is looked up: in lower case, but for names."""
        words: list[str] = []
        section: Any = self.settings_cls
        nodes: list[Any] = list(self._trees)
        for word in variable[len(self.env_prefix) :].split(self.env_nested_delimiter):
            nodes = [node for node in nodes if isinstance(node, Mapping)]
            if get_origin(section) is dict:
                near = {str(name) for node in nodes for name in node}
                near = {name for name in near if name.lower() == word.lower()}
                if word not in near and near:
                    if len(near) > 1:
                        self.unclear.append(f"{variable}: {' or '.join(sorted(near))}?")
                    word = min(near)
                section = get_args(section)[1]
            else:
                word = word.lower()
                field = getattr(section, "model_fields", {}).get(word)
                section = field and field.annotation
            nodes = [node.get(word) for node in nodes]
            words.append(word)
        return self._joined(words)
