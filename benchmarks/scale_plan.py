"""What memshare costs from 10^5 to 10^9 memories: the tables of docs/scale.md.

    python benchmarks/scale_plan.py            # prints them
    python benchmarks/scale_plan.py --write    # puts them into docs/scale.md

Nothing is measured here. Bytes and CPU seconds are the constants that were measured, on the machine
that their files name (``benchmarks/results/cpu/scale_constants.json``, ``scaling.json``). Seconds
on GPUs are arithmetic over `ASSUMED`: published figures of a card and assumed shares of them. They
are no measurements, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- benchmarks/scale_plan.py -->", "<!-- end -->"
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)

# Name: value, unit, where it comes from.
ASSUMED: dict[str, tuple[float, str, str]] = {
    "card_flops": (989e12, "FLOP/s", "H100 SXM, dense bf16, NVIDIA's data sheet"),
    "card_bandwidth": (3.35e12, "bytes/s", "H100 SXM, HBM3, NVIDIA's data sheet"),
    "card_bytes": (80e9, "bytes", "H100 SXM, NVIDIA's data sheet"),
    "index_share": (0.75, "of a card", "for rows; the rest is for the encoder and FAISS's scratch"),
    "encode_use": (0.30, "of the FLOP/s", "assumed: forward passes of a BERT, sorted by length"),
    "train_use": (0.25, "of the FLOP/s", "assumed"),
    "scorer_use": (0.35, "of the FLOP/s", "assumed: vLLM's prefill; logits not counted"),
    "scan_use": (0.60, "of the bandwidth", "assumed: a flat scan reads every row once a batch"),
    "encoder_weights": (86e6, "weights", "BERT-base without its embedding table"),
    "dimensions": (768, "a vector", "BERT-base"),
    "scorer_weights": (7e9, "weights", "a 7B scorer LM"),
    "memory_tokens": (55, "tokens", "as measured with; yours will differ, and all seconds with it"),
    "code_bytes": (96, "bytes", "IVF-PQ: 96 codes of 8 bits"),
    "new_share": (0.01, "of the pool", "new memories in one round"),
    "replay": (0.5, "a new memory", "mining.replay, its default"),
    "candidates": (24, "a query", "mining.candidates and dense_candidates, their defaults"),
    "texts": (5, "a query", "one positive, three hard negatives, the query itself"),
    "probed": (0.01, "of the lists", "IVF: share of the rows that a search reads"),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Constants of this project on one machine; seconds are of one core."""

    machine: str
    pool_bytes: float
    id_bytes: float
    example_bytes: float
    append: float
    read: float
    bm25_fit: float
    bm25_query: float  # a query and memory
    publish: float  # a byte
    encode: float  # a memory, all-MiniLM-L6-v2
    train: float  # a token, all-MiniLM-L6-v2

    @classmethod
    def load(cls, folder: Path = RESULTS) -> Measured:
        """From the committed reports."""
        constants = json.loads((folder / "scale_constants.json").read_text(encoding="utf-8"))
        scaling = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
        claims, rates = constants["claims"], scaling["rates_a_process"]
        one = {what: sorted(found["1"])[len(found["1"]) // 2] for what, found in rates.items()}
        return cls(
            machine=f"{constants['machine']['cpu']}, one core",
            pool_bytes=claims["pool_bytes_per_memory"],
            id_bytes=claims["id_bytes_per_memory"],
            example_bytes=claims["example_bytes_per_query"],
            append=claims["append_seconds_per_memory"],
            read=claims["read_seconds_per_memory"],
            bm25_fit=claims["bm25_fit_seconds_per_memory"],
            bm25_query=claims["bm25_seconds_per_query_and_memory"],
            publish=claims["publish_seconds_per_byte"],
            encode=1.0 / one["encode"],
            train=1.0 / one["train"],
        )


def assumed(name: str) -> float:
    """One value of `ASSUMED`."""
    return ASSUMED[name][0]


@dataclass(frozen=True)
class Plan:
    """What a pool of ``memories`` costs."""

    memories: int
    measured: Measured

    @property
    def new(self) -> float:
        """New memories of one round."""
        return self.memories * assumed("new_share")

    @property
    def mined(self) -> float:
        """Queries of one round: new memories, and earlier ones mined again."""
        return self.new * (1.0 + assumed("replay"))

    @property
    def flat_bytes(self) -> float:
        """Rows of a flat index in half precision."""
        return self.memories * assumed("dimensions") * 2.0

    @property
    def code_bytes(self) -> float:
        """Rows of an IVF-PQ index: codes and a position of 8 bytes."""
        return self.memories * (assumed("code_bytes") + 8.0)

    @property
    def kind(self) -> tuple[str, int, float]:
        """Which index fits; on how many cards; bytes that one search (or batch) reads of a card."""
        room = assumed("card_bytes") * assumed("index_share")
        if self.flat_bytes <= room:
            return "flat fp16, one card", 1, self.flat_bytes
        cards = math.ceil(self.flat_bytes / room)
        if cards <= 8:
            name = f"flat fp16 over {cards} cards, or IVF-PQ on one (neither is built in)"
            return name, cards, self.flat_bytes / cards
        cards = math.ceil(self.code_bytes / room)
        read = self.code_bytes / cards * assumed("probed")
        return (
            f"IVF-PQ over {cards} cards, or an external engine (neither is built in)",
            cards,
            read,
        )

    @property
    def search(self) -> float:
        """Seconds of one batch of searches on the cards, by memory bandwidth alone."""
        return self.kind[2] / (assumed("card_bandwidth") * assumed("scan_use"))

    @property
    def mining(self) -> float:
        """GPU seconds of one round's likelihoods: each candidate before each query, and none."""
        shown = 2.0 * assumed("memory_tokens")  # the candidate, and the query with its answer
        tokens = self.mined * (assumed("candidates") + 1.0) * shown
        flops = 2.0 * assumed("scorer_weights") * tokens
        return flops / (assumed("card_flops") * assumed("scorer_use"))

    @property
    def training(self) -> float:
        """GPU seconds of one epoch over a round's examples; GradCache encodes each text twice."""
        tokens = self.mined * assumed("texts") * assumed("memory_tokens")
        flops = 8.0 * assumed("encoder_weights") * tokens
        return flops / (assumed("card_flops") * assumed("train_use"))

    def encoding(self, memories: float) -> float:
        """GPU seconds of encoding so many memories."""
        flops = 2.0 * assumed("encoder_weights") * assumed("memory_tokens") * memories
        return flops / (assumed("card_flops") * assumed("encode_use"))

    @property
    def generation_bytes(self) -> float:
        """On disk, as it is written today: float32 rows and ids."""
        return self.memories * (assumed("dimensions") * 4.0 + self.measured.id_bytes)


def number(value: float) -> str:
    """Two digits that matter."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def size(value: float) -> str:
    """Bytes with a decimal prefix."""
    power = min(max(int(math.log10(value * 1.0005) // 3), 1), 5)
    return f"{number(value / 1000.0**power)} {['kB', 'MB', 'GB', 'TB', 'PB'][power - 1]}"


def span(seconds: float) -> str:
    """Seconds in the unit that suits."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2.0 * length:
            return f"{number(seconds / length)} {unit}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(seconds * 1000.0)} ms"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exponent(memories: int) -> str:
    """As 10^n."""
    return f"10^{round(math.log10(memories))}"


def tables(measured: Measured) -> str:
    """All tables, with what they rest on."""
    plans = [Plan(size, measured) for size in SIZES]
    names = ["", *(exponent(plan.memories) for plan in plans)]
    stored = [
        ["pool (SQLite; text)", *(size(plan.memories * measured.pool_bytes) for plan in plans)],
        ["examples of one round", *(size(plan.mined * measured.example_bytes) for plan in plans)],
        ["generation on disk (fp32)", *(size(plan.generation_bytes) for plan in plans)],
        [
            "ids in a searcher's memory",
            *(size(plan.memories * measured.id_bytes) for plan in plans),
        ],
        ["index rows, flat fp16", *(size(plan.flat_bytes) for plan in plans)],
        ["index rows, IVF-PQ", *(size(plan.code_bytes) for plan in plans)],
        ["index that fits", *(plan.kind[0] for plan in plans)],
    ]
    cpu = [
        ["append, new ones", *(span(p.new * measured.append) for p in plans)],
        ["read texts, all", *(span(p.memories * measured.read) for p in plans)],
        ["BM25: index, all", *(span(p.memories * measured.bm25_fit) for p in plans)],
        ["BM25: candidates, mined x all",
         *(span(p.mined * p.memories * measured.bm25_query) for p in plans)],
        ["encode by all-MiniLM-L6-v2, all", *(span(p.memories * measured.encode) for p in plans)],
        ["train all-MiniLM-L6-v2, mined",
         *(span(p.mined * assumed("texts") * assumed("memory_tokens") * measured.train)
           for p in plans)],
        ["write and hash a generation, all",
         *(span(p.generation_bytes * measured.publish) for p in plans)],
    ]  # fmt: skip
    gpu = [
        ["likelihoods by a 7B scorer, mined", *(span(plan.mining) for plan in plans)],
        ["training a BERT-base, mined", *(span(plan.training) for plan in plans)],
        ["encoding, shared towers: all", *(span(plan.encoding(plan.memories)) for plan in plans)],
        ["encoding, query-only: new ones", *(span(plan.encoding(plan.new)) for plan in plans)],
        ["one batch of searches, the index that fits", *(span(plan.search) for plan in plans)],
        ["cards for the index", *(str(plan.kind[1]) for plan in plans)],
        ["cards that do a round in an hour",
         *(str(math.ceil((p.mining + p.training + p.encoding(p.memories)) / 3600.0))
           for p in plans)],
    ]  # fmt: skip
    rests = [[name.replace("_", " "), f"{value:g}", unit, source]
             for name, (value, unit, source) in ASSUMED.items()]  # fmt: skip
    return "\n\n".join(
        [
            "**Bytes** (bytes a memory of pool, ids and examples measured)",
            table(names, stored),
            f"**CPU seconds of one round**, constants measured on {measured.machine}; divide by "
            "cores where the step is parallel (encoding, training)",
            table(names, cpu),
            "**GPU seconds of one round on one H100, calculated from the assumptions below, not "
            "measured**; divide by cards",
            table(names, gpu),
            "**Assumptions**",
            table(["what", "value", "unit", "source"], rests),
        ]
    )


def page_with(text: str, made: str) -> str:
    """A page with the part between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the tables: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> int:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/scale.md")
    args = parser.parse_args()
    made = tables(Measured.load())
    if args.write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
