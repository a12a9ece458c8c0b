"""Step 6 of the loop, its second half: a new generation, and the gate before it.

    python train/index.py --config FILE

encodes the pools with the encoder trained last, compares the result with the generation that serves
on held-out memories, and publishes it if it is not worse; serving processes swap it in by
themselves. A rejection, by the gate or because an index finds less than
``retriever.index.recall_floor``, is put on record in ``generations/<retriever>/rejected.jsonl`` and
is no error; the encoder that serves on then gets a new index, if much has come since its own was
made (alone: ``--refresh``). ``--encoder frozen --no-gate`` publishes a first generation of the
configured encoder. Under ``accelerate launch``, all processes encode; the first one does the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch  # before faiss

from memshare.config import Config, ConfigError, add_config_arguments, load_config, positive
from memshare.files import DiskFull, RunLocked, full_disk_told, run_lock, write_json
from memshare.llm.base import LLMError
from memshare.llm.rubric import RubricError
from memshare.pool.errors import PoolError, PoolUnavailable
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.blobs import PoorIndex
from memshare.retrieval.build import build_generation
from memshare.retrieval.canaries import CanaryError, read_canaries
from memshare.retrieval.card import base_model
from memshare.retrieval.divided import engage, serve
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.gate import GateResult
from memshare.retrieval.gate_run import gate_built
from memshare.retrieval.generation import current
from memshare.retrieval.manifest import GenerationError
from memshare.retrieval.publish import publish, record_rejection
from memshare.retrieval.published import published_before
from memshare.retrieval.refresh import refresh
from memshare.training.gate_report import report_gate
from memshare.training.gather import World, launch, leave
from memshare.training.mining_plan import split_memories
from memshare.training.outcome import DATABASE_AWAY, read_result, tell
from memshare.training.relevance import HeldOutRelevance
from memshare.training.rounds import latest_encoder
from memshare.training.split import SplitError

EXPECTED = (CanaryError, ConfigError, DiskFull, EncoderError, GenerationError, LLMError, PoolError,
            RubricError, RunLocked, SplitError)  # fmt: skip
FROZEN = "frozen"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build, judge and publish a generation.")
    add_config_arguments(parser)
    parser.add_argument(
        "--encoder", help="folder, or `frozen` for the configured one (default: trained last)"
    )
    parser.add_argument("--round", type=positive, help="continual round, for the record")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write what became of it here")
    parser.add_argument("--no-gate", action="store_true", help="publish without comparing")
    told = "only a new index for the encoder that serves, if much has come since its own"
    parser.add_argument("--refresh", action="store_true", help=told)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Build and publish; prints what became of it as JSON and returns the exit code."""
    args = arguments().parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        accelerator = launch()
    except ConfigError as error:
        return tell(error)
    world = World(accelerator.device)
    try:
        if not world.main:
            if not args.refresh:
                with PoolStore.open(config.url) as store:
                    serve(store, load_encoder(config, args.encoder, world)[1], world)
            return 0
        lock = run_lock(config.run.dir, "index")
        with full_disk_told(), lock, PoolStore.open(config.url) as store:
            if args.refresh:
                print(json.dumps({"generation": refresh(store, config)}), flush=True)
                return 0
            outcome = run(config, store, args, world)
            if args.result is not None:
                write_json(args.result, outcome)
            print(json.dumps(outcome, ensure_ascii=False), flush=True)
            if outcome["outcome"] == "rejected":
                try:
                    refresh(store, config)
                except (*EXPECTED, OSError, torch.OutOfMemoryError) as error:  # the round is over
                    log(f"the index of the current generation stays as it is: {error}")
    except EXPECTED as error:
        code = tell(error)
        if isinstance(error, PoolUnavailable) and args.result is not None:
            # accelerate makes every exit code but 0 a 1
            write_json(args.result, {"outcome": DATABASE_AWAY})
        return code
    finally:
        leave(accelerator, world)
    return 0


def run(config: Config, store: PoolStore, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Encode, judge, publish; what became of it as a dict. Of several processes, the first's."""
    home, pools = config.retriever_dir, config.served_pools
    if not args.no_gate and config.gate.canaries is not None:
        read_canaries(config.gate.canaries)  # a mistake there is found now, not after the encoding
    relevance = None if args.no_gate else HeldOutRelevance(config, store)
    for pool in pools:
        store.create_pool(pool, config.pools[pool].rubric, config.pools[pool].threshold)
    source, encoder = load_encoder(config, args.encoder, world)
    if (earlier := published_before(config, args.round, source, encoder)) is not None:
        engage(world, None)
        log(f"round {args.round}: generation {earlier['generation']} was published before")
        return earlier

    # 1. Encode every pool.
    begun = time.monotonic()
    built = build_generation(store, config, encoder, peers=world)
    build_seconds = time.monotonic() - begun
    log(f"{len(built.ids)} memories encoded in {build_seconds:.1f} s")

    # 2. Judge on the held-out memories.
    verdict = GateResult(True, "not asked for", 0)
    begun = time.monotonic()
    if relevance is not None:
        fates = split_memories(store, config)
        held_out = [
            memory
            for pool in pools
            for memory in store.iter(pool, until_seq=built.positions[pool])
            if fates.get(memory.id) == "held_out"
        ]
        verdict = gate_built(store, config, encoder, built, held_out, relevance)
    metrics: dict[str, Any] = {
        "gate": verdict.record(),
        "round": args.round,
        "encoder": source,
        "base_model": base_model(config.encoder.model if source == FROZEN else source),
        "training": training_of(source),
        "build_seconds": build_seconds,
        "gate_seconds": time.monotonic() - begun,
        "created": time.time(),
    }

    # 3. Publish, or put the rejection on record.
    generation = current(home)
    if verdict.passed:
        try:
            generation = publish(
                home, encoder=encoder, **built.parts(), metrics=metrics, parent=generation,
                keep=config.retriever.keep, best=verdict.best, index=config.retriever.index,
            )  # fmt: skip
        except PoorIndex as error:  # an error would end the loop, here again at every start
            verdict = replace(verdict, passed=False, reason=str(error))
            metrics["gate"] = verdict.record()
    if verdict.passed:
        log(f"published generation {generation} ({len(built.ids)} memories; {verdict.reason})")
    else:
        log(f"rejected, and the current generation serves on: {verdict.reason}")
        record_rejection(home / "rejected.jsonl", metrics)

    # 4. Tell the run of the training, where nothing waits for it any more.
    if not args.no_gate and metrics["training"] is not None:
        report_gate(Path(source).parent, metrics["training"], verdict, config.wandb)
    outcome = "published" if verdict.passed else "rejected"
    return {"outcome": outcome, "generation": generation, **metrics}


def load_encoder(config: Config, source: str | None, world: World) -> tuple[str, Encoder]:
    """The encoder that is asked for, on this process's device, and what it is called."""
    source = source or str(latest_encoder(config.run.dir))
    changes = {} if source == FROZEN else {"model": source}
    if world.size > 1:
        changes["device"] = str(world.device)
    return source, Encoder.load(config.encoder.model_copy(update=changes))


def training_of(source: str) -> dict[str, Any] | None:
    """What the training of an encoder's folder reported, for the record and the model card."""
    result = None if source == FROZEN else read_result(Path(source).parent)
    return result if result is not None and result["status"] == "trained" else None


if __name__ == "__main__":
    sys.exit(main())
