"""What slurm/common.sh and slurm/node.sh find out on a node; SLURM's commands are stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from memshare.slurm.render import ROOT

SCONTROL = """
case "$*" in
    "show hostnames n[07-08]") printf 'n07\\nn08\\n' ;;
    "show node --oneliner n07") echo "NodeName=n07 NodeAddr=10.0.0.7 NodeHostName=n07 Port=0 " ;;
    *) echo "scontrol: no such thing: $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A node's environment: stand-ins for scontrol and Python, the latter prints its arguments."""
    for name, script in {
        "scontrol": SCONTROL,
        "python": 'printf "%s\\n" "$@"\nenv\ntrap -p\n',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{script}")
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MEMSHARE_ROOT": str(ROOT),
        "MEMSHARE_PYTHON": f"{tmp_path}/python -u",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[07-08]",
    }


def run(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], env=env, capture_output=True, text=True)


def common(env: dict[str, str], lines: str) -> subprocess.CompletedProcess[str]:
    """After common.sh, as the jobs run it: the first failure ends it."""
    return run(env, "-c", f"set -euo pipefail\nsource {ROOT}/slurm/common.sh\n{lines}")


def test_the_first_node_and_its_address(env: dict[str, str]) -> None:
    told = common(env, 'first=$(first_host)\nhead=$(address "$first")\necho "$first at $head"')
    assert told.stdout == "n07 at 10.0.0.7\n"


@pytest.mark.parametrize(
    "lines, told",
    [
        ("SLURM_JOB_NODELIST=x; first=$(first_host)", "can't expand SLURM_JOB_NODELIST='x'"),
        ("head=$(address n99)", "names no address of node 'n99'"),
        ("python=(no-such-python); port=$(free_port)", "no Python: 'no-such-python'"),
    ],
)
def test_what_a_node_does_not_say_ends_the_job_with_its_reason(
    env: dict[str, str], lines: str, told: str
) -> None:
    done = common(env, f"{lines}\necho went on")
    assert done.returncode == 1 and told in done.stderr
    assert "went on" not in done.stdout


def test_a_free_port_is_none_that_the_kernel_gives_to_others(env: dict[str, str]) -> None:
    env["MEMSHARE_PYTHON"] = sys.executable
    ports = common(env, "free_port; free_port; free_port").stdout.split()
    assert len(ports) == 3 and all(10_000 <= int(port) < 32_000 for port in ports)


def test_a_work_tree_whose_path_holds_blanks_has_its_python(
    env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "my tree").symlink_to(ROOT)
    env["MEMSHARE_ROOT"] = str(tmp_path / "my tree")
    del env["MEMSHARE_PYTHON"]
    told = common(env, "printf '%s\\n' \"${python[@]}\"")
    assert told.stdout == f"{tmp_path}/my tree/.venv/bin/python\n"


@pytest.mark.parametrize(
    "gpus, nodes, processes, settings", [(4, 2, 8, "ddp"), (1, 1, 1, "gpu"), (0, 2, 2, "cpu2")]
)
def test_a_node_launches_its_own_processes_under_its_own_rank(
    env: dict[str, str], gpus: int, nodes: int, processes: int, settings: str
) -> None:
    env |= {"SLURM_NNODES": str(nodes), "SLURM_NODEID": str(nodes - 1), "SLURM_CPUS_ON_NODE": "32"}
    env |= {"SLURMD_NODENAME": "n07", "SLURM_RESTART_COUNT": "3"}
    if gpus:
        env["SLURM_GPUS_ON_NODE"] = str(gpus)
    done = run(env, f"{ROOT}/slurm/node.sh", "10.0.0.7", "4567", "train.py", "--output", "a b")
    words = done.stdout.splitlines()
    assert words[:3] == ["-u", "-m", "accelerate.commands.launch"], done.stderr
    given = dict(pairwise(words))
    assert given["--config_file"] == f"{ROOT}/configs/accelerate/{settings}.yaml"
    assert given["--num_machines"] == str(nodes) and given["--machine_rank"] == str(nodes - 1)
    assert given["--num_processes"] == str(processes)
    assert given["--num_cpu_threads_per_process"] == str(32 // max(1, gpus))
    assert (given["--rdzv_backend"], given["--output"]) == ("c10d", "a b")
    # Another attempt must not meet what is left of the one before.
    assert "PET_RDZV_ID=17.3" in words and "PET_RDZV_ENDPOINT=10.0.0.7:4567" in words
    assert "PET_LOCAL_ADDR=10.0.0.7" in words
    assert ("trap -- '' SIGTERM" in words) == (processes == 1)


@pytest.mark.parametrize(
    "training, code",
    [
        ("true", 1),  # it never began
        ("rm $result; cp --preserve=timestamps $kept $result", 1),  # refused: brought back
        ("rm $result", 1),
        ('rm $result; echo \'{"status": "trained"}\' > $result', 0),
        ('rm $result; echo \'{"status": "empty"}\' > $result', 66),
        # The launcher is gone, and its rank has not ended yet.
        (
            "rm $result; exec 9> $lock; flock 9; "
            '(sleep 2; echo \'{"status": "empty"}\' > $result) & exit 143',
            66,
        ),
    ],
)
def test_an_earlier_result_is_kept_and_never_taken_for_ones_own(
    env: dict[str, str], tmp_path: Path, training: str, code: int
) -> None:
    result, kept = tmp_path / "out/result.json", tmp_path / "kept.json"
    result.parent.mkdir()
    kept.write_text('{"status": "trained"}\n')
    shutil.copy2(kept, result)
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!/bin/bash\nresult={result} kept={kept} lock={result.parent}/training.lock\n{training}\n"
    )
    srun.chmod(0o755)
    env |= {"SLURM_JOB_NAME": "train", "MEMSHARE_LOGS": str(tmp_path / "logs")}
    env |= {"SLURM_NNODES": "1", "MEMSHARE_PYTHON": sys.executable}
    done = run(env, f"{ROOT}/slurm/train.sbatch", "--output", str(result.parent))
    assert done.returncode == code, done.stderr
    if training in ("true", "rm $result; cp --preserve=timestamps $kept $result"):
        assert result.read_text() == kept.read_text()
    log = (tmp_path / "logs/train/latest").read_text()
    assert ("ended without a result" in log) == (code == 1)


@pytest.mark.parametrize("when, code", [("2026-12-01T07:38:30", 0), ("None", 1)])
def test_ranks_that_preemption_ends_before_they_could_stop_are_no_failure(
    env: dict[str, str], tmp_path: Path, when: str, code: int
) -> None:
    """They still started, or a step took longer than their launcher waits."""
    told = f'"show job --oneliner 17") echo "JobId=17 PreemptTime={when} SuspendTime=None" ;;'
    script = SCONTROL.replace(
        "*)", f'{told}\n    "requeue 17") touch {tmp_path}/requeued ;;\n    *)'
    )
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{script}")
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 143\n")
    (tmp_path / "srun").chmod(0o755)
    env |= {"SLURM_JOB_NAME": "train", "MEMSHARE_LOGS": str(tmp_path / "logs")}
    env |= {"SLURM_NNODES": "2", "MEMSHARE_PYTHON": sys.executable}
    done = run(env, f"{ROOT}/slurm/train.sbatch", "--output", str(tmp_path / "out"))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() == (code == 0)


def test_a_task_of_an_array_requeues_itself_alone(env: dict[str, str]) -> None:
    """The last one has the array's own number, by which SLURM would requeue all tasks."""
    assert "no such thing: requeue 17\n" in common(env, "requeue").stderr
    env |= {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    assert "no such thing: requeue 17_3\n" in common(env, "requeue").stderr


def test_an_array_of_some_tasks_is_refused_before_it_takes_a_gpu(
    env: dict[str, str], tmp_path: Path
) -> None:
    """By their numbers tasks take shares: of 0,1,5 one would take the sixth of three."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    for numbers, refused in (((5, 0, 5, 1, 3), True), ((6, 2, 6, 2, 3), False)):
        told = {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in zip(names, numbers, strict=True)}
        given = env | told | {"SLURM_JOB_NAME": "mine", "MEMSHARE_LOGS": str(tmp_path / "logs")}
        done = run(given, f"{ROOT}/slurm/mine.sbatch", "--round", "1")
        assert ("not some of them" in done.stderr) == refused
        assert (tmp_path / "logs").exists() != refused


def test_nothing_is_killed_by_name() -> None:
    for path in (ROOT / "slurm").iterdir():
        assert not re.search(r"\b(pkill|killall|pgrep|pidof)\b", path.read_text()), path
