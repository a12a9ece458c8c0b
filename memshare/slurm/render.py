"""From a script of slurm/, a cluster's facts and a program's arguments to one resolved script.

The scripts run as they are (``sbatch slurm/train.sbatch ...``). What is resolved here goes into one
place of them, after their own ``#SBATCH`` lines, which it therefore overrides. Values are quoted,
so that a script that shellcheck finds clean stays clean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from memshare.config import Config, ConfigError
from memshare.config.base import NonNegativeInt, PositiveInt, Section
from memshare.config.document import parse

JOBS = ("train", "mine", "serve", "loop")
PLACE = "# -- memshare slurm render puts cluster and arguments here --\n"
ROOT = Path(__file__).resolve().parents[2]

Word = Annotated[str, Field(pattern=r"^\S+$")]


class Site(Section):
    """What a cluster wants to be told; see slurm/site.example.yaml.

    ``python``: the command that runs Python, words divided by blanks. ``accelerate_config``: for
    training, instead of the one that fits the number of GPUs. ``warning_seconds``: how long before
    preemption or the time limit SLURM warns a job. ``setup``: shell lines before anything else, as
    they stand. ``sbatch``: more options of sbatch.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Word | None = None
    gpus_per_node: NonNegativeInt = 0
    cpus_per_task: PositiveInt | None = None
    mem: Word | None = None
    python: str | None = None
    accelerate_config: Path | None = None
    logs: Path = Path("runs/slurm")
    warning_seconds: Annotated[int, Field(ge=30)] = 180
    setup: tuple[str, ...] = ()
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict
    )
    sbatch: tuple[Annotated[str, Field(pattern=r"^-.*$")], ...] = ()

    @property
    def options(self) -> list[str]:
        """For sbatch."""
        known = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "signal": f"B:USR1@{self.warning_seconds}",
        }
        return [*(f"--{key}={value}" for key, value in known.items() if value), *self.sbatch]

    @property
    def variables(self) -> dict[str, str]:
        """For slurm/common.sh and slurm/node.sh."""
        found = {
            "MEMSHARE_ROOT": str(ROOT),
            "MEMSHARE_LOGS": str(self.logs.absolute()),
            "MEMSHARE_GRACE": str(self.warning_seconds - max(10, self.warning_seconds // 6)),
        }
        if self.python is not None:
            found["MEMSHARE_PYTHON"] = self.python
        if self.accelerate_config is not None:
            found["MEMSHARE_ACCELERATE"] = str(self.accelerate_config.absolute())
        return {**found, **self.env}


def load_site(path: Path) -> Site:
    """Read a site file. Raises `ConfigError` naming every mistake."""
    try:
        return Site.model_validate(parse(path.read_text(encoding="utf-8")) or {})
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}"
            + ("; put it into quotes" if e["type"] == "string_type" else "")
            for e in error.errors()
        ]
        raise ConfigError(f"{path}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error


def check(job: str, config: Config, arguments: Sequence[str], nodes: int, tasks: int) -> None:
    """Raise `ConfigError` for what would only fail in the queue.

    ``nodes`` of the job, or ``tasks`` of an array, each of which may run on a node of its own.
    """
    problems = []
    given = {word.partition("=")[0] for word in arguments}
    if job == "train":
        problems += [f"train needs {name} DIR" for name in ("--examples", "--output")
                     if name not in given]  # fmt: skip
    elif nodes > 1:
        problems.append(f"{job} runs on one node, not {nodes}")
    if job == "mine" and tasks > 1 and config.url.startswith("sqlite"):
        problems.append(f"database_url: {tasks} tasks on several nodes need PostgreSQL, not SQLite")
    if problems:
        raise ConfigError("\n".join(problems))


def render(
    job: str, site: Site, options: Sequence[str], arguments: Sequence[str], root: Path = ROOT
) -> str:
    """The script of ``job`` with a site's facts, sbatch's ``options``, the program's arguments.

    Raises `ConfigError` where ``root`` is no work tree of memshare, or an option has two lines.
    """
    path = root / "slurm" / f"{job}.sbatch"
    try:
        script = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}; jobs need a work tree") from error
    before, place, after = script.partition(PLACE)
    assert place, f"{path} has no place for the site's lines"
    lines = []
    logs = "%x-%A_%a.out" if "#SBATCH --array" in before else "%x-%j.out"
    for option in (f"--output={site.logs.absolute() / logs}", *site.options, *options):
        if "\n" in option or not option.startswith("-"):  # sbatch passes over any other line
            raise ConfigError(f"{option!r}: an option of sbatch is one line, --NAME[=VALUE]")
        name, equals, value = option.partition("=")
        lines.append(f"#SBATCH {name}{equals}{_quoted(value)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.variables.items()]
    lines += site.setup
    lines.append("set -- " + " ".join(map(shlex.quote, arguments)) if arguments else "set --")
    return before + "\n".join(lines) + "\n" + after


def _quoted(value: str) -> str:
    """As sbatch reads a value in a script: only blanks, quotes and # need quoting."""
    return value if re.fullmatch(r"[^\s'\"#]*", value) else '"' + value.replace('"', r"\"") + '"'
