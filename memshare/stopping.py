"""Being told to stop: by SIGTERM, by Ctrl-C, or by a terminal that is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


def on_stop(stop: Callable[[str], object]) -> None:
    """Call ``stop`` with the first such signal's name; later ones change nothing.

    For programs whose children are in sessions of their own: a signal that just ended the program,
    or interrupted its stopping, would leave them running. A closed terminal sends SIGHUP, which
    stays ignored where whoever started the program (nohup) had it ignored.
    """

    def first(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which children would inherit
        stop(signal.Signals(number).name)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for each in numbers:
        signal.signal(each, first)
