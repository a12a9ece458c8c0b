"""One run of Weights & Biases: where it goes, opening it, and ending it in bounded time.

wandb leaves much of itself behind a run: a process of its own (``wandb-core``) that keeps sending,
and a hook that waits for it when the program ends, however long that takes. And it sends much that
nobody asked for: the command line and uncommitted changes, where passwords may stand.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from memshare.config import ConfigError, WandbConfig
from memshare.progress import log
from memshare.training.iterations import round_of

PROBE_SECONDS = 2.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 20.0  # for a service that answers
# So much of an offline copy is lost at most when wandb-core is killed. Private: it may go.
_FLUSH = {"x_transaction_log_flush_interval": 1.0}
_CORE = "wandb-core"
STEP = "training_step"
_NAME_CHARS = 128  # a path may be longer than what W&B takes for a name
_MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")
_AWAY = (502, 503, 504)  # what proxies say of a service behind them


def has_key() -> bool:
    """Whether a W&B key is at hand: the environment's, or one that ``wandb login`` left."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    machine = urlsplit(_service()).netloc  # with its port, as there
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(machine) is not None
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False  # nothing there, or nothing that can be read: no reason to end a training


def _service() -> str:
    """Where runs go: by the environment, or by what ``wandb login --host`` has left."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):  # wandb says so itself
        settings.read(folder / "settings")
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")


def wandb_mode(config: WandbConfig) -> str:
    """online, offline or disabled; ``auto`` obeys ``WANDB_MODE``, then looks for a key.

    Raises `ConfigError` where that says what W&B does not know.
    """
    if config.mode != "auto":
        return config.mode
    asked = _asked_mode()
    if asked and asked not in _MODES:
        raise ConfigError(f"WANDB_MODE is {asked}; W&B knows {', '.join(_MODES)}")
    return asked or ("online" if has_key() else "offline")


def _asked_mode() -> str:
    return os.environ.get("WANDB_MODE", "").strip().lower()


def answers(url: str) -> bool:
    """Whether there is a service at ``url`` that answers within `PROBE_SECONDS`.

    With whatever it likes, but that it is away.
    """
    try:
        # Nothing is sent that a stranger must not see, and certificates are wandb's to judge.
        status = httpx.get(url, timeout=PROBE_SECONDS, verify=False).status_code
        return status not in _AWAY
    except httpx.TransportError:
        return False
    except ImportError:
        return True  # behind a SOCKS proxy, which takes a package: wandb will find out


def service_answers() -> bool:
    """`answers`, of the W&B service that the environment or wandb's settings name."""
    import wandb

    return answers(str(wandb.setup().settings.base_url))


def reached(mode: str) -> str:
    """The mode of a run that is to be opened: offline, with a word, if its service is away."""
    # wandb's reports about itself: at its end a program waits ten seconds for a mute server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # It reads this too, and fails of capitals and of nothing, whatever mode it is given.
    if _asked_mode() in _MODES:
        os.environ["WANDB_MODE"] = _asked_mode()
    else:
        os.environ.pop("WANDB_MODE", None)
    if mode != "online" or service_answers():
        return mode
    log("W&B can't be reached (it does not answer); its run is offline")
    return "offline"


def open_run(
    config: WandbConfig, mode: str, run_id: str, settings: Mapping[str, Any], folder: Path
) -> tuple[Any, str]:
    """The run, new or continued, and its mode: offline where an online one can't be opened.

    ``mode``: as `reached` found it. Its files are in ``folder/wandb``. Raises wandb's errors.
    """
    import wandb

    def start(mode: Any) -> Any:
        return wandb.init(
            mode=mode,
            id=run_id,
            resume="allow",
            project=config.project,
            entity=config.entity,
            name=config.name or str(folder)[-_NAME_CHARS:],
            group=config.group or os.environ.get("WANDB_RUN_GROUP") or _around(folder),
            config=dict(settings),
            dir=str(folder),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                x_disable_meta=True,  # the command line
                disable_git=True,  # uncommitted changes, the remote's URL
                disable_code=True,
                **{name: _FLUSH[name] for name in _FLUSH if name in wandb.Settings.model_fields},
            ),
        )

    try:
        return start(mode), mode
    except wandb.errors.Error as error:
        if mode != "online":
            raise
        log(f"W&B can't be reached ({error}); its run is offline")
        wandb.teardown()  # the run that could not be opened would keep its id from the next
        return start("offline"), "offline"


def _around(folder: Path) -> str | None:
    """The folder that holds a loop's rounds, or a training and its like; None where none does."""
    return str(round_of(folder).parent)[-_NAME_CHARS:] if len(folder.parts) > 1 else None


def chart(run: Any, names: Iterable[str]) -> None:
    """Have the figures of these names drawn over `STEP`, which their entries hold.

    W&B's own step only ever grows: what is told once more, by a training that goes on from before
    it was killed, has a later one there.
    """
    for name in sorted(names):
        run.define_metric(name, step_metric=STEP)


def let_go() -> None:
    """End wandb in this process; waits for what `give_up` ends."""
    import wandb

    with suppress(Exception):  # policy: its process may be gone, and there is nothing left to do
        wandb.teardown()


def give_up() -> None:
    """Kill wandb's process, so that neither a thread nor the end of the program waits for it."""
    killed = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == _CORE:
                child.kill()
                killed.append(child)
    psutil.wait_procs(killed, timeout=1.0)
