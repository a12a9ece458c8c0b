"""Whether two generations fit on a GPU, and what the loader does where they don't."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.config import Config
from memshare.retrieval import placing
from memshare.retrieval.gpu import generation_bytes, placement
from memshare.retrieval.placing import Placer
from tests.retrieving import make_config

GIB = 2**30


@pytest.mark.parametrize(
    ("following", "serving", "budget", "free", "expected"),
    [
        (3, 3, None, None, "beside"),  # nothing is known, nothing is limited
        (3, 0, 4, None, "beside"),
        (3, 3, 6, None, "beside"),
        (3, 3, 5, None, "aside"),
        (6, 3, 5, None, "cpu"),
        (3, 3, None, 3, "beside"),
        (3, 3, None, 2, "aside"),  # 2 are free, and 3 more once the old one is gone
        (6, 3, None, 2, "cpu"),
        (3, 3, 100, 1, "aside"),  # vLLM has taken more than the budget thought of
        (3, 3, 5, 100, "aside"),
        (3, 0, None, 0, "cpu"),
        (0, 9, 1, 1, "beside"),  # it takes nothing
    ],
)
def test_placement(
    following: int, serving: int, budget: int | None, free: int | None, expected: str
) -> None:
    assert placement(following, serving, budget, free) == expected


SIZES = st.integers(0, 100)


@given(SIZES, SIZES, st.none() | SIZES, st.none() | SIZES)
def test_no_limit_is_ever_passed(
    following: int, serving: int, budget: int | None, free: int | None
) -> None:
    chosen = placement(following, serving, budget, free)
    before_is_gone = 0 if chosen == "aside" else serving
    if chosen != "cpu" and following:
        assert budget is None or following + before_is_gone <= budget
        assert free is None or following + before_is_gone <= free + serving


def test_estimated_bytes() -> None:
    files = {"index.faiss": 800, "encoder/model.safetensors": 50, "encoder/tokenizer.json": 9}
    whole = generation_bytes(files, encoder=True, index=True)
    halved = generation_bytes(files, encoder=True, index=True, halved=True)
    assert whole - halved == 400
    assert whole == sum(generation_bytes(files, encoder=on, index=not on) for on in (True, False))
    assert generation_bytes(files, encoder=False, index=False) == 0


class Recorder:
    """A serving that notes where it is told to go."""

    number = 2

    def __init__(self, fails: bool = False) -> None:
        self.moves: list[tuple[str, Any]] = []
        self._fails = fails

    def move_up(self, device: str, place: Any) -> None:
        self.moves.append((device, place))
        if self._fails and device != "cpu":
            raise RuntimeError("CUDA out of memory")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A machine with a GPU of which 3 GiB are free, as far as a placer can tell."""

    class Device:
        type = "cuda"
        index = 1

    monkeypatch.setattr(placing, "free_gpu_bytes", lambda number: 3 * GIB)
    monkeypatch.setattr(placing, "pick_device", lambda name: Device())
    monkeypatch.setattr(placing, "gpu_place", lambda mode, precision, number: "place")
    yield make_config(tmp_path, tmp_path, gpu_memory_gib=4.0)


def test_the_next_one_is_loaded_aside_and_moves_up(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"index.faiss": 2 * GIB, "encoder/model.safetensors": 0}
    placer = Placer(config)
    one = placer.choose(1, files)
    assert (one.placement, one.place) == ("beside", "place")
    placer.serves(one)
    two = placer.choose(2, files)  # 2.5 GiB each, the budget is 4
    assert (two.placement, two.device, two.place) == ("aside", "cpu", None)
    assert "loaded on the CPU and moves to the GPU after the swap" in capsys.readouterr().err
    placer.serves(two)
    serving = Recorder()
    placer.move_up(serving, two)  # type: ignore[arg-type]
    assert serving.moves == [("cpu", "place")]  # the configured device, and its place
    assert placer.choose(3, files).placement == "aside"
    assert placer.choose(3, {"index.faiss": 9 * GIB}).placement == "cpu"


def test_a_move_that_fails_is_undone(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    device = config.encoder.model_copy(update={"device": "cuda"})
    placer = Placer(config.model_copy(update={"encoder": device}))
    choice = placer.choose(2, {"index.faiss": 2 * GIB})
    serving = Recorder(fails=True)
    placer.move_up(serving, choice)  # type: ignore[arg-type]
    assert serving.moves == [("cuda", "place"), ("cpu", None)]
    assert "generation 2 stays on the CPU: CUDA out of memory" in capsys.readouterr().err
