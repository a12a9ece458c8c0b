"""Conversations from random worlds, from which the pocket LM learns to answer by example.

An episode is a chat: shots (a question and its answer) and a last question. Every episode has a
world of its own: answers follow forms drawn afresh, about subjects drawn afresh, in everyday
English, invented words or letters of many scripts; so all that can be learned is to read the
examples, chiefly the nearest one, carry its form over, put in the new subject, and stop. The
pocket world's boilerplate (how tasks are asked for) is used too; its hidden ways never are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from memshare.pocket import words
from memshare.pocket.language import ALIAS_SORTS, Kind
from memshare.pocket.world import DOMAINS

Ask = Callable[[str, str], str]  # a question, from its subject and a group's name

SLOT = "{s}"
_SCRIPTS = ((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x9FA5), (0x3041, 0x30FE))
_CUES = ("about", "for", "of", "to", "at", "with", "called", "named", "on", "between", "and", "is")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; ``learn``: whether the answer can be known from what precedes."""

    prompt: str
    answer: str
    learn: bool


@dataclass(frozen=True, slots=True)
class Episode:
    """Turns in order; the last one is the question that counts."""

    turns: tuple[Turn, ...]
    system: str = ""


class EpisodeWriter:
    """Writes episodes at random; ``rng`` decides everything."""

    def __init__(self, rng: random.Random) -> None:
        """Keep the source of randomness."""
        self.rng = rng

    def episode(self, long: float = 0.0, shots: int | None = None) -> Episode:
        """One episode; ``long`` is the chance of long answers, ``shots`` fixes their number."""
        rng = self.rng
        if shots is None:
            shots = rng.choices((0, 1, 2, 3, 4), (6, 38, 26, 22, 8))[0]
        draw = rng.random()
        if draw < 0.72:
            turns = self._ways(shots, rng.random() < long)
        elif draw < 0.9:
            turns = self._labels(shots)
        else:
            turns = self._echoes(shots, rng.random() < long)
        system = self.sentence("english") if rng.random() < 0.05 else ""
        return Episode(tuple(turns), system)

    # Kinds of episode.

    def _ways(self, shots: int, long: bool) -> list[Turn]:
        """Answers follow forms with a slot for the subject, as in the pocket world."""
        rng = self.rng
        style = self.style()
        plan = self._plan(shots)
        slots = rng.choices((0, 1, 2), (1, 10, 3))[0]
        forms = [self.form(style, slots, long) for _ in range(max(plan) + 1)]
        ask = self._pocket_ask() if rng.random() < 0.5 else self._random_ask(style)
        names = [self.name(style) for _ in range(len(plan) * 2)]
        quoted = rng.random() < 0.7
        turns = []
        for place, which in enumerate(plan):
            subject = self.subject(style)
            if quoted:
                subject = f"“{subject}”"
            same_name = rng.random() < 0.3
            name = names[which] if same_name else rng.choice(names)
            turns.append(
                Turn(ask(subject, name), fill(forms[which], subject), which in plan[:place])
            )
        return turns

    def _labels(self, shots: int) -> list[Turn]:
        """Answers are short labels, as in a classification task."""
        rng = self.rng
        style = self.style()
        plan = self._plan(shots)
        joint = rng.choice(("_", "_", "_", " ", "-", ""))
        labels = [
            joint.join(self.word(style) for _ in range(rng.randint(1, 5)))
            for _ in range(max(plan) + 1)
        ]
        themes = [[self.word(style) for _ in range(3)] for _ in labels]
        turns = []
        for place, which in enumerate(plan):
            text = self.clause(style, rng.randint(4, 14)).split(" ")
            for word in rng.sample(themes[which], rng.randint(0, 2)):
                text.insert(rng.randrange(len(text) + 1), word)
            end = rng.choice(("?", ".", "?", ""))
            turns.append(Turn(capital(" ".join(text)) + end, labels[which], which in plan[:place]))
        return turns

    def _echoes(self, shots: int, long: bool) -> list[Turn]:
        """Answers are free text that comes back as it was."""
        style = self.style()
        plan = self._plan(shots)
        answers = [self.form(style, 0, long) for _ in range(max(plan) + 1)]
        return [
            Turn(self.sentence(style), answers[which], which in plan[:place])
            for place, which in enumerate(plan)
        ]

    def _plan(self, shots: int) -> list[int]:
        """Which form each turn follows, the question last; mostly the nearest shot's."""
        rng = self.rng
        kinds = rng.randint(1, max(1, shots))
        plan = [rng.randrange(kinds) for _ in range(shots)]
        if not plan:
            return [0]
        draw = rng.random()
        if draw < 0.88:
            plan.append(plan[-1])
        elif draw < 0.94:
            plan.append(rng.choice(plan))
        else:
            plan.append(kinds)
        order = {which: number for number, which in enumerate(dict.fromkeys(plan))}
        return [order[which] for which in plan]

    # Questions.

    def _pocket_ask(self) -> Ask:
        rng = self.rng
        domain = rng.choice(DOMAINS)
        kinds: tuple[Kind, ...] = (rng.choice(domain.kinds),)
        if rng.random() < 0.2:
            kinds = domain.kinds

        def ask(subject: str, name: str) -> str:
            text = fill(rng.choice(rng.choice(kinds).asks), subject, name)
            scene = rng.choice(domain.scenes) if rng.random() < 0.8 else self.sentence("english")
            return f"{text} {scene}" if rng.random() < 0.5 else f"{scene} {text}"

        return ask

    def _random_ask(self, style: str) -> Ask:
        rng = self.rng
        templates = []
        for _ in range(rng.randint(1, 3)):
            before = self.clause(style, rng.randint(1, 7))
            after = self.clause(style, rng.randint(0, 6))
            middle = rng.choice(
                (SLOT, f"{rng.choice(_CUES)} {SLOT}", f"{rng.choice(_CUES)} {SLOT}")
            )
            stop = rng.choice((",", " as", " the way", ".", "", " that", ":"))
            templates.append(capital(f"{before} {middle}{stop} {after}".strip()))

        def ask(subject: str, name: str) -> str:
            text = fill(rng.choice(templates), subject)
            if rng.random() < 0.5:
                text = f"{text} {name}"
            text += rng.choice((".", "?", ""))
            if rng.random() < 0.4:
                other = self.sentence(style)
                text = f"{text} {other}" if rng.random() < 0.5 else f"{other} {text}"
            return text

        return ask

    # Text.

    def style(self) -> str:
        """What an episode's words are made of."""
        return self.rng.choices(("english", "mixed", "invented", "script"), (50, 25, 20, 5))[0]

    def word(self, style: str) -> str:
        """One word."""
        rng = self.rng
        if style == "mixed":
            style = "english" if rng.random() < 0.6 else "invented"
        if style == "english":
            word = rng.choice(words.ENGLISH)
            if rng.random() < 0.12:  # a word that the tokenizer cuts into pieces
                word = rng.choice(words.ENGLISH)[: rng.randint(2, 4)] + rng.choice(words.SYLLABLES)
            return f"{word}'s" if rng.random() < 0.02 else word
        if style == "invented":
            return "".join(rng.choices(words.SYLLABLES, k=rng.randint(1, 4)))
        low, high = rng.choice(_SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 3)))

    def clause(self, style: str, length: int) -> str:
        """About ``length`` words; English ones half the time in the order of a sentence."""
        rng = self.rng
        if style != "english" or rng.random() < 0.35:
            return " ".join(self.word(style) for _ in range(length))
        out: list[str] = []
        while len(out) < length:
            out += [rng.choice(words.SMALL)] if rng.random() < 0.3 else ["the"]
            if rng.random() < 0.4:
                out.append(rng.choice(words.ADJECTIVES))
            noun = rng.choice(words.NOUNS) if rng.random() < 0.7 else self.word("english")
            out += [noun, rng.choice(words.VERBS) if rng.random() < 0.7 else self.word("english")]
            if rng.random() < 0.5:
                out.append(rng.choice(words.PREPOSITIONS))
            noun = rng.choice(words.NOUNS) if rng.random() < 0.7 else self.word("english")
            out += [rng.choice(("the", "a", "my", "no")), noun]
            if rng.random() < 0.4:
                out.append(rng.choice(words.LINKS))
        return " ".join(out[:length])

    def sentence(self, style: str) -> str:
        """A sentence with its stop."""
        rng = self.rng
        return capital(self.clause(style, rng.randint(4, 14))) + rng.choice((".", ".", "?", "!"))

    def form(self, style: str, slots: int, long: bool) -> str:
        """An answer's hidden form, one to four sentences with ``slots`` places for the subject."""
        rng = self.rng
        size = rng.randint(40, 120) if long else rng.randint(5, 34)
        places = set(rng.sample(range(size), slots))
        plain = rng.random() < 0.15  # no capitals, few stops
        ends = set()
        place = rng.randint(4, 14)
        while place < size - 2 and not plain:
            ends.add(place)
            place += rng.randint(4, 14)
        out: list[str] = []
        for place, word in enumerate(self.clause(style, size).split(" ")):
            text = SLOT if place in places else word
            if not plain and (place == 0 or place - 1 in ends):
                text = capital(text)
            if place in ends:
                text += rng.choice((".", ".", ".", ";", "!", "?", ":", ",", ".\n"))
            elif place + 1 < size and rng.random() < 0.08:
                text += rng.choice((",", ",", ";", ":", " -"))
            out.append(text)
        return " ".join(out) + rng.choice((".", ".", ".", ".", "!", "?", ""))

    def subject(self, style: str) -> str:
        """What a question is about: one to three words, mostly two."""
        rng = self.rng
        draw = rng.random()
        if style in ("english", "mixed") and draw < 0.7:
            if draw < 0.2:
                return rng.choice(rng.choice(DOMAINS).subjects)
            first = rng.choice(words.ADJECTIVES) if draw < 0.5 else self.word("mixed")
            return f"{first} {self.word(style)}"
        return " ".join(self.word(style) for _ in range(rng.choice((1, 2, 2, 3))))

    def name(self, style: str) -> str:
        """A group's name in one of the pocket world's frames, or any words."""
        rng = self.rng
        if rng.random() < 0.7:
            frame, known = rng.choice(ALIAS_SORTS)
            return frame.format(rng.choice(known) if rng.random() < 0.5 else self.word(style))
        return " ".join(self.word(style) for _ in range(rng.randint(1, 3)))


def capital(text: str) -> str:
    """The text with a capital first letter; a slot stays one."""
    if text.startswith(SLOT):
        return "{S}" + text[len(SLOT) :]
    return text[:1].upper() + text[1:]


def fill(text: str, subject: str, name: str = "") -> str:
    """Put subject (quoted if it is) and name into a text; capital slots begin a sentence."""
    mark, bare = ("“", subject[1:]) if subject.startswith("“") else ("", subject)
    return (
        text.replace("{s}", f"{mark}the {bare}")
        .replace("{S}", f"{mark}The {bare}")
        .replace("{a}", name)
        .replace("{A}", capital(name))
    )
