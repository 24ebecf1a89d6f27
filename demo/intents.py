"""Every answer the demo can give, with the questions that ask for it: the wording tables, parsed."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_local.demo.wordings_commands import COMMANDS
from moe_local.demo.wordings_frames import UNKNOWN_ANSWER
from moe_local.demo.wordings_talk import TALK
from moe_local.demo.wordings_topics import TOPICS

ASPECTS = ("what", "why", "how", "example")

# Free intents that leave a topic behind: a "why?" after them is about this topic.
ABOUT = {
    "miss_event": "miss",
    "cache_full": "eviction",
    "prefetch_wrong": "prefetch",
    "prefetch_late": "prefetch",
    "balance_event": "balance",
    "fits_all": "vram",
    "first_load": "expert_file",
    "context_long": "kv",
    "few_slots": "slot",
    "mixtral_size": "mixtral",
    "mixtral_experts": "mixtral",
    "qwen_size": "qwen",
    "deepseek_size": "deepseek",
    "gptoss_size": "gptoss",
    "quant_quality": "quant",
    "formats": "nf4",
    "hit_vs_miss": "miss",
    "ram_vs_vram": "vram",
    "prefetch_vs_cache": "prefetch",
    "expert_vs_router": "router",
    "dense_vs_moe": "moe",
    "lru_vs_lfu": "cache",
    "vram_flag": "vram",
    "oom": "vram",
    "slow": "miss",
    "commands": "chat",
}


@dataclass(slots=True)
class Intent:
    """One answer and the patterns of the questions for it ("topic.aspect" or a free name)."""

    name: str
    answer: str
    patterns: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Subject:
    """A topic or a command: its names, and for commands what a user wants to do (`wishes`)."""

    key: str
    names: list[str]
    wishes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Book:
    """All intents by name, and the subjects that they are about by key."""

    intents: dict[str, Intent]
    topics: dict[str, Subject]
    commands: dict[str, Subject]
    talk: list[str]

    def subject_of(self, intent: str) -> str | None:
        """The topic or command that a follow-up to `intent` is about; None where there is none."""
        key = intent.partition(".")[0]
        if key in self.topics or key in self.commands:
            return key
        return ABOUT.get(intent)


def load_book() -> Book:
    """Parses the wording tables.  Raises ValueError for a line of no known kind."""
    topics, topic_intents = _subjects(TOPICS)
    commands, command_intents = _subjects(COMMANDS)
    intents = topic_intents | command_intents
    talk = _talk(TALK)
    intents.update({intent.name: intent for intent in talk})
    intents["unknown"] = Intent("unknown", UNKNOWN_ANSWER)
    return Book(intents, topics, commands, [intent.name for intent in talk])


def split_patterns(text: str) -> list[str]:
    """The patterns of a `;`-separated table: line ends separate them too."""
    return [part.strip() for line in text.splitlines() for part in line.split(" ; ") if part.strip()]


def _subjects(table: str) -> tuple[dict[str, Subject], dict[str, Intent]]:
    subjects: dict[str, Subject] = {}
    intents: dict[str, Intent] = {}
    for line in filter(None, map(str.strip, table.splitlines())):
        if line.startswith("@ "):
            key, _, names = line[2:].partition(" : ")
            subject = subjects[key] = Subject(key, names.split(" | "))
        elif line.startswith("does:"):
            subject.wishes += line.removeprefix("does:").strip().split(" | ")
        elif line.partition(":")[0] in ASPECTS:
            aspect, _, answer = line.partition(": ")
            intents[f"{key}.{aspect}"] = Intent(f"{key}.{aspect}", answer)
        elif line.partition("?")[0] in ASPECTS:
            aspect, _, patterns = line.partition("? ")
            intents[f"{key}.{aspect}"].patterns += split_patterns(patterns)
        else:
            raise ValueError(f"not a wording line: {line!r}")
    return subjects, intents


def _talk(table: str) -> list[Intent]:
    intents: list[Intent] = []
    for line in filter(None, map(str.strip, table.splitlines())):
        kind, _, rest = line.partition(" ")
        if kind == "@":
            intents.append(Intent(rest, ""))
        elif kind == "say:":
            intents[-1].answer = rest
        elif kind == "?":
            intents[-1].patterns += split_patterns(rest)
        else:
            raise ValueError(f"not a wording line: {line!r}")
    return intents
