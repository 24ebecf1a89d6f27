"""From patterns to questions as people type them: choices resolved, then noise."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from itertools import accumulate

from moe_local.demo.wordings_frames import FILLERS, PREFIXES, SMALL_WORDS, SUFFIXES

_CHOICE = re.compile(r"\(([^()]*)\)")
_PROPER = {
    "moe": "MoE",
    "nf4": "NF4",
    "vram": "VRAM",
    "ram": "RAM",
    "gpu": "GPU",
    "gpus": "GPUs",
    "cpu": "CPU",
    "lru": "LRU",
    "lfu": "LFU",
    "kv": "KV",
    "pcie": "PCIe",
    "ssd": "SSD",
    "llm": "LLM",
    "api": "API",
    "openai": "OpenAI",
    "gb": "GB",
    "mixtral": "Mixtral",
    "mixtral-8x7b": "Mixtral-8x7B",
    "8x7b": "8x7B",
    "qwen3": "Qwen3",
    "qwen": "Qwen",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "deepseek": "DeepSeek",
    "deepseek-v3": "DeepSeek-V3",
    "python": "Python",
    "cuda": "CUDA",
    "ffn": "FFN",
    "i": "I",
    "france": "France",
    "paris": "Paris",
    "london": "London",
    "rome": "Rome",
    "berlin": "Berlin",
    "german": "German",
    "french": "French",
    "spanish": "Spanish",
    "amd": "AMD",
    "mac": "Mac",
    "gguf": "GGUF",
    "json": "JSON",
    "top-k": "Top-k",
}
_QUESTION = re.compile(r"(what|how|why|who|which|can|do|does|is|are|where|when|could|will|may|should)\b")
_WORDS = {
    name: [w.strip() for w in text.split(";")]
    for name, text in (("prefix", PREFIXES), ("suffix", SUFFIXES), ("filler", FILLERS))
}
_SMALL = frozenset(SMALL_WORDS.split())


def expand(rng: random.Random, pattern: str) -> str:
    """One reading of `pattern`: every `(a|b|)` replaced by one of its parts, innermost first."""
    while "(" in pattern:
        pattern = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), pattern)
    return " ".join(pattern.split()).replace(" ,", ",")


class Choices:
    """Patterns of one intent, drawn so that a pattern of many readings comes more often than a fixed one."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = list(patterns)
        self._cumulative = list(accumulate(_readings(p) ** 0.35 for p in self.patterns))

    def draw(self, rng: random.Random) -> str:
        """An expanded pattern."""
        return expand(rng, rng.choices(self.patterns, cum_weights=self._cumulative)[0])


def _readings(pattern: str) -> int:
    """About how many questions `pattern` stands for (nested choices count as flat ones)."""
    return math.prod(1 + group.count("|") for group in _CHOICE.findall(pattern))


def add_noise(rng: random.Random, question: str, *, keep: frozenset[str], strays: Sequence[str]) -> str:
    """`question` as somebody in a hurry types it.

    `keep` are words that carry the meaning and are never dropped; `strays` are words that may slip in.
    """
    words = question.split(" ")
    if rng.random() < 0.35:  # many people type carefully
        return _punctuate(rng, " ".join(_PROPER.get(w, w) for w in words) if rng.random() < 0.6 else question)
    if len(words) > 3:
        chance = rng.random()
        if chance < 0.15:
            words = [w for w in words if w.lower() in keep or rng.random() > 0.3] or words
        elif chance < 0.25:
            words.insert(rng.randrange(len(words) + 1), rng.choice(strays))
        elif chance < 0.37:
            words.insert(rng.randrange(1, len(words)), rng.choice(_WORDS["filler"]))
        elif chance < 0.45:
            small = [i for i, w in enumerate(words) if w.lower() in _SMALL]
            if small:
                del words[rng.choice(small)]
    if rng.random() < 0.20:
        words.insert(0, rng.choice(_WORDS["prefix"]))
    if rng.random() < 0.12:
        words.append(rng.choice(_WORDS["suffix"]))
    if rng.random() < 0.45:
        words = [_PROPER.get(w, w) for w in words]
    text = " ".join(words)
    if rng.random() < 0.08:
        text = _typo(rng, text)
    return _punctuate(rng, text)


def _punctuate(rng: random.Random, text: str) -> str:
    """Capital at the start, a mark at the end: each often, neither always."""
    shape = rng.random()
    if shape < 0.55:
        text = text[:1].upper() + text[1:]
    elif shape < 0.57:
        text = text.upper()
    end = rng.random()
    if end < 0.60:
        return text + ("?" if _QUESTION.match(text.lower()) else ".")
    return text + (rng.choice(["!", "??", " ?", "...", "!!"]) if end > 0.93 else "")


def _typo(rng: random.Random, text: str) -> str:
    """One letter lost, swapped or doubled; short texts stay as they are."""
    if len(text) < 6:
        return text
    at = rng.randrange(1, len(text) - 1)
    kind = rng.random()
    if kind < 0.35:
        return text[:at] + text[at + 1 :]
    if kind < 0.70:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at] + text[at:]
