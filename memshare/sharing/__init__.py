"""One turn of the memory-sharing loop, and the parts it takes."""

from memshare.records import Pair
from memshare.sharing.assemble import assemble, open_shared, uses_scorer_llm
from memshare.sharing.shared import SharedMemory
from memshare.sharing.turn import Decision, Retrieved, Turn, prompt_hash

__all__ = [
    "Decision",
    "Pair",
    "Retrieved",
    "SharedMemory",
    "Turn",
    "assemble",
    "open_shared",
    "prompt_hash",
    "uses_scorer_llm",
]
