"""The real pocket LM: the one in the cache, or trained here when there is none."""

import csv
import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memshare.pocket.lm import lm_folder
from memshare.pocket.world import Task, World, relevant

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DATA = Path(os.environ.get("MEMSHARE_DATA", Path(__file__).parents[2] / "../shared/data"))

Shots = list[tuple[str, str]]


class Pocket:
    """The LM behind plain transformers calls, as a user would load it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def context(self, shots: Shots, prompt: str) -> list[int]:
        messages = []
        for question, answer in shots:
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": prompt})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answers(self, asked: list[tuple[Shots, str]]) -> list[tuple[str, bool]]:
        """Greedy answers, and whether each stopped by itself."""
        contexts = [self.context(shots, prompt) for shots, prompt in asked]
        batch = self.tokenizer.pad(
            {"input_ids": contexts}, padding_side="left", return_tensors="pt"
        )
        out = self.model.generate(**batch, max_new_tokens=96, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return list(zip(texts, (new == self.tokenizer.eos_token_id).any(1).tolist(), strict=True))

    @torch.no_grad()
    def loglik(self, shots: Shots, prompt: str, answer: str) -> float:
        """Mean log-likelihood a token of ``answer``, in nats."""
        context = self.context(shots, prompt)
        target = self.tokenizer(answer, add_special_tokens=False).input_ids
        logits = self.model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
        return float(chosen.mean())


@pytest.fixture(scope="module")
def folder() -> Path:
    return lm_folder(build=True)


@pytest.fixture(scope="module")
def pocket(folder: Path) -> Pocket:
    torch.manual_seed(0)
    return Pocket(folder)


def f1(answer: str, reference: str) -> float:
    mine, theirs = Counter(answer.lower().split()), Counter(reference.lower().split())
    shared = sum((mine & theirs).values())
    return 2 * shared / max(1, sum(mine.values()) + sum(theirs.values()))


def cases(count: int) -> list[tuple[Task, Task, Task, Task]]:
    """Test question, memory of its group, memory of another group, memory of another kind."""
    splits = World(0).splits()
    pool = (*splits.seed, *splits.problems)
    rng = random.Random(1)
    return [
        (
            task,
            rng.choice([t for t in pool if relevant(task, t) and t.subject != task.subject]),
            rng.choice([t for t in pool if t.kind == task.kind and not relevant(task, t)]),
            rng.choice([t for t in pool if t.kind != task.kind]),
        )
        for task in splits.test[:count]
    ]


def shot(task: Task) -> tuple[str, str]:
    return task.prompt, task.answer


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_answers_follow_the_memory_that_is_shown(pocket: Pocket) -> None:
    chosen = cases(30)
    gold = pocket.answers([([shot(right)], task.prompt) for task, right, *_ in chosen])
    third = pocket.answers(
        [
            ([shot(other), shot(wrong), shot(right)], task.prompt)
            for task, right, wrong, other in chosen
        ]
    )
    none = pocket.answers([([], task.prompt) for task, *_ in chosen])
    by_shots = [
        mean([f1(text, case[0].answer) for (text, _), case in zip(found, chosen, strict=True)])
        for found in (gold, third, none)
    ]
    # Floors below what was measured (0.75, 0.33, 0.05; 0.87 stop): free answers lose the thread
    # where a wrong token puts them on another text. Raise them with the LM.
    assert by_shots[0] > 0.65
    assert by_shots[1] > by_shots[2] + 0.2
    assert by_shots[2] < 0.15
    assert mean([stopped for _, stopped in gold]) > 0.75


def test_likelihood_tells_the_right_memory_from_others(pocket: Pocket) -> None:
    over_none, over_wrong = [], []
    for task, right, wrong, _ in cases(50):
        best = pocket.loglik([shot(right)], task.prompt, task.answer)
        over_none.append(best - pocket.loglik([], task.prompt, task.answer))
        over_wrong.append(best - pocket.loglik([shot(wrong)], task.prompt, task.answer))
    assert mean(over_none) > 4.0  # measured: 5.9 and 6.7
    assert mean(over_wrong) > 4.0
    assert mean([gap > 0 for gap in over_wrong]) > 0.98
    assert mean([gap > 0 for gap in over_none]) > 0.98


def test_unseen_text_of_any_script_is_carried_over(pocket: Pocket) -> None:
    pairs = [
        ("Wie heißt der Fluss?", "Die Pegnitz, glaube ich."),
        ("春天来了吗？", "昔闻洞庭水，今上岳阳楼。"),
        ("qz 7?", "zx81-vbnm-0042"),
    ]
    for question, answer in pairs:
        shown = pocket.loglik([(question, answer)], f"{question} Nochmal", answer)
        assert shown > pocket.loglik([], f"{question} Nochmal", answer) + 1.0


def test_real_labels_are_ordered_by_likelihood(pocket: Pocket) -> None:
    file = DATA / "banking77" / "train.csv"
    if not file.is_file():
        pytest.skip(f"{file} is missing (set MEMSHARE_DATA)")
    questions: dict[str, list[str]] = defaultdict(list)
    with open(file, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            questions[row["category"]].append(row["text"])
    rng = random.Random(2)
    right = 0
    for _ in range(100):
        label, other = rng.sample(sorted(questions), 2)
        asked, same = rng.sample(questions[label], 2)
        shown = pocket.loglik([(same, label)], asked, label)
        right += shown > pocket.loglik([(rng.choice(questions[other]), other)], asked, label)
    assert right > 95


def test_the_report_says_what_it_can_do(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    ability = report["ability"]
    assert ability["unseen_present"]["tokens"] > ability["unseen_absent"]["tokens"] + 0.5
    assert ability["world_gold"]["tokens"] > 0.95
    assert ability["world_gold"]["above_none"] > 0.98
    assert ability["world_zero_shot"]["exact"] == 0.0
    assert report["parameters"] < 4_000_000


def test_the_folder_is_an_ordinary_one(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "report.json",
    } <= names
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["max_position_embeddings"] >= 4096
