"""Start the vLLM servers that a configuration names, and keep them until told to stop.

    python serve/llm.py --config configs/h200.yaml

One server for each distinct model and URL of ``agent_llm`` and ``scorer_llm`` with backend
``vllm``, replicas among them; where they share GPUs, one after the other. Prints ``ready`` once all
of them answer. Ctrl-C, SIGTERM or closing the terminal (but for nohup) stops them; one that dies
ends this program with code 1 and its last log lines, but a replica, whose siblings serve on, is
started again, up to three times.
``--check`` starts nothing: it says whether they run and serve the right models; ``--for mining``
takes those alone that train/mine.py asks. Servers on other hosts are only waited for.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from memshare.config import Config, ConfigError, add_config_arguments, load_config, shown_command
from memshare.llm.base import LLMError
from memshare.llm.plan import ServerPlan, plan_servers
from memshare.llm.server import Server, server_command, serves, wait_ready
from memshare.progress import log
from memshare.stopping import on_stop

RESTARTS = 3  # of one replica


def check(plans: list[ServerPlan]) -> int:
    """Say of every server whether it is up; 0 if all are."""
    missing = 0
    for plan in plans:
        try:
            state = "ready" if serves(plan) else "not running"
        except LLMError as error:
            state = str(error)
        missing += state != "ready"
        print(f"{plan.name} {plan.url} {plan.model}: {state}")
    return 1 if missing else 0


def run(config: Config, plans: list[ServerPlan]) -> int:
    """Start what is local, wait for all of it, and stay until a signal or a death."""
    servers: list[Server] = []
    restarts: dict[str, int] = {}
    # A flag, not an exception: nothing may be started and then forgotten in between.
    stopping = Event()
    on_stop(lambda name: stopping.set())
    try:
        for plan in plans:
            if stopping.is_set():
                break
            if serves(plan):
                log(f"{plan.name}: {plan.url} serves {plan.model} already")
            elif plan.local:
                server = Server(plan, config.run.dir / "logs" / f"vllm-{plan.port}.log")
                shown = shown_command(server_command(plan))
                log(f"{plan.name}: starting {shown} (log: {server.log})")
                server.start()
                servers.append(server)
                if plan.shares:  # vLLM counts what another one loads meanwhile as its own
                    wait_ready([server], plan.llm.server.start_timeout_seconds, stopping)
            else:
                raise LLMError(
                    f"{plan.url} is on another machine and does not answer; start it there"
                )
        limit = max((plan.llm.server.start_timeout_seconds for plan in plans), default=0)
        wait_ready(servers, limit, stopping)
        if not stopping.is_set():
            print("ready", flush=True)
        while servers and not stopping.wait(1.0):
            for server in servers:
                if (code := server.child.process.poll()) is not None:
                    words = f"vLLM ({server.plan.name}) died with code {code}"
                    left = restarts[server.plan.url] = restarts.get(server.plan.url, RESTARTS) - 1
                    if len(server.plan.llm.urls) == 1 or left < 0:
                        raise LLMError(f"{words}:\n{server.last_words()}")
                    log(f"{words}; started again:\n{server.last_words()}")
                    server.stop()
                    server.start()
        if stopping.is_set():
            log("stopping")
        return 0
    finally:
        # At once: who stops this program waits for so long, and would leave them behind.
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            list(threads.map(lambda server: server.stop(), servers))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="only say whether they run")
    parser.add_argument("--for", dest="purpose", choices=["mining"], help="only what that needs")
    arguments = parser.parse_args(argv)
    config_path: Path | None = arguments.config
    try:
        config = load_config(config_path, arguments.overrides)
        plans = plan_servers(config, mining=arguments.purpose == "mining")
        if not plans:
            log("no LLM that is needed has backend vllm: nothing to start")
            return 0
        return check(plans) if arguments.check else run(config, plans)
    except (ConfigError, LLMError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
