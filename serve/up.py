"""All of it on one machine: LLM servers (where vLLM is used), the gateway, the continual trainer.

    python serve/up.py --config configs/pocket.yaml

Each part is a child process with its log under the run folder's logs/. The trainer starts once the
gateway and its LLMs answer; a gateway that still encodes the pool is waited for. Of several GPUs,
the LLM servers get the last ones, trainer and searcher the first. A server that dies stops
everything, and the end of its log is shown. A trainer that fails (a training diverges, a disk is
full, an LLM does not answer) is no reason to stop serving: it starts again after
``continual.retry_seconds``, and goes on from where it was. Ctrl-C, SIGTERM and closing the
terminal (but for nohup) stop everything cleanly: the trainer, then the gateway, then the LLMs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

from memshare.config import Config, ConfigError, add_config_arguments, load_config
from memshare.files import DiskFull, RunLocked, full_disk_told, run_lock
from memshare.gateway.readiness import missing, state_of, url_of, written_ns
from memshare.gateway.supervisor import Restarted, Supervisor, shared_cores
from memshare.llm.base import LLMError
from memshare.llm.plan import gpus_left, plan_servers
from memshare.progress import log
from memshare.stopping import on_stop
from memshare.training.child import check_gpus
from memshare.training.labels import check_labels
from memshare.training.outcome import EXIT_USAGE

ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 1.0
_SAY_SECONDS = 60.0
_ANSWER_SECONDS = 120.0


class Failed(RuntimeError):
    """A part died or never got ready."""


def command(program: str, args: argparse.Namespace, *more: str) -> list[str]:
    """The command line of one of our programs with this configuration."""
    line = [sys.executable, "-u", str(ROOT / program)]
    if args.config:
        line += ["--config", str(args.config)]
    for override in args.overrides:
        line += ["--set", override]
    return [*line, *more]


def check(supervisor: Supervisor, trainer: Restarted | None = None) -> None:
    """Raise `Failed` with its log's end if a part has died, other than the ``trainer``.

    The trainer, too, where its command line or the configuration is wrong from the start: a file
    that was edited since is no reason to stop serving. Two may end with 0 while the rest serves on:
    a trainer that has done ``continual.rounds`` rounds, and serve/llm.py where every LLM server
    runs already.
    """
    part = supervisor.dead()
    if part is None:
        return
    code = part.process.returncode
    if code == 0 and part.name in ("continual", "llm"):
        log(f"{part.name} has nothing more to do; serving goes on")
        supervisor.parts.remove(part)
        return
    end = f"{part.name} ended with exit code {code}; the end of {part.log_file}:\n{part.tail()}"
    if trainer is None or part is not trainer.part:
        raise Failed(end)
    if code == EXIT_USAGE and not trainer.failed_before:
        raise Failed(end)
    pause = trainer.put_off()
    log(f"{end}\nserving goes on; the trainer starts again in {pause:g} s")


def wait(
    supervisor: Supervisor, record: Path, before: int, limit: float, stopping: Event
) -> str | None:
    """The gateway's URL once it and its LLMs answer; None if ``stopping`` is set first.

    A gateway that loads its models or says that it starts may take its time: to encode a pool takes
    hours. Only what can't be reached for ``limit`` seconds is given up: raises `Failed`.
    """
    said = now = time.monotonic()
    deadline = now + limit
    while not stopping.is_set():
        check(supervisor)
        url = url_of(record, before)
        state = state_of(url) if url else {}
        lacks = missing(state) if url else "the gateway loads its models"
        if lacks is None:
            return url
        now = time.monotonic()
        if url is None or state.get("reason") == "starting":
            deadline = now + limit
        elif now > deadline:
            raise Failed(f"given up after {limit:g} s: {lacks}")
        if now - said > _SAY_SECONDS:
            said = now
            log(f"waiting: {lacks}")
        stopping.wait(_POLL_SECONDS)
    return None


def run(config: Config, args: argparse.Namespace, supervisor: Supervisor, stopping: Event) -> None:
    """Start the parts in order, then watch them until ``stopping`` is set or one dies."""
    uses_vllm = "vllm" in (config.agent_llm.backend, config.scorer_llm.backend)
    env = shared_cores()
    if uses_vllm and not args.no_llm:
        if left := gpus_left(plan_servers(config)):
            if not args.no_train:  # or the first training would find out, hours later
                check_gpus(config.continual, len(left.split(",")))
            log(f"GPUs: {left} for trainer and searcher, the others for LLMs")
            env["CUDA_VISIBLE_DEVICES"] = left
        supervisor.start("llm", command("serve/llm.py", args))
    options = ["--host", args.host] if args.host else []
    if args.port is not None:
        options += ["--port", str(args.port)]
    record = config.run.dir / "gateway.json"
    before = written_ns(record)
    supervisor.start("gateway", command("serve/gateway.py", args, *options), env)
    limit = _ANSWER_SECONDS
    if uses_vllm:
        servers = (config.agent_llm.server, config.scorer_llm.server)
        limit += max(server.start_timeout_seconds for server in servers)
    url = wait(supervisor, record, before, limit, stopping)
    if url is None:
        return
    log(f"serving on {url}")
    trainer, pause = None, config.continual.retry_seconds
    if not args.no_train:
        words = command("train/continual.py", args)
        if pause is None:
            supervisor.start("continual", words, env)
        else:
            trainer = Restarted(supervisor, "continual", words, env, pause)
    shown = ""
    while not stopping.is_set():
        if trainer is not None:
            trainer.start_if_due()
        check(supervisor, trainer)
        state = state_of(url)
        llms = ", ".join(f"{name} {value}" for name, value in state.get("llm", {}).items())
        status = f"generation {state.get('generation')}, LLMs: {llms}" if state else "no answer"
        if status != shown:
            shown = status
            log(f"status: {status}")
        stopping.wait(_POLL_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Start everything; stop everything, whatever happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--host", help="the gateway's address (default: gateway.host)")
    parser.add_argument("--port", type=int, help="its port, 0 for a free one (gateway.port)")
    parser.add_argument("--no-train", action="store_true", help="serve only, without the trainer")
    parser.add_argument("--no-llm", action="store_true", help="the LLM servers run already")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        if not args.no_train:
            check_labels(config)
    except ConfigError as error:
        log(f"up: {error}")
        return EXIT_USAGE
    # The gateway takes that time twice: for open requests, then for the scoring queue.
    grace = 2 * config.gateway.shutdown_seconds + 15.0
    supervisor = Supervisor(config.run.dir / "logs", grace)
    # A flag, not an exception: nothing may be started and then forgotten in between.
    stopping = Event()
    on_stop(lambda name: stopping.set())
    code, clean = 0, True
    try:
        with full_disk_told(), run_lock(config.run.dir, "up"):
            try:
                run(config, args, supervisor, stopping)
                log("stopping")
            except (Failed, ConfigError, LLMError) as error:
                log(f"up: {error}")
                code = 1
            finally:
                clean = supervisor.stop()
    except (DiskFull, RunLocked) as error:
        log(f"up: {error}")
        return EXIT_USAGE if isinstance(error, RunLocked) else 1
    return code if clean else 1


if __name__ == "__main__":
    sys.exit(main())
