"""Which vLLM servers a configuration needs, on which ports, and which GPUs each of them gets.

The GPUs that this process may use (``CUDA_VISIBLE_DEVICES``, as SLURM sets it, else all) are dealt
out from the last one on, so that the first ones stay with trainer and searcher. Where there are
too few for every server to have its own, all of them share, and only replicas are refused.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import httpx

from memshare.config import Config, ConfigError, LLMConfig
from memshare.llm.factory import resolve_model

_LOCAL = frozenset({"127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]"})
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_FREE_PORTS_FROM = 20_000  # below what the kernel hands out by itself
_PORTS_APART = 16  # more than one job takes


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One vLLM server: what it serves, where, and for which roles (agent, scorer).

    ``replica`` counts the equal ones; ``devices`` is its ``CUDA_VISIBLE_DEVICES``, empty where it
    takes what it finds. ``shares``: GPUs with another one.
    """

    model: str
    url: str
    roles: tuple[str, ...]
    llm: LLMConfig
    replica: int = 0
    devices: str = ""
    shares: bool = False

    @property
    def local(self) -> bool:
        """Whether this machine is to run it; any other host is only checked."""
        return _is_local(self.url)

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self.llm.server.port:
            return self.llm.server.port + self.replica
        return httpx.URL(self.url).port or 80

    @property
    def name(self) -> str:
        """A short name for logs."""
        return f"{'+'.join(self.roles)}:{self.port}"


def plan_servers(config: Config, *, mining: bool = False) -> list[ServerPlan]:
    """One server for each distinct model and URL among agent and scorer LLM.

    For ``mining``, only what train/mine.py asks: `memshare.training.labels` says when it asks whom.
    Raises `ConfigError` where two models claim one URL, one server gets two different settings, or
    replicas have too few GPUs.
    """
    plans: dict[str, ServerPlan] = {}
    for role, llm in _wanted(config, mining):
        model = resolve_model(llm.model)
        for replica, url in enumerate(llm.urls):
            before = plans.get(url)
            if before is None:
                plans[url] = ServerPlan(model, url, (role,), llm, replica)
            elif before.model != model:
                raise ConfigError(f"{url} can't serve two models: {before.model} and {model}")
            elif before.llm.server != llm.server:
                raise ConfigError(f"agent_llm.server and scorer_llm.server differ, but share {url}")
            else:
                plans[url] = replace(before, roles=(*before.roles, role))
    return _with_gpus(list(plans.values()))


def _wanted(config: Config, mining: bool) -> list[tuple[str, LLMConfig]]:
    wanted = [("agent", config.agent_llm), ("scorer", config.scorer_llm)]
    labels = config.mining.labels
    if mining and labels != "reward":
        wanted = wanted[1:] if labels in ("likelihood", "prompted") else []
    measures = config.scorer.kind != "reference" or labels in ("likelihood", "prompted")
    return [
        (role, llm)
        for role, llm in wanted
        if llm.backend == "vllm" and (role == "agent" or measures)
    ]


def _with_gpus(plans: Sequence[ServerPlan]) -> list[ServerPlan]:
    """The same with ``devices``, where there are GPUs to divide."""
    named: dict[str | None, list[ServerPlan]] = {}  # by the GPUs that their configuration names
    for plan in plans:
        if plan.local:
            named.setdefault(plan.llm.server.env.get(_VISIBLE), []).append(plan)
    given: dict[str, str] = {}
    shared: set[str] = set()
    for names, some in named.items():
        devices = visible_gpus() if names is None else _listed(names)
        needed = sum(plan.llm.server.tensor_parallel_size for plan in some)
        replicated = [plan for plan in some if len(plan.llm.urls) > 1]
        if devices and needed > len(devices) and replicated:
            raise ConfigError(
                f"{', '.join(plan.name for plan in some)} need {needed} GPUs, as replicas do not "
                f"share; there are {len(devices)} ({_VISIBLE}: {','.join(devices)})"
            )
        if needed > len(devices) or (names is not None and len(some) == 1):
            if devices and len(some) > 1:
                shared |= {plan.url for plan in some}
            continue  # they share, or it has them to itself
        start = len(devices) - needed
        for plan in some:
            end = start + plan.llm.server.tensor_parallel_size
            given[plan.url] = ",".join(devices[start:end])
            start = end
    return [
        replace(plan, devices=given.get(plan.url, ""), shares=plan.url in shared) for plan in plans
    ]


def gpus_left(plans: Sequence[ServerPlan]) -> str:
    """What trainer and searcher have for themselves (``CUDA_VISIBLE_DEVICES``).

    Empty where they share with the LLMs, or where nothing is divided.
    """
    local = [plan for plan in plans if plan.local]
    taken = {device for plan in local for device in plan.devices.split(",")}
    if not local or not all(plan.devices for plan in local):
        return ""
    return ",".join(device for device in visible_gpus() if device not in taken)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get(_VISIBLE)
    if named is None:
        return [str(number) for number in range(_count_gpus())]
    return _listed(named)


def _listed(names: str) -> list[str]:
    return [word.strip() for word in names.split(",") if word.strip()]


@cache
def _count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return 0  # no driver here, so no GPU
    return len(listed.stdout.splitlines())


def on_free_ports(config: Config) -> list[str]:
    """Overrides (``key=value``) that put every local vLLM server on a port that is free now.

    For a node that others use, too: a configuration's own port may be taken there, or answered by
    another job's server. Roles that share a server still do.
    """
    roles = {"agent_llm": config.agent_llm, "scorer_llm": config.scorer_llm}
    moved: dict[str, str] = {}
    overrides = []
    # Jobs that look at one moment look in different places: nobody listens there yet.
    after = _FREE_PORTS_FROM + os.getpid() * _PORTS_APART % 10_000
    for key, llm in roles.items():
        if llm.backend != "vllm" or not any(_is_local(url) for url in llm.urls):
            continue
        for url in llm.urls:
            if _is_local(url) and url not in moved:
                after = _free_port(after)
                moved[url] = f"http://127.0.0.1:{after}"
        urls = [moved.get(url, url) for url in llm.urls]
        shown = urls[0] if len(urls) == 1 else f"[{', '.join(urls)}]"
        overrides += [f"{key}.url={shown}", f"{key}.server.port=0", f"{key}.server.replicas=1"]
    return overrides


def _free_port(after: int) -> int:
    """The first port above ``after`` that nobody listens on."""
    for port in range(after + 1, 32_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigError("no port is free for an LLM server")


def _is_local(url: str) -> bool:
    host = httpx.URL(url).host
    return host in _LOCAL or host in (socket.gethostname(), socket.getfqdn())
