"""AdamW's state divided over two processes: nobody holds all of it who does not write it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import tiny_encoder
from tests.training_runs import launch


def test_the_state_is_gathered_and_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    from tests.integration import moments_worker

    encoder, output = tiny_encoder(tmp_path / "encoder"), tmp_path / "out"
    output.mkdir()
    arguments = [str(encoder), str(output)]
    with launch(2, Path(str(moments_worker.__file__)), arguments, divided=True) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    held = [json.loads((output / f"held-{rank}.json").read_text()) for rank in range(2)]
    saved = load_file(output / "step-00000002" / "optimizer.safetensors")
    moments = sum(t.numel() * 4 for name, t in saved.items() if not name.endswith("/step"))
    assert held[0]["gathered"]["most"] == moments, "the one that writes has all of them"
    assert held[1]["gathered"]["most"] == held[1]["gathered"]["largest"] < moments / 2
    for each in (part["read"] for part in held):  # the one before, while the next is read
        assert 0 < each["most"] <= 2 * each["largest"] + each["now"] < moments
        assert each["now"] == 0, "copies of shares alone, and nothing of the file"
    # What is on disk is what the processes have: bit for bit, one's rows after the other's.
    ours = [load_file(output / f"own-{rank}") for rank in range(2)]
    parts = {key: [own[key] for own in ours] for key in ours[0]}
    together = [
        torch.cat(part) if not key.endswith("/step") else part[0] for key, part in parts.items()
    ]
    left = list(saved.values())
    assert len(left) == len(together)
    for tensor in together:
        at = next(i for i, other in enumerate(left) if torch.equal(tensor, other))
        left.pop(at)
