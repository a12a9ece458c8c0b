"""The whole loop on this machine: agents share memories, the retriever learns and is swapped in.

    python serve/demo.py --config configs/pocket.yaml

1. the pocket LMs that the configuration names are built, unless the user's cache has them;
2. seed memories fill the pool, and the untrained encoder becomes generation 1;
3. everything starts as in production (``serve/up.py``): gateway, agents' LLM, continual trainer;
4. agents ask a stream of questions; good answers become memories; rounds of training publish new
   generations, which are swapped in while the questions go on;
5. all stops, and held-out questions measure what was learned: a table, report.json, report.html.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memshare.config import Config, ConfigError, add_config_arguments, load_config
from memshare.evaluation import demo
from memshare.evaluation.report import Section, print_tables, write_report
from memshare.evaluation.traffic import Stream, Traffic
from memshare.files import RunLocked, run_lock, write_json
from memshare.gateway.readiness import state_of, url_of
from memshare.gateway.supervisor import Supervisor
from memshare.pocket.lm import RECIPES
from memshare.pocket.world import Splits, World, write_references
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import NewMemory
from memshare.retrieval.generation import current
from memshare.stopping import on_stop
from memshare.training.journal import Journal
from memshare.training.rounds import count_new

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0
STREAM_SECONDS = 1200.0  # a run that has not learned by then never will
RATE = 1.2  # problems a second
AGENTS = 4
SIZES = (220, 240, 48)  # seed memories, questions asked, questions held out


class DemoFailed(RuntimeError):
    """A part of the demo failed; the message says where to look."""


def words(args: argparse.Namespace) -> list[str]:
    """This program's configuration as arguments for another one."""
    return ["--config", str(args.config), *(w for item in args.overrides for w in ("--set", item))]


def program(name: str, *arguments: str) -> None:
    """Run one of our programs to its end."""
    line = [sys.executable, str(ROOT / name), *arguments]
    if subprocess.run(line, check=False).returncode != 0:
        raise DemoFailed(f"{name} failed; its message is above")


def fresh(run_dir: Path) -> None:
    """Empty the run folder of an earlier demo; a folder that isn't one is left alone."""
    marker = run_dir / "demo"
    if run_dir.exists() and any(run_dir.iterdir()) and not marker.exists():
        raise DemoFailed(f"{run_dir} holds another run; give the demo a run.dir of its own")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    marker.touch()


def fill(config: Config, pool: str, splits: Splits) -> None:
    """Create the pool and put the seed memories in; write the known answers for the scorer."""
    known = [(task.prompt, task.answer) for task in (*splits.seed, *splits.problems)]
    write_references(config.scorer.references[0], known)
    settings = config.pools[pool]
    with PoolStore.open(config.url, config.gateway.max_text_chars) as store:
        store.create_pool(pool, settings.rubric, settings.threshold)
        store.append([NewMemory(pool, t.prompt, t.answer, agent="seed") for t in splits.seed])


def learned(config: Config) -> Callable[[], bool]:
    """Whether the trainer has nothing left to do: its rounds are over, or nothing new to learn."""
    store = PoolStore.open(config.url)

    def done() -> bool:
        journal = Journal.load(config.run.dir / "continual.json")
        if journal.open_round is not None:
            return False
        if config.continual.rounds is not None and len(journal.rounds) >= config.continual.rounds:
            return True
        new = count_new(store, journal.positions, config.served_pools)
        return new < config.continual.min_new

    return done


def serve(config: Config, args: argparse.Namespace, pool: str, splits: Splits) -> Traffic:
    """Steps 3 and 4: everything up, the stream of questions, everything down."""
    supervisor = Supervisor(config.run.dir / "logs", grace_seconds=60.0)
    record = config.run.dir / "gateway.json"
    started = time.monotonic()
    finished = learned(config)
    first = current(config.retriever_dir)

    def check() -> None:
        if up.process.poll() is not None:
            raise DemoFailed(f"serving ended early; the end of {up.log_file}:\n{up.tail()}")

    def done() -> bool:
        check()
        if time.monotonic() - started > STREAM_SECONDS:
            raise DemoFailed(f"no end of learning after {STREAM_SECONDS:g} s; see {up.log_file}")
        number = current(config.retriever_dir)
        return finished() and number in (first, *stream.traffic.swaps)

    try:
        up = supervisor.start("up", [sys.executable, "-u", str(ROOT / "serve/up.py"), *words(args)])
        while (url := url_of(record, 0)) is None or not state_of(url).get("ready"):
            check()
            if time.monotonic() - started > START_SECONDS:
                raise DemoFailed(f"not ready after {START_SECONDS:g} s; see {up.log_file}")
            time.sleep(0.5)
        log(f"serving on {url}; {len(splits.problems)} questions at {RATE:g} a second")
        stream = Stream(url, pool, AGENTS, RATE)
        return asyncio.run(stream.run(splits.problems, splits.test, done, progress(splits)))
    finally:
        supervisor.stop()


def progress(splits: Splits) -> Callable[[int], None]:
    """A line every hundred questions."""

    def asked(count: int) -> None:
        if count % 100 == 0:
            log(f"asked {count} of {len(splits.problems)} questions")

    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code says whether all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    # Unwinds through every `finally`, so that nothing is left running.
    on_stop(lambda name: sys.exit(128 + signal.Signals[name]))
    began = time.monotonic()
    try:
        config = load_config(args.config, args.overrides)
        pool, splits = config.served_pools[0], World(config.run.seed).splits(*SIZES)
        for name in sorted({config.agent_llm.model, config.scorer_llm.model} & RECIPES.keys()):
            program("train/pocket_lm.py", name)
        fresh(config.run.dir)
        with run_lock(config.run.dir, "demo"):
            fill(config, pool, splits)
            program("train/index.py", *words(args), "--encoder", "frozen", "--no-gate")
            traffic = serve(config, args, pool, splits)
            log("measuring on held-out questions")
            report = demo.record(config, pool, splits, traffic)
            report["seconds"] = time.monotonic() - began
    except (ConfigError, DemoFailed, RunLocked) as error:
        log(f"demo: {error}")
        return 1
    write_json(config.run.dir / "report.json", report)
    tables = demo.tables(report)
    section = Section("", "", tables, demo.plots(report))
    page = write_report(config.run.dir, "memshare demo", demo.summary(report), [section])
    print_tables(tables)
    log(f"report: {page} and report.json beside it")
    return 0 if report["requests"]["failed"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
