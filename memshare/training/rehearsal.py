"""Prepares an encoder as a training would, on the CPU, and forgets it.

``python -m memshare.training.rehearsal`` says what can't be trained: a loop wants to know before it
mines for hours, and would hold the model for as long as it lives.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from memshare.config import ConfigError, add_config_arguments, load_config
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training import outcome
from memshare.training.towers import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse; returns the exit code."""
    parser = argparse.ArgumentParser(description="Whether a training could begin.")
    add_config_arguments(parser)
    parser.add_argument("--encoder", required=True, help="folder or name to start from")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        chosen = config.encoder.model_copy(update={"model": args.encoder, "device": "cpu"})
        prepare(Encoder.load(chosen), config.training, seed=0)
    except (ConfigError, EncoderError) as error:
        return outcome.tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
