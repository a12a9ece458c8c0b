"""The pool: where memories live."""

from memshare.pool.errors import InvalidMemory, PoolError, UnknownPool
from memshare.pool.store import PoolStore

__all__ = ["InvalidMemory", "PoolError", "PoolStore", "UnknownPool"]
