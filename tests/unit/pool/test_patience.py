"""Waiting for a database that is away."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from memshare.pool import patience
from memshare.pool.errors import PoolError, PoolUnavailable
from memshare.pool.patience import when_available
from memshare.pool.store import PoolStore


def test_it_is_tried_again_with_its_reason_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "LONGEST_SECONDS", 0.02)
    reasons = iter(["refused", "starting up"])

    def call(left: int, *, right: int) -> int:
        for reason in reasons:
            raise PoolUnavailable(reason)
        return left + right

    assert when_available(threading.Event(), call, 2, right=3) == 5
    told = capsys.readouterr().err
    assert "away (refused)" in told and "away (starting up)" in told


def test_other_errors_are_not_waited_for() -> None:
    def call() -> None:
        raise PoolError("its schema is newer")

    with pytest.raises(PoolError, match="newer"):
        when_available(threading.Event(), call)


def test_a_stop_ends_the_waiting_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"postgresql://nobody@127.0.0.1:{probe.getsockname()[1]}/nothing"
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(PoolUnavailable, match=r"127\.0\.0\.1"):
        when_available(stop, PoolStore.open, url)
    assert 0.4 < time.monotonic() - began < 5.0
