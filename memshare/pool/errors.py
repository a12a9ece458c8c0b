"""What can go wrong with a pool."""

from __future__ import annotations

import os

EXIT_DATABASE_AWAY = os.EX_UNAVAILABLE  # of a program that met `PoolUnavailable`: try again later


class PoolError(RuntimeError):
    """The pool's database can't do what was asked; the message says why and what to do."""


class PoolUnavailable(PoolError):
    """The database can't be reached, or is too busy to answer: it may work later."""


class UnknownPool(PoolError):
    """No pool has this name."""


class InvalidMemory(ValueError):
    """A memory that no pool takes; ``field`` names the offending part."""

    def __init__(self, field: str, problem: str) -> None:
        """Build the message ``field: problem``."""
        super().__init__(f"{field}: {problem}")
        self.field = field


class TransferError(RuntimeError):
    """A file or data set that can't be imported or exported as a whole."""
