"""Marks of a format as tokens, for grammars and for the text that parsers read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any


class MarkTokens:
    """Which of a format's marks are tokens of their own in a vocabulary.

    A model writes such a mark as that token, never as the letters that it is made of. Those that are special
    tokens are left out of an answer's text, unless they are asked for.
    """

    def __init__(self, tokenizer: Any, marks: Iterable[str]) -> None:
        """`tokenizer`: None for a model that has none."""
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
        self.ids: dict[str, int] = {mark: added[mark] for mark in marks if mark in added}
        self.special = tuple(
            mark
            for mark, token in self.ids.items()
            if not tokenizer.decode([token], skip_special_tokens=True)
        )
        """Those that texts are decoded without."""

    def term(self, mark: str) -> str:
        """The mark in llguidance's Lark. Of one that only has another in it, that alone is a token."""
        if mark in self.ids:
            return f"<[{self.ids[mark]}]>"
        before, token, behind = self._parted(mark)
        return " ".join([json.dumps(before), *map(self.term, filter(None, (token, behind)))])

    def text_rule(self, rule: str, closing: str, tail: str = "") -> str:
        """A rule of any text up to the mark `closing`, which with the text `tail` behind it is part of it."""
        if closing in self.ids:
            behind = f" {json.dumps(tail)}" if tail else ""
            return f"{rule}: /(?s:.*)/ {self.term(closing)}{behind}"
        before, token, rest = self._parted(closing)
        if token:
            end = re.escape(before).replace("/", r"\/")
            return f"{rule}: /(?s:.*){end}/ {self.term(token)} {json.dumps(rest + tail)}"
        return f"{rule}[suffix={json.dumps(closing + tail)}]: /(?s:.*)/"

    def _parted(self, mark: str) -> tuple[str, str, str]:
        """A mark before, at and behind another one in it that is a token."""
        token = next((known for known in self.ids if known in mark), None)
        return mark.partition(token) if token else (mark, "", "")
