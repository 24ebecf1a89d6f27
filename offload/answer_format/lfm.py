"""Tool calls as LFM2 and its successors write them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.call_syntax import CallSyntax, checked_call, text_term
from moe_local.offload.answer_format.hermes import parse_calls
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.notation import Notation, ValueRules
from moe_local.offload.answer_format.parameters import Parameters
from moe_local.offload.answer_format.piece import Call
from moe_local.offload.answer_format.schema import Schema

STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
ESCAPES = "\\'\"abfnrtvxuUN01234567"
"""What may follow a backslash in Python; before anything else it stands for itself, with a warning."""
WORDS = {"true": True, "false": False, "null": None}
"""As JSON has them, which is how templates write objects."""
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
"""What Python's parser raises for text that is no Python, or nested too deeply."""


class Lfm(CallSyntax):
    """Python: `<|tool_call_start|>[f(place='Graz', days=3), g()]<|tool_call_end|>`

    A JSON list of calls, which a model may be told to write, is understood, too.
    """

    opening, closing = "<|tool_call_start|>", "<|tool_call_end|>"

    def parse(self, text: str, functions: Mapping[str, Any]) -> list[Call] | None:
        try:
            said = ast.parse(STRING.sub(_tidied, text.strip()), mode="eval")
            calls = said.body.elts if isinstance(said.body, ast.List) else [said.body]
            return [_call(call, functions) for call in calls] or None
        except UNREADABLE:
            return parse_calls(text)

    def rules(self, name: str, schema: Any, call: str, marks: MarkTokens) -> list[str]:
        values = ValueRules(PythonNotation(), schema, call)
        keys = {parameter: text_term(f"{parameter}=") for parameter in Schema(schema).properties(schema)}
        members = values.members(keys, schema)
        opening, closing = marks.term(self.opening), marks.term(self.closing)
        return [f'{call}: {opening} {text_term(f"[{name}(")} {members} ")]" {closing}', *values.rules]

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls, their arguments JSON text or what it says, as the model writes them."""
        return f"{self.opening}[{', '.join(map(_written, calls))}]{self.closing}"


class PythonNotation(Notation):
    """Python's literals."""

    true, false, null = '"True"', '"False"', '"None"'
    comma = '", "'
    string = r"""/'([^'\\]|\\(?s:.))*'|"([^"\\]|\\(?s:.))*"/"""

    def quoted(self, text: str) -> str:
        return text_term(repr(text))

    def key(self, name: str | None) -> str:
        return f'{self.string} ": "' if name is None else text_term(f"{name!r}: ")


def _tidied(string: re.Match[str]) -> str:
    """A string as Python wants it: templates write line breaks and backslashes as they are."""
    text = ESCAPE.sub(lambda found: found[0] if found[1] in ESCAPES else f"\\\\{found[1]}", string[0])
    return text.replace("\n", "\\n")


def _call(said: ast.expr, functions: Mapping[str, Any]) -> Call:
    """Raises one of UNREADABLE for anything but a call."""
    name = ""
    if isinstance(said, ast.BinOp) and isinstance(said.op, ast.Sub):  # a name with a hyphen
        name, said = ast.unparse(said.left).replace(" - ", "-") + "-", said.right
    if not isinstance(said, ast.Call) or any(keyword.arg is None for keyword in said.keywords):
        raise ValueError("not a call")
    name += ast.unparse(said.func)
    parameters = [parameter for parameter, _ in Parameters(functions.get(name)).listed()]
    named = zip(parameters, said.args, strict=False)
    if len(said.args) > len(parameters):
        raise ValueError("more arguments than parameters")
    arguments = {parameter: _value(value) for parameter, value in named}
    arguments |= {str(keyword.arg): _value(keyword.value) for keyword in said.keywords}
    call = checked_call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    if call is None:
        raise ValueError("not a call")
    return call


def _value(said: ast.expr | None) -> Any:
    """Raises one of UNREADABLE for anything but a literal."""
    match said:
        case None:
            raise ValueError("one object is unpacked into another")
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {str(_value(key)): _value(value) for key, value in zip(keys, values, strict=True)}
        case other:
            return ast.literal_eval(other)


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    given = function.get("arguments") or {}
    if isinstance(given, str):
        with suppress(ValueError):
            given = parse_json(given)
    if not isinstance(given, Mapping):
        return f"{function.get('name')}({given})"
    return f"{function.get('name')}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
