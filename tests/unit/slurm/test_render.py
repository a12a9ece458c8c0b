"""Resolved scripts: what is in them, what they refuse, and that bash and shellcheck take them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from memshare.cli import main
from memshare.config import ConfigError, load_config
from memshare.slurm.render import JOBS, ROOT, Site, check, load_site, render

SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix != ".yaml")
TRAIN = ["--examples", "a folder/000001", "--output", "a; b 'c' \"d\" *"]


def shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: make servers")
    words = ["shellcheck", "--external-sources", f"--source-path={ROOT}", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_as_they_stand(path: Path) -> None:
    shellcheck(path)


def test_every_job_has_its_script() -> None:
    assert {path.stem for path in SCRIPTS if path.suffix == ".sbatch"} == set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_a_resolved_script_holds_the_site_and_the_arguments(job: str, tmp_path: Path) -> None:
    site = Site(
        partition="gpu", gpus_per_node=8, python="apptainer exec --nv x.sif python",
        logs=tmp_path / "my logs", env={"HF_HOME": "/a b"}, setup=("module load cuda",),
        sbatch=("--comment=two words", "--exclusive"), warning_seconds=60,
    )  # fmt: skip
    script = render(job, site, ["--nodes=2"], TRAIN)
    path = tmp_path / f"{job}.sbatch"
    path.write_text(script)
    shellcheck(path)
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --partition=gpu" in head and "#SBATCH --gpus-per-node=8" in head
    assert '#SBATCH --comment="two words"' in head and "#SBATCH --exclusive" in head
    # the last one counts
    assert [line for line in head if "--signal" in line][-1] == "#SBATCH --signal=B:USR1@60"
    body = script[: script.index("set -euo pipefail")]
    assert body.splitlines()[0] == "#!/bin/bash"
    commands = [line for line in body.splitlines() if line and not line.startswith("#")]
    assert commands[-2] == "module load cuda"  # with the variables set, before the program
    # bash gives the program the very arguments, whatever is in them
    asked = "\n".join([*commands[:-2], commands[-1], 'printf "%s\\n" "$HF_HOME" "$@"'])
    told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["/a b", *TRAIN]


def test_a_site_file_is_checked_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("partitoin: gpu\nwarning_seconds: 1\nenv: {'A;B': c}\nsbatch: [exclusive]\n")
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    told = str(caught.value)
    assert "4 problem(s)" in told
    assert all(key in told for key in ("partitoin", "warning_seconds", "A;B", "sbatch.0"))
    with pytest.raises(ConfigError, match="can't be read"):
        load_site(tmp_path / "none.yaml")
    for option in ("--comment=a\nrm -r x", "exclusive"):
        with pytest.raises(ConfigError, match="one line"):
            render("train", Site(), [option], [])


def test_a_time_is_none_of_yaml_s_numbers_and_a_number_is_told_to_be_quoted(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("time: 24:00:00\n")
    assert "--time=24:00:00" in load_site(path).options
    path.write_text("account: 2001\nenv: {MEMSHARE_PROCESSES: 4}\ngpus_per_node: -1\n")
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    told = str(caught.value)
    assert "account: Input should be a valid string; put it into quotes\n" in told
    assert "env.MEMSHARE_PROCESSES: Input should be a valid string; put it into quotes" in told
    assert told.count("quotes") == 2


def test_the_example_is_a_site() -> None:
    site = load_site(ROOT / "slurm" / "site.example.yaml")
    assert site.gpus_per_node == 8 and "--account=my-project" in site.options


def test_what_would_fail_in_the_queue_is_refused_before() -> None:
    lite = load_config(None)
    postgres = load_config(None, ["database_url=postgresql+psycopg://db/memshare"])
    check("mine", postgres, [], 1, 8)
    check("mine", lite, [], 1, 1)
    check("train", lite, ["--examples=a", "--output", "b"], 4, 8)
    with pytest.raises(ConfigError, match="need PostgreSQL"):
        check("mine", lite, [], 1, 8)
    with pytest.raises(ConfigError, match="one node"):
        check("loop", postgres, [], 2, 8)
    with pytest.raises(ConfigError, match="--examples"):
        check("train", lite, ["--output", "b"], 1, 8)


def test_dry_runs_print_and_submit_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch anywhere
    config, site = tmp_path / "config.yaml", tmp_path / "site.yaml"
    config.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}}))
    site.write_text(yaml.safe_dump({"logs": str(tmp_path / "logs")}))
    words = ["--site", str(site), "--config", str(config), "--set", "training.lr=1e-5"]
    assert main(["slurm", "render", *words, "--nodes", "3", "train", *TRAIN]) == 0
    rendered = capsys.readouterr().out
    assert "#SBATCH --nodes=3" in rendered
    for wrong in (["--nodes", "0", "train"], ["--array", "0", "mine"], ["--array", "-3", "mine"]):
        with pytest.raises(SystemExit):  # -3 rendered --array=0--4, and 0 was 8
            main(["slurm", "render", *words, *wrong])
        assert "is less than 1" in capsys.readouterr().err
    assert main(["slurm", "submit", "--dry-run", *words, "--nodes", "3", "train", *TRAIN]) == 0
    assert capsys.readouterr().out == rendered
    assert not (tmp_path / "logs").exists()

    array = [*words, "--set", "database_url=postgresql+psycopg://db/memshare", "--array", "4"]
    assert main(["slurm", "render", *array, "mine"]) == 0
    rendered = capsys.readouterr().out
    assert "#SBATCH --array=0-3" in rendered and "--round 1" in rendered
    assert main(["slurm", "submit", *words, "train", *TRAIN]) == 2
    assert "sbatch is not here" in capsys.readouterr().err
    assert main(["slurm", "submit", *words, "--array", "4", "loop"]) == 2
    assert main(["slurm", "submit", "--site", str(site), "loop"]) == 2
