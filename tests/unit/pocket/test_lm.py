import dataclasses
import multiprocessing
import time
from pathlib import Path

import pytest

from memshare.pocket import lm
from memshare.pocket.recipe import Recipe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMSHARE_CACHE", str(tmp_path))
    return tmp_path


def finish(folder: Path) -> None:
    (folder / "report.json").write_text("{}")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_CACHE", "/a")
    assert lm.cache_dir() == Path("/a")
    monkeypatch.delenv("MEMSHARE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert lm.cache_dir() == Path("/b/memshare")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert lm.cache_dir() == Path("/c/.cache/memshare")


def test_a_missing_lm_says_what_to_run(cache: Path) -> None:
    with pytest.raises(lm.PocketLMMissing, match=r"python train/pocket_lm\.py"):
        lm.lm_folder()
    with pytest.raises(lm.PocketLMMissing, match=r"python train/pocket_lm\.py pocket-small"):
        lm.lm_folder("pocket-small")


def test_each_name_is_a_model_of_its_own() -> None:
    assert len({lm.folder_of(recipe) for recipe in lm.RECIPES.values()}) == len(lm.RECIPES) == 2


def test_another_recipe_is_another_folder() -> None:
    recipe = Recipe()
    assert recipe.name() == Recipe().name()
    assert dataclasses.replace(recipe, steps=recipe.steps + 1).name() != recipe.name()


def test_a_finished_build_is_found(cache: Path) -> None:
    folder = lm.folder_of(Recipe())
    with lm.building(folder) as partial:
        assert partial is not None
        finish(partial)
        assert not folder.exists()
    assert lm.lm_folder() == folder


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    folder = lm.folder_of(Recipe())
    with pytest.raises(RuntimeError, match="halfway"), lm.building(folder) as partial:
        assert partial is not None
        (partial / "model.safetensors").write_text("half")
        raise RuntimeError("halfway")
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.lock"]


def test_an_unfinished_folder_is_replaced(cache: Path) -> None:
    folder = lm.folder_of(Recipe())
    folder.mkdir(parents=True)
    (folder / "old").touch()
    with lm.building(folder) as partial:
        assert partial is not None
        finish(partial)
    assert not (folder / "old").exists()
    assert lm.is_built(folder)


def test_what_a_killed_build_left_is_cleared_away(cache: Path) -> None:
    folder = lm.folder_of(Recipe())
    stale = folder.with_name(f".{folder.name}.abcd")
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_text("half")
    with lm.building(folder) as partial:
        assert partial is not None
        finish(partial)
    assert not stale.exists()


def _slow_build(folder: Path, started: "multiprocessing.synchronize.Event") -> None:
    with lm.building(folder) as partial:
        assert partial is not None
        started.set()
        time.sleep(0.5)
        finish(partial)


def test_a_second_builder_waits_and_finds_the_work_done(cache: Path) -> None:
    folder = lm.folder_of(Recipe())
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    other = context.Process(target=_slow_build, args=(folder, started))
    other.start()
    try:
        assert started.wait(60)
        with lm.building(folder) as partial:
            assert partial is None
        assert lm.is_built(folder)
    finally:
        other.join(60)
    assert other.exitcode == 0
