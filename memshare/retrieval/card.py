"""The model card of an encoder's folder: what Hugging Face's hub shows of it, as ``README.md``.

It says how to load the encoder, what it was trained on and how it did, in names and figures; no
text of any memory goes into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from memshare.retrieval.encoder_folder import hub_name
from memshare.retrieval.manifest import Manifest
from memshare.version import __version__, commit

if TYPE_CHECKING:
    from memshare.retrieval.encoder import Encoder

CARD = "README.md"
_OURS = "memshare"  # the tag that tells our cards from those that came with a model
_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", _OURS]
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~])")
RIVALS = (("this one", "next"), ("the one that served before", "current"), ("BM25", "bm25"))


def base_model(name: str) -> str | None:
    """The hub name of the model that encoder ``name`` goes back to; None where nobody knows.

    A folder goes back to what its card says, if it is a card of ours.
    """
    if not Path(name).expanduser().is_dir():
        return hub_name(name)
    base = _our_card(name).get("base_model")
    return base if isinstance(base, str) else None


def _our_card(name: str) -> dict[str, Any]:
    """What the card of ours in folder ``name`` says in front; nothing where there is none."""
    try:
        known = metadata_load(Path(name).expanduser() / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return known if _OURS in (known.get("tags") or ()) else {}


def model_card(
    encoder: Encoder, metrics: Mapping[str, Any], manifest: Manifest | None = None
) -> str:
    """The card's text.

    ``metrics`` is what a generation's metrics.json says; of it ``base_model``, ``gate`` and
    ``training`` (the ``result.json`` of the training run) are told where they are there.
    ``manifest``: of the generation that the encoder is published in.
    """
    from jinja2 import Environment

    front_matter = ModelCardData(
        base_model=metrics.get("base_model"),
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=list(_TAGS),
    )
    training = metrics.get("training")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["md"] = lambda text: _MARKUP.sub(r"\\\1", str(text))
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    source = resources.files("memshare.retrieval").joinpath("card.md").read_text("utf-8")
    text: str = environment.from_string(source).render(
        front_matter=front_matter.to_yaml().strip(),
        base_model=metrics.get("base_model"),
        version=__version__,
        commit=commit(),
        dimension=encoder.dim,
        pooling=encoder.pooling,
        max_length=encoder.max_length,
        query_prefix=encoder.query_prefix,
        memory_prefix=encoder.memory_prefix,
        two_towers=encoder.two_towers,
        manifest=manifest,
        gate=metrics.get("gate"),
        rivals=RIVALS,
        training=training,
        trained_before=bool(training and _our_card(training["encoder"])),
        settings=yaml.safe_dump(training["settings"], sort_keys=False).strip() if training else "",
    )
    return text
