"""The YAML that settings are written in, in files, ``--set`` and environment variables."""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's, but for what it has of YAML 1.1 alone, and for keys that stand twice.

    Dates, times and ``on``, ``off``, ``yes`` and ``no`` are text, which is what settings want: a
    switch takes those words too, and ``retriever.gpu: on`` is no truth value.
    """

    def construct_yaml_int(self, node: Any) -> Any:
        """Without base 60, in which 24:00:00 is 86400."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        """As an int."""
        return node.value if ":" in node.value else super().construct_yaml_float(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    problem = f"the key {key.value!r} stands here for a second time"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                known.add((key.tag, key.value))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, known) for tag, known in rules if tag not in (f"{_TAG}bool", f"{_TAG}timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)


def parse(text: str) -> Any:
    """The document in ``text``. Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, _Loader)  # as safe as SafeLoader, which it is
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets as many
        raise yaml.YAMLError(str(error)) from error
