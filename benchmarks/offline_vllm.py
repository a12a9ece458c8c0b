"""vLLM's own offline engine, for benchmarks: run by vLLM's Python, without a server.

    .venv-vllm/bin/python benchmarks/offline_vllm.py SERVER-ARGUMENTS

takes the arguments of ``vllm.entrypoints.openai.api_server``, so that the engine is set up as the
server is; what only a server needs is left out. Says ``ready`` once it is, then answers each line
``{"prompts": [[token id, ...], ...], "starts": [n, ...]}`` by one line ``{"seconds": s, "means":
[nats per token of ids[start:], ...]}``. The seconds are those of generation alone: token ids in,
one token out with the prompt's log-probabilities, as a likelihood asks of the server.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def answer(llm: LLM, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> dict[str, object]:
    """All prompts in one call, as vLLM itself batches them."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
    began = time.perf_counter()
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    means = []
    for output, ids, start in zip(outputs, prompts, starts, strict=True):
        rows = output.prompt_logprobs
        scores = [rows[i][ids[i]].logprob for i in range(start, len(ids))]
        means.append(sum(scores) / len(scores))
    return {"seconds": seconds, "means": means}


def main() -> None:
    """Load, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    known, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(sys.argv[1:])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(known))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
