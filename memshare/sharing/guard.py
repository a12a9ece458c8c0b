"""What is looked at before a memory is written: who may write how much, and what looks wrong.

Three things that agents who share a pool do to it, on purpose or not: one of them fills it; one
writes text that is meant for a machine's eyes and not for a reader's; and all of them repeat what
they were shown. The first and the last have limits (`pool.limits`); the second is put on hold, for
a human to look at, where the pool asks for it (`pools.NAME.hold_suspicious`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from memshare.config import Config
from memshare.llm.neutralise import has_control_string
from memshare.llm.quoting import looks_like_fence, without_hidden
from memshare.pool.feedback import Standing
from memshare.pool.limits import Limits
from memshare.records import Memory, NewMemory
from memshare.sharing.near import NearDuplicates, Place
from memshare.training.split import grams, jaccard

# A flag of a country's part is a black flag, tag characters, and their end.
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")


class NotStored(Exception):
    """A limit of the pool refused a memory."""


@contextmanager
def placed(near: NearDuplicates, memory: NewMemory) -> Iterator[Place]:
    """`NearDuplicates.place`, but not for what is on hold: it isn't in the pool so far.

    `NotStored`, raised inside, ends the block; a near-duplicate that was there then stays there.
    """
    with suppress(NotStored):
        if memory.hold is not None:
            yield Place(memory)
        else:
            with near.place(memory) as place:
                yield place


class Guard:
    """The checks of all pools of a configuration."""

    def __init__(self, config: Config) -> None:
        """Pools that the configuration lacks have no limits."""
        self.limits = {
            name: Limits(
                settings.max_principal_share, settings.principal_floor, settings.max_copies
            )
            for name, settings in config.pools.items()
        }
        self._holding = {name for name, pool in config.pools.items() if pool.hold_suspicious}
        self._floors = {name: pool.hold_below for name, pool in config.pools.items()}
        self._near = config.split.near_duplicate

    def look_at(self, memory: NewMemory) -> NewMemory:
        """``memory``, on hold if its pool holds what is suspicious and it is.

        With all that a search shows of it: agents read that, over MCP for one.
        """
        if memory.pool not in self._holding:
            return memory
        beside = json.dumps([memory.model, dict(memory.metadata)], ensure_ascii=False)
        texts = (memory.prompt, memory.answer, beside)
        return replace(memory, hold=next(filter(None, map(suspicion, texts)), None))

    def sunk(self, pool: str, standing: Standing) -> str | None:
        """Why a memory of this standing is put on hold; None if it isn't."""
        floor = self._floors.get(pool)
        if floor is None or standing.value >= floor:
            return None
        return f"its standing is {standing.value:.2f} after {standing.votes} votes"

    def copied(self, answer: str, shown: Iterable[Memory]) -> str | None:
        """The id of the first memory ``shown`` whose answer ``answer`` repeats, nearly or wholly.

        By the measure that keeps near-duplicate questions on one side of the split: the Jaccard
        similarity of their word 3-grams; of short answers, all words.
        """
        own = grams(answer)
        for memory in shown:
            if jaccard(own, grams(memory.answer)) >= self._near:
                return memory.id
        return None


def suspicion(text: str) -> str | None:
    """What in ``text`` is written for a model and not for a reader; None: nothing that is known.

    It knows forms alone: control strings of chat formats, invisible characters, lines that pretend
    to close the scorer's quotation. It doesn't judge what words say.
    """
    if has_control_string(text):
        return "it has control strings of a chat format in it"
    if looks_like_fence(text):
        return "it imitates the lines around quoted text in the scorer's prompt"
    if not text.isascii():
        bare = _FLAG.sub("", text)
        if without_hidden(bare) != bare:
            return "it has invisible characters in it"
    return None
