"""How a family of models writes tool calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.parameters import Parameters
from moe_local.offload.answer_format.piece import Call
from moe_local.offload.forms import json_rule

ANY_NAME, NAME = "any_parameter", "/[A-Za-z_][A-Za-z0-9_.\\-]*/"
"""What stands for a parameter that may be called anything, and a term of Lark for that."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class CallSyntax(ABC):
    """Marks around calls, what stands between them, and a grammar that produces the same."""

    opening: str
    closing: str
    """Of one call."""
    section: tuple[str, str] | None = None
    """What opens and closes a run of calls, where such runs have marks of their own."""
    inner: tuple[str, ...] = ()
    """Further marks inside a call."""
    bare: str | None = None
    """What a call begins with where models at times leave out the opening mark."""
    ends_thought = False
    """Whether models at times call out of a thought without closing it."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (*(self.section or ()), self.opening, self.closing, *self.inner)

    def split(self, text: str) -> tuple[str, str] | None:
        """The call that `text`, behind an opening mark, begins with, and the rest; None: more must come."""
        call, found, rest = text.partition(self.closing)
        return (call, rest) if found else None

    @abstractmethod
    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        """The calls in the text between the marks, mostly one; None if it is not well-formed.

        `functions`: parameters, as JSON schemas, of the functions that may be called.
        """

    @abstractmethod
    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        """Lark of one call of the function `name` with parameters of `schema`: a rule called `call`, and
        others with names that begin like it."""

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as the model writes them, for templates that leave them out; nothing where none does.

        `calls`: OpenAI's, their arguments JSON text or what it says.
        """
        return ""

    def grammar_rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        """The same with the marks of a run of calls around it."""
        if self.section is None:
            return self.rules(name, schema, call, marks)
        before, behind = map(marks.term, self.section)
        alone = f"{call}_alone"
        return [f"{call}: {before} {alone} {behind}", *self.rules(name, schema, alone, marks)]


class JsonSyntax(CallSyntax):
    """Syntaxes in which the arguments are one JSON object between what is `before` and `behind` it."""

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        before, behind = self.around(name, marks)
        return [
            f"{call}: {' '.join(before)} {call}_arguments {' '.join(behind)}",
            f"{call}_arguments: {json_rule(schema or NO_ARGUMENTS)}",
        ]

    @abstractmethod
    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        """Terms of Lark before and behind the arguments."""


class TaggedSyntax(CallSyntax):
    """Syntaxes in which each argument has tags of its own, and strings stand there without quotes."""

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        known = Parameters(schema)
        arguments, rules = [], []
        for number, (parameter, required) in enumerate(known.listed()):
            rule = f"{call}_{number}"
            arguments.append(rule if required else f"{rule}?")
            rules += self._argument(known, parameter, rule, marks)
        free = known.of_any_name(ANY_NAME)
        for parameter, _ in free.listed():
            argument, *values = self._argument(free, parameter, f"{call}_free", marks)
            arguments.append(f"{call}_free*")
            rules += [argument.replace(ANY_NAME, f'" {NAME} "'), *values]
        before, behind = self.around(name, marks)
        return [f"{call}: {' '.join([*before, *arguments, *behind])}", *rules]

    def _argument(self, known: Parameters, parameter: str, rule: str, marks: MarkTokens) -> list[str]:
        opening, closing, tail = self.tags(parameter, marks, is_text=known.is_text(parameter))
        values = known.rules(parameter, f"{rule}_value", closing, tail, marks)
        return [f"{rule}: {' '.join(opening)} {rule}_value", *values]

    @abstractmethod
    def around(self, name: str, marks: MarkTokens) -> tuple[list[str], list[str]]:
        """Terms of Lark before and behind all arguments."""

    @abstractmethod
    def tags(self, parameter: str, marks: MarkTokens, *, is_text: bool) -> tuple[list[str], str, str]:
        """Terms before an argument's value, the mark that closes it, and the text behind that.

        `is_text`: whether it stands there as it is, not as JSON.
        """


def text_term(text: str) -> str:
    """A text as a terminal of Lark, which is written as JSON's strings are."""
    return json.dumps(text)


def checked_call(name: Any, arguments: str) -> Call | None:
    """None for what no client could be sent: no name, or half a character."""
    if not isinstance(name, str) or not name:
        return None
    try:
        (name + arguments).encode()
    except UnicodeEncodeError:
        return None
    return {"name": name, "arguments": arguments}


def json_call(name: str, arguments: str) -> list[Call] | None:
    """A call whose arguments are JSON text, which is passed on as it stands; none are an empty object."""
    arguments = arguments.strip() or "{}"
    try:
        parse_json(arguments)
    except ValueError:
        return None
    call = checked_call(name.strip(), arguments)
    return [call] if call else None


def tagged_call(
    name: str, arguments: list[tuple[str, str]], functions: Mapping[str, Any]
) -> list[Call] | None:
    """A call whose arguments are pairs of parameter and text."""
    known = Parameters(functions.get(name))
    values = {parameter: known.value(parameter, text) for parameter, text in arguments}
    call = checked_call(name, json.dumps(values, ensure_ascii=False))
    return [call] if call else None
