"""The pocket LMs in the user's cache: where they lie, and how they are built there.

The folder's name is a hash of the recipe and of the sources that decide the weights, so a changed
recipe is a new LM, and an old one is never mistaken for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.files import fsync_dir, write_json
from memshare.pocket.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM


# By the name that a configuration gives as an LLM's ``model``. The small one is a second model
# for agents that differ: a third as large, from other first weights and other reading.
RECIPES = {
    "pocket": Recipe(),
    "pocket-small": Recipe(seed=1, hidden_size=128, mlp_size=128),
}


class PocketLMMissing(RuntimeError):
    """The pocket LM of this recipe has not been built on this machine."""


def cache_dir() -> Path:
    """``$MEMSHARE_CACHE``, else ``$XDG_CACHE_HOME/memshare``, else ``~/.cache/memshare``."""
    if own := os.environ.get("MEMSHARE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "memshare"
    return Path.home() / ".cache" / "memshare"


def folder_of(recipe: Recipe) -> Path:
    """Where the LM of ``recipe`` lies, built or not."""
    return cache_dir() / "pocket-lm" / recipe.name()


def is_built(folder: Path) -> bool:
    """Whether ``folder`` holds a whole LM (it appears by one rename, its report written last)."""
    return (folder / "report.json").is_file()


def lm_folder(name: str = "pocket", build: bool = False) -> Path:
    """A pocket LM's Hugging Face folder; ``build``: train it first if it is not there.

    Raises `PocketLMMissing` when it isn't built and ``build`` is off, KeyError for a ``name`` that
    is none of `RECIPES`.
    """
    recipe = RECIPES[name]
    folder = folder_of(recipe)
    if is_built(folder):
        return folder
    if not build:
        raise PocketLMMissing(
            f"the LM {name} is not built ({folder} is missing): run "
            f"`python train/pocket_lm.py {name}`, which takes a few minutes, or name another model"
        )
    from memshare.pocket.fit import train  # imports torch

    with building(folder) as partial:
        if partial is not None:
            save(partial, recipe, *train(recipe))
    return folder


@contextmanager
def building(folder: Path) -> Iterator[Path | None]:
    """A fresh folder that becomes ``folder`` when the block ends well, and vanishes otherwise.

    One process builds at a time; one that had to wait for another finds the work done and gets
    None.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built(folder):
            yield None
            return
        for stale in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(stale)  # of a builder that was killed: we hold its lock
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield partial
            if folder.exists():  # left by something that was not this program
                shutil.rmtree(folder)
            partial.chmod(0o755)
            partial.rename(folder)
            fsync_dir(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def save(
    folder: Path,
    recipe: Recipe,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: dict[str, Any],
) -> dict[str, Any]:
    """Write model, tokenizer, greedy generation defaults, and the measured report, last."""
    from transformers import GenerationConfig

    from memshare.pocket.ability import measure

    model.eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "recipe": recipe.name(),
        "parameters": model.num_parameters(),
        "training": training,
        "ability": measure(model, tokenizer, recipe),
    }
    write_json(folder / "report.json", report)
    return report
