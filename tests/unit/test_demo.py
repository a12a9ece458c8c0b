"""serve/demo.py: what it does before anything is served."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_demo", ROOT / "serve" / "demo.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("agent", "scorer", "built"),
    [
        ("pocket", "pocket", ["pocket"]),
        ("pocket-small", "pocket", ["pocket", "pocket-small"]),
        ("/a/model", "/a/model", []),
    ],
)
def test_every_pocket_lm_that_is_named_is_built(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    agent: str, scorer: str, built: list[str],
) -> None:  # fmt: skip
    """The run folder holds somebody else's files, so that the demo ends right after."""
    (tmp_path / "other").touch()
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "program", lambda *line: ran.append(line))
    settings = (f"agent_llm.model={agent}", f"scorer_llm.model={scorer}", f"run.dir={tmp_path}")
    words = [word for setting in settings for word in ("--set", setting)]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        assert demo.main(["--config", str(ROOT / "configs/pocket.yaml"), *words]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ran == [("train/pocket_lm.py", name) for name in built]
