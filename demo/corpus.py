"""Training conversations, drawn without end from the wording tables."""

from __future__ import annotations

import random
from dataclasses import dataclass

from moe_local.demo.documents import stray_words
from moe_local.demo.gate import held_out, normalize
from moe_local.demo.intents import ASPECTS, Book, Subject, load_book, split_patterns
from moe_local.demo.phrasing import Choices, add_noise
from moe_local.demo.wordings_frames import (
    COMMAND_FRAMES,
    FOLLOW,
    MEMORY_GB,
    MODEL_NAMES,
    PAIR_FRAMES,
    SYLLABLES,
    SYSTEM_PROMPTS,
    TOPIC_FRAMES,
    UNKNOWN_FRAMES,
    UNKNOWN_THINGS,
    UNKNOWN_WHOLE,
    WISH_FRAMES,
)

# Words that decide what a question asks for: word dropout leaves them alone.
_DECIDING = (
    "not no why how what who when if where which example examples difference many much big size my "
    "name i you your full wrong missing fits long first download delete remove start server fast faster "
    "slow work works memory"
)
_POLITE = ("thanks", "bye", "greet", "ok", "praise", "wellbeing", "thanks", "ok", "clarify", "joke", "thanks")
_KEEPS_TOPIC = frozenset({"ok", "thanks", "praise"})  # after these, "why?" still means the topic before
_SIZES = {
    "mixtral": "mixtral_size",
    "qwen": "qwen_size",
    "deepseek": "deepseek_size",
    "gptoss": "gptoss_size",
}
_SIZE_FOLLOW = (
    "how (big|large|heavy) is (it|that|this model) ; how (much|many gb of) (memory|vram|ram|space) does "
    "(it|that|this model) (need|take|use|want) ; (and |)its size ; how many parameters does it have ; "
    "and how big"
)
_FETCH_FOLLOW = (
    "how (do|can) i (download|get|fetch|pull) (it|that|that model|this one) ; "
    "where (do|can) i (get|download) it ; can i download (it|that) ; download it ; "
    "i want (it|to download it|to get it)"
)
_WHY_UNKNOWN = (
    "why ; why not ; but why ; why is that ; how come ; why don't you know ; why can't you ; really ; why so"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange; `intent` names what was asked ("topic.aspect", "topic+topic", or a free name)."""

    question: str
    answer: str
    intent: str


class Corpus:
    """Draws conversations; the same `rng` state always gives the same ones."""

    def __init__(self) -> None:
        self.book: Book = load_book()
        self._held_out = held_out()
        self._strays = stray_words()
        self._own = {name: Choices(i.patterns) for name, i in self.book.intents.items() if i.patterns}
        self._topic_frames = {a: Choices(split_patterns(t)) for a, t in TOPIC_FRAMES.items()}
        self._follow = {a: Choices(split_patterns(t)) for a, t in FOLLOW.items()}
        self._command_frames = {a: Choices(split_patterns(t)) for a, t in COMMAND_FRAMES.items()}
        self._wish = Choices(split_patterns(WISH_FRAMES))
        self._pair = Choices(split_patterns(PAIR_FRAMES))
        self._unknown = Choices(split_patterns(UNKNOWN_FRAMES))
        self._unknown_whole = Choices(split_patterns(UNKNOWN_WHOLE))
        self._size_follow, self._fetch_follow, self._why_unknown = (
            Choices(split_patterns(text)) for text in (_SIZE_FOLLOW, _FETCH_FOLLOW, _WHY_UNKNOWN)
        )
        self._models, self._gigabytes = MODEL_NAMES.split("; "), MEMORY_GB.split("; ")
        self._things, self._syllables = UNKNOWN_THINGS.split("; "), SYLLABLES.split()
        self._systems = SYSTEM_PROMPTS.split("; ")
        self._topics, self._commands = list(self.book.topics.values()), list(self.book.commands.values())
        names = " ".join(name for s in self._topics + self._commands for name in s.names)
        self._keep = frozenset(f"{names} {_DECIDING} {MODEL_NAMES.replace(';', '')}".lower().split())

    def system_prompt(self, rng: random.Random) -> str:
        """A system message of the usual kind; the demo's answers do not depend on it."""
        return rng.choice(self._systems)

    def conversation(self, rng: random.Random, turns: int | None = None) -> list[Turn]:
        """A conversation of `turns` exchanges (None: mostly one to three) with no held-out question."""
        count = turns or rng.choices([1, 2, 3, 4, 5], [48, 26, 14, 8, 4])[0]
        out: list[Turn] = []
        subject: str | None = None
        while len(out) < count:
            last = out[-1].intent if out else None
            question, intent = self._ask(rng, subject, last)
            noisy = add_noise(rng, question, keep=self._keep, strays=self._strays)
            if normalize(noisy) in self._held_out or normalize(question) in self._held_out:
                continue
            out.append(Turn(noisy, self.answer(intent), intent))
            if intent not in _KEEPS_TOPIC:
                subject = self.book.subject_of(intent)
        return out

    def answer(self, intent: str) -> str:
        """The text for `intent`; two topics joined by "+" get one sentence each.  Raises KeyError."""
        if "+" not in intent:
            return self.book.intents[intent].answer
        return " ".join(_first_sentence(self.book.intents[f"{key}.what"].answer) for key in intent.split("+"))

    def _ask(self, rng: random.Random, subject: str | None, last: str | None) -> tuple[str, str]:
        """A clean question that may follow a turn of intent `last` about `subject`, and its own intent."""
        if last is None:
            chance = rng.random()
            if chance < 0.02:
                return self._follow[rng.choice(ASPECTS)].draw(rng), "clarify"
            if chance < 0.06:
                return self._own["greet"].draw(rng), "greet"
            return self._fresh(rng)
        chance = rng.random()
        if chance < 0.16:
            name = rng.choice(_POLITE)
            return self._own[name].draw(rng), name
        if last == "unknown" and chance < 0.36:
            return self._why_unknown.draw(rng), "unknown_why"
        if subject is None and chance < 0.20:
            return self._follow[rng.choice(ASPECTS)].draw(rng), "clarify"
        if subject is not None and chance < 0.62:
            return self._follow_up(rng, subject)
        return self._fresh(rng)

    def _follow_up(self, rng: random.Random, subject: str) -> tuple[str, str]:
        if subject in _SIZES and rng.random() < 0.3:
            if rng.random() < 0.5:
                return self._size_follow.draw(rng), _SIZES[subject]
            return self._fetch_follow.draw(rng), "pull.what"
        aspect = rng.choices(ASPECTS, [1, 4, 3, 3])[0]
        question = self._follow[aspect].draw(rng)
        if subject in self.book.commands and aspect == "how":  # a command's inner workings: show its use
            aspect = "example"
        return question, f"{subject}.{aspect}"

    def _fresh(self, rng: random.Random) -> tuple[str, str]:
        """A question that needs no conversation before it."""
        kind = rng.choices(("topic", "command", "talk", "unknown", "pair"), [40, 16, 27, 14, 3])[0]
        if kind == "topic":
            return self._about_topic(rng, rng.choice(self._topics))
        if kind == "command":
            return self._about_command(rng, rng.choice(self._commands))
        if kind == "talk":
            name = rng.choice(self.book.talk)
            return self._fill(rng, self._own[name].draw(rng)), name
        if kind == "unknown":
            return self._out_of_scope(rng), "unknown"
        one, two = rng.sample(self._topics, 2)
        question = self._pair.draw(rng)
        question = question.replace("{t}", rng.choice(one.names)).replace("{u}", rng.choice(two.names))
        return question, f"{one.key}+{two.key}"

    def _about_topic(self, rng: random.Random, topic: Subject) -> tuple[str, str]:
        if rng.random() < 0.04:  # a keyword among other words is still that topic
            words = rng.choices(self._strays, k=rng.randint(1, 3))
            words.insert(rng.randrange(len(words) + 1), rng.choice(topic.names))
            return " ".join(words), f"{topic.key}.what"
        aspect = rng.choices(ASPECTS, [4, 2.5, 2.5, 1.3])[0]
        name = f"{topic.key}.{aspect}"
        if name in self._own and rng.random() < 0.5:
            return self._own[name].draw(rng), name
        return self._topic_frames[aspect].draw(rng).replace("{t}", rng.choice(topic.names)), name

    def _about_command(self, rng: random.Random, command: Subject) -> tuple[str, str]:
        chance = rng.random()
        if chance < 0.45:
            question, aspect = self._wish.draw(rng).replace("{a}", rng.choice(command.wishes)), "what"
        elif chance < 0.65:
            question, aspect = self._own[f"{command.key}.what"].draw(rng), "what"
        else:
            aspect = rng.choices(("what", "why", "example"), [4, 2, 2])[0]
            question = self._command_frames[aspect].draw(rng)
            # The bare word ("show", "run") means too many things; mostly say which tool it belongs to.
            names = command.names if "command" in question else [n for n in command.names if " " in n]
            question = question.replace("{c}", rng.choice(names))
        return self._fill(rng, question), f"{command.key}.{aspect}"

    def _fill(self, rng: random.Random, question: str) -> str:
        question = question.replace("{m}", rng.choice(self._models))
        return question.replace("{g}", rng.choice(self._gigabytes))

    def _out_of_scope(self, rng: random.Random) -> str:
        """Something the demo knows nothing about: things, invented words, sums, orders, plain noise."""
        chance = rng.random()
        if chance < 0.58:
            question = self._unknown.draw(rng)
            for slot in ("{n}", "{m}"):
                question = question.replace(slot, self._thing(rng))
            return question
        if chance < 0.78:
            question = self._unknown_whole.draw(rng)
            return question.replace("{x}", str(rng.randint(2, 999))).replace("{y}", str(rng.randint(2, 99)))
        if chance < 0.90:
            frame = self._topic_frames[rng.choice(ASPECTS)].draw(rng)
            return frame.replace("{t}", self._thing(rng))
        if chance < 0.95:
            return " ".join(self._invented(rng) for _ in range(rng.randint(1, 4)))
        return " ".join(rng.choices(self._strays, k=rng.randint(1, 4)))

    def _thing(self, rng: random.Random) -> str:
        chance = rng.random()
        if chance < 0.6:
            return rng.choice(self._things)
        article = rng.choice(("", "a ", "the "))
        return article + (self._invented(rng) if chance < 0.82 else rng.choice(self._strays))

    def _invented(self, rng: random.Random) -> str:
        if rng.random() < 0.25:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
        return "".join(rng.choices(self._syllables, k=rng.randint(2, 4)))


def _first_sentence(text: str) -> str:
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
