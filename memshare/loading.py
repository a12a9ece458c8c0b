"""Loading and saving models with transformers: by one thread at a time, and quietly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_ONE_AT_A_TIME = RLock()


@contextmanager
def using_transformers() -> Iterator[None]:
    """Load or save a model here, without the bars and reports that would fill every log.

    While transformers (5.23) loads, it replaces methods of its base class, functions of
    ``torch.nn.init`` and torch's default dtype, and puts back what it found. Two threads that do so
    at once, such as a gateway's agent and its next generation, can leave the replacements behind:
    from then on tied weights stay untied in every model, which answers noise.
    """
    from transformers.utils import logging

    with _ONE_AT_A_TIME:
        level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()
