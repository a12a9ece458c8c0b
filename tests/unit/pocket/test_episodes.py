import random

from memshare.pocket.episodes import EpisodeWriter, capital, fill
from memshare.pocket.world import DOMAINS


def episodes(seed: int = 0, count: int = 400) -> list:
    writer = EpisodeWriter(random.Random(seed))
    return [writer.episode() for _ in range(count)]


def test_the_seed_decides() -> None:
    assert episodes(1, 50) == episodes(1, 50) != episodes(2, 50)


def test_hidden_ways_never_occur() -> None:
    parts = [
        text.split("{", 1)[0]
        for domain in DOMAINS
        for kind in domain.kinds
        for texts in (kind.middles, kind.closings)
        for text in texts
    ]
    text = "\n".join(turn.prompt + turn.answer for ep in episodes() for turn in ep.turns)
    assert not [part for part in parts if part in text]


def test_no_slot_is_left_open_and_nothing_is_empty() -> None:
    for episode in episodes():
        for turn in episode.turns:
            assert turn.prompt.strip()
            assert turn.answer.strip()
            for slot in ("{s}", "{S}", "{a}", "{A}"):
                assert slot not in turn.prompt + turn.answer


def test_most_last_answers_follow_the_nearest_example() -> None:
    several = [ep for ep in episodes() if len(ep.turns) > 1]
    known = [ep for ep in several if ep.turns[-1].learn]
    assert len(known) > 0.85 * len(several)

    def alike(a: str, b: str) -> float:
        left, right = set(a.split()), set(b.split())
        return len(left & right) / len(left | right)

    near = [ep for ep in known if alike(ep.turns[-1].answer, ep.turns[-2].answer) > 0.5]
    assert len(near) > 0.75 * len(known)


def test_an_answer_without_example_is_marked_unknown() -> None:
    writer = EpisodeWriter(random.Random(0))
    assert not any(writer.episode(shots=0).turns[0].learn for _ in range(50))


def test_a_quoted_subject_stays_quoted() -> None:
    assert fill("{S} saw {s}.", "“red hen”") == "“The red hen” saw “the red hen”."


def test_capital_and_fill() -> None:
    assert capital("{s} sings") == "{S} sings"
    assert fill("{S} and {s}, said {a}. {A}!", "red hen", "old Tom") == (
        "The red hen and the red hen, said old Tom. Old Tom!"
    )
