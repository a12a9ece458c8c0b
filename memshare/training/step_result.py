"""What became of training steps: their figures, or that one has ended the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch

from memshare.training.step_batch import StepBatch


class StepFailed(RuntimeError):
    """A step ends the training."""


class NonFinite(StepFailed):
    """The loss or its gradient became NaN or infinite; the message names the queries.

    ``done``: so many steps have led to weights that are no good.
    """

    def __init__(self, what: str, step: int, batch: StepBatch, done: int | None = None) -> None:
        """``step`` counts from 0; it is the step that failed, by default with its first weights."""
        self.done = step if done is None else done
        some = ", ".join(batch.query_ids[:16])
        more = f" and {len(batch.query_ids) - 16} more" if len(batch.query_ids) > 16 else ""
        super().__init__(
            f"step {step + 1}: {what} is not finite; the batch's queries are {some}{more}. Lower "
            "training.lr or look at these examples"
        )


class OutOfMemory(StepFailed):
    """A step needs more memory than its device has."""


@contextmanager
def memory_told() -> Iterator[None]:
    """Raise `OutOfMemory` for torch's, with what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{str(error).partition(' GPU ')[0]} Lower training.graph_tokens, then "
            "training.batch_tokens and encoder.batch_tokens (--dry-run estimates what they take), "
            "and run the same command again"
        ) from error


@dataclass(frozen=True, slots=True)
class StepResult:
    """Global figures of a step. ``tokens`` are real ones, ``padded`` include the padding; the docs
    of a frozen tower are in neither. ``flops`` are the model's (`flops`), of ``peak`` a second that
    the devices can do, where that is known.

    ``parts``: of the loss, by name, where it has several (`Objective`). ``stop`` is true where any
    process was asked to stop.
    """

    loss: float
    parts: Mapping[str, float]
    tokens: int
    padded: int
    stop: bool
    flops: float
    peak: float | None = None


class LogInterval:
    """The steps since the last line of the log, which says how they were on the whole.

    A single step's loss and speed hang on its batch; a line for each would be too many.
    """

    def __init__(self) -> None:
        """Has no step yet."""
        self._results: list[StepResult] = []
        self._seconds = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        """One step more, which took so long."""
        self._results.append(result)
        self._seconds += seconds

    def figures(self) -> dict[str, float]:
        """What the log shows of the steps added since it was last asked; there must be one.

        Means of the loss and its parts, throughput, and the share of tokens that are no padding.
        ``mfu``, the model FLOPs utilisation, is there where the devices' peak is known.
        """
        results, seconds = self._results, self._seconds
        self._results, self._seconds = [], 0.0
        last = results[-1]
        tokens, flops = sum(r.tokens for r in results), sum(r.flops for r in results)
        return {
            "loss": fmean(r.loss for r in results),
            **{f"loss/{name}": fmean(r.parts[name] for r in results) for name in last.parts},
            "tokens_per_second": tokens / seconds,
            "real_token_share": tokens / max(1, sum(r.padded for r in results)),
            "model_tflops_per_second": flops / seconds / 1e12,
            **({} if last.peak is None else {"mfu": flops / seconds / last.peak}),
        }
