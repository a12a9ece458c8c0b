"""The rules of the house that no other tool checks."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = ("train", "serve")
PROGRAMS = sorted(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))
LIBRARY = sorted((ROOT / "memshare").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", PROGRAMS + LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_are_never_imported(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    names = {program.stem for program in PROGRAMS}
    assert not tops & set(WINGS)
    if path in PROGRAMS:
        # `accelerate launch train/x.py` puts train/ first on sys.path: a neighbour would win.
        assert not (tops & names) - {"memshare"}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_are_short_and_shadow_no_module(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 200
    assert path.stem not in sys.stdlib_module_names
    spec = importlib.util.find_spec(path.stem)
    assert spec is None or Path(str(spec.origin)).parent == path.parent


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_config_and_records_import_nothing_heavy() -> None:
    heavy = {"torch", "faiss", "vllm", "transformers", "sqlalchemy"}
    room = ROOT / "memshare"
    for path in (*(room / "config").glob("*.py"), room / "records.py", room / "files.py"):
        assert not {name.split(".")[0] for name in imports(path)} & heavy


@pytest.mark.parametrize("program", ["continual", "mine"])
def test_what_loads_no_model_loads_no_torch(program: str) -> None:
    """It takes ten seconds with all that comes with it, and the loop waits for days."""
    heavy = ["torch", "faiss", "transformers", "accelerate", "datasets", "pandas", "scipy"]
    run = f"import runpy, sys; runpy.run_path('train/{program}.py'); "
    tell = f"print(sorted({{*sys.modules}} & {{*{heavy}}}))"
    done = subprocess.run(
        [sys.executable, "-c", run + tell], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
