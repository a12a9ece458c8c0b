"""Building blocks of the pocket world's texts, and the names by which its groups are known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task: how it is asked for, and the parts that hidden ways are made of."""

    name: str
    asks: tuple[str, ...]
    openings: tuple[str, ...]
    middles: tuple[str, ...]
    closings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """One of the paper's three domains: three kinds that share subjects and scenes."""

    name: str
    kinds: tuple[Kind, ...]
    subjects: tuple[str, ...]
    scenes: tuple[str, ...]


EMBLEMS = (
    "heron", "otter", "thistle", "acorn", "badger", "magpie", "salmon", "hollyhock", "hedgehog",
    "falcon", "juniper", "lobster", "bramble", "squirrel", "dragonfly", "poppy", "walrus",
    "cricket",
)  # fmt: skip
FOUNDERS = (
    "Tamsin", "Osric", "Wilhelmina", "Barnaby", "Isolde", "Casimir", "Philippa", "Leopold",
    "Ottilie", "Ambrose", "Rosalind", "Gideon", "Henrietta", "Tobias", "Cordelia", "Erasmus",
    "Beatrix", "Valentin",
)  # fmt: skip
PLACES = (
    "Fenwick Lock", "Candle Row", "Upper Marsh", "Gallows Hill", "Saint Brannock", "Long Meadow",
    "Pepper Lane", "Black Quarry", "Windy Corner", "Abbot's Ford", "Herring Dock", "Moss End",
    "Silver Street", "Cold Harbour", "Tanner's Yard", "North Steps", "Willow Bend", "Three Wells",
)  # fmt: skip
BADGES = (
    "green cord", "yellow gloves", "crimson sash", "white cockade", "indigo apron", "striped hood",
    "bronze buckle", "scarlet garters", "orange kerchief", "purple cap", "black lace",
    "checked shawl", "pewter pin", "turquoise beads", "felt slippers", "golden tassel",
    "linen collar", "coral brooch",
)  # fmt: skip

# Every group has one alias of each sort; a sort's frame is shared by all groups.
ALIAS_SORTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the house of the {}", EMBLEMS),
    ("old {}'s people", FOUNDERS),
    ("the folk from {}", PLACES),
    ("those who wear the {}", BADGES),
)
