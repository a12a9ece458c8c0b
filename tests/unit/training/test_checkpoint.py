from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memshare.config import TrainingConfig
from memshare.files import write_json
from memshare.training import checkpoint
from memshare.training.checkpoint import Best, CheckpointError, NotContinued, TrainState
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer, round_lr, state_tensors, warm_start
from memshare.training.resume import find, fixed_settings, resume
from tests.disks import fill_up, small_disk

STATE = TrainState(3, {"training.lr": 1e-3}, 7, "abcd1234", 0.5, 100, 120, 2.0)


def trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, TrainingConfig(lr=1e-2))
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(5, 4, generator=generator)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    for step in range(3, 6):
        advance(model, optimizer, step)
    again, other = trained(seed=0, steps=0)
    checkpoint.verify(folder)
    checkpoint.restore(folder, again, other)
    for step in range(3, 6):
        advance(again, other, step)
    assert same(weights(model), weights(again))
    assert checkpoint.read_state(folder) == STATE


def test_what_was_read_is_no_file_in_use(tmp_path: Path) -> None:
    """It is deleted while the run goes on, which NFS refuses for a file that is mapped."""
    model, optimizer = trained()
    best = checkpoint.trainable(model)
    state = replace(STATE, best=Best(2, {"nDCG@10": 0.5}, {"nDCG@10": 0.1}, 0))
    folder = checkpoint.save(tmp_path, model, optimizer, state, best)
    again, other = trained(seed=0, steps=0)
    checkpoint.restore(folder, again, other)
    kept = checkpoint.best_weights(folder, state)
    assert same(kept, best)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_only_what_learns_is_saved_and_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    assert "0.weight" not in checkpoint.trainable(model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=step))
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-00000015", "step-00000020"]
    checkpoint.discard(tmp_path, after=15)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000015"]
    checkpoint.discard(tmp_path)
    assert checkpoint.latest_intact(tmp_path) is None


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_one_is_refused_and_the_one_before_used(
    tmp_path: Path, name: str, harm: object, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    first = checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=5))
    second = checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=10))
    assert checkpoint.latest_intact(tmp_path) == second
    harm(second / name)  # type: ignore[operator]
    if name == "manifest.json" and harm is _flip:  # its last byte is a newline: make it count
        (second / name).write_text((second / name).read_text().replace("sha256", "sha255"))
    assert checkpoint.latest_intact(tmp_path) == first
    assert "step-00000010" in capsys.readouterr().err
    shutil.rmtree(first)
    assert checkpoint.latest_intact(tmp_path) is None


OPERATIONS = 11  # durable ones, of a save into a folder that has one already


@pytest.mark.parametrize("at", range(1, OPERATIONS + 2))
def test_a_crash_at_any_step_of_writing_leaves_the_old_one(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the n-th durable operation: what is found is whole, the old one or the new."""
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=5))

    class Crash(BaseException):
        pass

    count = 0

    def counted(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == at:
                raise Crash
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "rename", counted(Path.rename))
        try:
            checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=10))
            crashed = False
        except Crash:
            crashed = True
    assert crashed == (at <= OPERATIONS)  # else there are more of them to stop at
    found = checkpoint.latest_intact(tmp_path)
    assert found is not None
    assert checkpoint.read_state(found).step in ((5, 10) if crashed else (10,))
    assert len(checkpoint.checkpoints(tmp_path)) <= 2
    # And the next run is not hindered by what was left lying.
    folder = checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=15))
    assert checkpoint.latest_intact(tmp_path) == folder


def test_changed_settings_are_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    now = {"training.lr": 2e-3, "steps": 9}
    with pytest.raises(CheckpointError) as refused:
        find(tmp_path, now, must=False, allow_change=False)
    assert "training.lr: 0.001 -> 0.002" in str(refused.value)
    assert "steps: None -> 9" in str(refused.value)
    found = find(tmp_path, now, must=False, allow_change=True)
    changed = ["steps: None -> 9", "training.lr: 0.001 -> 0.002"]
    assert found == (folder, replace(STATE, settings=now), changed)
    found = find(tmp_path, STATE.settings, must=True, allow_change=False)
    assert found == (folder, STATE, [])


def test_a_setting_that_came_later_and_has_its_default_is_no_change(tmp_path: Path) -> None:
    model, optimizer = trained()
    now = fixed_settings(TrainingConfig(), processes=1)
    lora = {key: value for key, value in now["training.lora"].items() if key != "dropout"}
    earlier = {key: value for key, value in now.items() if key != "training.patience"}
    state = replace(STATE, settings={**earlier, "training.lora": lora, "training.gone": 7})
    folder = checkpoint.save(tmp_path, model, optimizer, state)
    with pytest.raises(NotContinued) as refused:
        find(tmp_path, {**now, "training.patience": 3}, must=False, allow_change=False)
    told = refused.value.why.splitlines()[1:]
    assert told == ["  training.gone: 7 -> None", "  training.patience: None -> 3"]
    state = replace(state, settings={**earlier, "training.lora": lora})
    shutil.rmtree(folder)
    checkpoint.save(tmp_path, model, optimizer, state)
    found = find(tmp_path, now, must=True, allow_change=False)
    assert found == (folder, replace(state, settings=now), [])
    dropped = {**now, "training.lora": {**now["training.lora"], "dropout": 0.5}}
    with pytest.raises(NotContinued, match=r"'dropout': 0\.05.* -> .*'dropout': 0\.5"):
        find(tmp_path, dropped, must=True, allow_change=False)


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    row = json.loads((folder / "state.json").read_text())
    for odd in ({**row, "new": 1}, {key: row[key] for key in row if key != "seed"}):
        write_json(folder / "state.json", odd)
        with pytest.raises(CheckpointError, match=rf"{folder} is of another version .*(new|seed)"):
            checkpoint.read_state(folder)


def test_copies_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    model, optimizer = trained()
    kept = checkpoint.save(tmp_path, model, optimizer, STATE)
    others = [tmp_path / name for name in (f"{kept.name}-keep", "step-best", "step-0000000a")]
    for other in others:
        shutil.copytree(kept, other)
    assert checkpoint.latest_intact(tmp_path) == kept
    for step in (4, 5, 6):
        checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=step))
    checkpoint.discard(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("damaged", [False, True])
def test_starting_afresh_for_want_of_an_intact_one_is_told(
    tmp_path: Path, damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    for step in (5, 10) if damaged else ():
        folder = checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=step))
        _cut(folder / "model.safetensors")
    start = replace(STATE, step=0)
    state, _ = resume(
        tmp_path, start, model, optimizer, World(torch.device("cpu")),
        how="auto", allow_change=False,
    )  # fmt: skip
    assert state == start
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (3 if damaged else 0)
    if damaged:
        assert told[0].endswith("; using the one before")
        assert told[1].endswith("; there is none before it")
        assert told[2].endswith(f"{tmp_path}: no intact checkpoint; starting from the beginning")


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    assert find(tmp_path, {}, must=False, allow_change=False) is None
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find(tmp_path, {}, must=True, allow_change=False)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    other = nn.Linear(4, 8)
    with pytest.raises(CheckpointError, match="other weights"):
        checkpoint.restore(folder, other, make_optimizer(other, TrainingConfig()))


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    old = checkpoint.save(tmp_path, model, optimizer, STATE)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are intact"):
        checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=9))
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert json.loads((old / "state.json").read_text())["step"] == 3


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    with small_disk(tmp_path / "disk", "256k") as disk:
        root = disk / "checkpoints"
        old = checkpoint.save(root, model, optimizer, STATE)
        ballast = fill_up(disk)
        with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are intact"):
            checkpoint.save(root, model, optimizer, replace(STATE, step=9))
        assert [path.name for path in root.iterdir()] == [old.name]
        assert checkpoint.latest_intact(root) == old
        ballast.unlink()
        new = checkpoint.save(root, model, optimizer, replace(STATE, step=9))
        assert checkpoint.latest_intact(root) == new


def test_an_old_checkpoint_that_can_not_be_deleted_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    states = [replace(STATE, step=step) for step in (3, 6, 9)]
    folders = [checkpoint.save(tmp_path, model, optimizer, state) for state in states[:2]]
    with small_disk(folders[0] / "busy", "64k"):  # as a file that NFS keeps while it is open
        last = checkpoint.save(tmp_path, model, optimizer, states[2])
        told = capsys.readouterr().err
    assert f"{folders[0]}: can't be deleted" in told and "busy" in told
    assert checkpoint.latest_intact(tmp_path) == last
    again = checkpoint.save(tmp_path, model, optimizer, replace(STATE, step=12))
    assert checkpoint.checkpoints(tmp_path) == [last, again]


def test_what_a_killed_save_left_behind_is_discarded(tmp_path: Path) -> None:
    model, optimizer = trained()
    kept = checkpoint.save(tmp_path, model, optimizer, STATE)
    half = tmp_path / ".step-00000007.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    checkpoint.discard(tmp_path, after=3)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_warm_optimizer_knows_the_parameters_that_are_the_same() -> None:
    model, optimizer = trained()
    past = {key: value.clone() for key, value in state_tensors(optimizer).items()}
    copy = {key: value.clone() for key, value in past.items()}
    again, other = trained(seed=1, steps=0)
    assert warm_start(other, past) == len({key.rpartition("/")[0] for key in past}) == 5
    for step in range(3, 5):  # as a run that was never cut in two
        again.load_state_dict(model.state_dict())
        advance(model, optimizer, step)
        advance(again, other, step)
        assert same(weights(model), weights(again))
    torch.manual_seed(0)
    wider = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    new = make_optimizer(wider, TrainingConfig())
    assert warm_start(new, copy) == 3  # of 5 known ones the last layer's two have grown
    assert not new.state.get(wider[2].weight) and not new.state.get(wider[2].bias)
    assert new.state[wider[1].bias]["step"] == 3


def test_the_learning_rate_of_a_round() -> None:
    assert {round_lr(TrainingConfig(lr=1e-3), number) for number in (1, 7)} == {1e-3}
    decays = TrainingConfig(lr=1e-3, round_lr_decay=0.5)
    rates = [round_lr(decays, number) for number in (1, 2, 3, 4, 5, 50)]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-4, 1e-4])


def test_a_run_that_nobody_watches_starts_afresh_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, STATE)
    world = World(torch.device("cpu"))
    state, _ = resume(
        tmp_path, replace(STATE, step=0), model, optimizer, world, how="same", allow_change=False
    )
    assert state == STATE and folder.exists()
    capsys.readouterr()
    start = replace(STATE, step=0, settings={"training.lr": 2e-3})
    with pytest.raises(NotContinued):
        resume(tmp_path, start, model, optimizer, world, how="auto", allow_change=False)
    state, _ = resume(tmp_path, start, model, optimizer, world, how="same", allow_change=False)
    assert state == start and not folder.exists()
    told = capsys.readouterr().err
    assert "made with other settings" in told and "training.lr: 0.001 -> 0.002" in told
    assert "--" not in told and "no intact checkpoint" not in told


def test_a_run_that_nobody_watches_starts_afresh_after_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Newer(TrainState):
        new: int = 1

    model, optimizer = trained()
    newer = Newer(**asdict(STATE))
    folder = checkpoint.save(tmp_path, model, optimizer, newer)
    world, start = World(torch.device("cpu")), replace(STATE, step=0)
    with pytest.raises(NotContinued):
        resume(tmp_path, start, model, optimizer, world, how="auto", allow_change=False)
    assert folder.exists()
    state, _ = resume(tmp_path, start, model, optimizer, world, how="same", allow_change=False)
    assert state == start and not folder.exists()
    told = capsys.readouterr().err
    assert "another version of memshare" in told and "--" not in told
