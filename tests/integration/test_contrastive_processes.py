"""train/contrastive.py in several processes: they compute what one would, and one of them dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from safetensors.torch import load_file

from tests.tiny import tiny_decoder, tiny_t5
from tests.training_data import unlearnable, write_round
from tests.training_runs import (
    PROGRAM,
    launch,
    logged,
    options,
    result,
    steps_saved,
    wait_for,
)


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of all modes of gradient_worker.py."""
    from tests.integration import gradient_worker

    folder = tmp_path_factory.mktemp("one")
    tiny_t5(base / "t5")
    tiny_decoder(base / "qwen3")
    gradient_worker.main(base / "encoder", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "divided"), [(2, False), (4, False), (2, True)], ids=["2", "4", "2-fsdp"]
)
def test_gradients_of_several_processes_are_those_of_one(
    base: Path, one: Path, tmp_path: Path, processes: int, divided: bool
) -> None:
    from tests.integration import gradient_worker

    many = tmp_path / "many"
    many.mkdir()
    worker = Path(str(gradient_worker.__file__))
    arguments = [str(base / "encoder"), str(many)]
    with launch(processes, worker, arguments, divided=divided) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for name in gradient_worker.BATCHES:
        for mode in gradient_worker.MODES:
            want = load_file(one / f"{name}-{mode}-0.safetensors")
            largest = max(float(g.abs().max()) for g in want.values())
            assert largest > 1e-3
            for rank in range(processes):
                got = load_file(many / f"{name}-{mode}-{rank}.safetensors")
                assert got.keys() == want.keys()
                assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
                losses = (json.loads((f / f"{name}-{mode}-{r}.json").read_text())
                          for f, r in ((one, 0), (many, rank)))  # fmt: skip
                assert next(losses) == pytest.approx(next(losses), abs=1e-5)
    for mode, (name, _) in gradient_worker.REPLAYED.items():
        plain = load_file(one / f"thirteen-{name}-0.safetensors")
        for folder, rank in [(one, 0), *((many, rank) for rank in range(processes))]:
            got, again = (
                load_file(folder / f"{graphs}-{mode}-{rank}.safetensors")
                for graphs in gradient_worker.GRAPHS
            )
            assert got.keys() == again.keys() == plain.keys()
            assert all(got[n].equal(again[n]) for n in got), (mode, rank)
            largest = max(float(g.abs().max()) for g in plain.values())
            apart = max(float((got[n] - plain[n]).abs().max()) for n in got) / largest
            if "dropout" in mode:
                assert apart > 0.1  # it is on
            else:
                assert 1e-5 < apart < 1e-2  # rounded, and no more than that
    for rank in range(processes):
        told = (many / f"different-{rank}.txt").read_text()
        assert "see other examples than process 0" in told


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory, program: ModuleType) -> Path:
    """What one process trains, undisturbed."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert program.main(options(base, output, "--set=training.dropout=false", steps=40)) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "divided"), [(2, False), (2, True), (4, False)],
    ids=["2-ddp-then-fsdp", "2-fsdp-then-ddp", "4-ddp-then-fsdp"],
)  # fmt: skip
def test_several_processes_train_as_one_and_survive_a_killed_one(
    base: Path, alone: Path, tmp_path: Path, processes: int, divided: bool
) -> None:
    """A checkpoint says nothing of how the processes divide the work: the other way goes on."""
    many = tmp_path / "many"
    share = f"--set=training.batch_size={8 // processes}"
    arguments = options(base, many, "--set=training.dropout=false", share, steps=40)
    with launch(processes, PROGRAM, arguments, divided=divided) as process:
        wait_for(lambda: bool(steps_saved(many)), process)
        workers = [p for p in psutil.Process(process.pid).children() if str(PROGRAM) in p.cmdline()]
        assert len(workers) == processes
        workers[-1].kill()
        _, errors = process.communicate(timeout=120)  # it ends, and does not hang
        assert process.returncode != 0 and "SIGKILL" in errors
        psutil.wait_procs(workers, timeout=30)
    assert not (many / "encoder").exists()
    with launch(processes, PROGRAM, arguments, divided=not divided) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert "continuing from" in errors
    assert f"processes x queries a step: {processes} x {8 // processes} = 8;" in errors
    for got, want in zip(logged(many), logged(alone), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    ours, theirs = (load_file(f / "encoder" / "model.safetensors") for f in (many, alone))
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_whose_launcher_is_gone_saves_and_ends(
    base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Nothing would end it otherwise, and nobody would wait for it."""
    output = tmp_path / "out"
    with launch(1, PROGRAM, options(base, output, steps=100_000)) as process:
        wait_for(lambda: bool(steps_saved(output)), process)
        [training] = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(60) == -number
        training.wait(60)
        assert "steps done; stopped as asked" in process.communicate()[1]
    told = result(output)
    assert told["status"] == "stopped" and steps_saved(output)[-1] == told["steps"]


@pytest.mark.slow
def test_several_processes_end_an_empty_round_together(base: Path, tmp_path: Path) -> None:
    write_round(tmp_path / "round", unlearnable(20))
    output = tmp_path / "out"
    arguments = [*options(base, output), "--examples", str(tmp_path / "round")]
    with launch(2, PROGRAM, arguments) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0  # accelerate's, for 66
    assert errors.count("error: no query has a negative") == 1, errors
    assert result(output)["status"] == "empty" and not (output / "encoder").exists()
