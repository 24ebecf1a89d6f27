"""Calls of functions in Python: what they mean, and a grammar of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from moe_local.offload.answer_format.call_syntax import checked_call, text_term
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


def python_calls(text: str, functions: Mapping[str, Any]) -> list[Call] | None:
    """The calls in a list of them, or one; None for any other text.

    `functions`: parameters, as JSON schemas, of the functions that may be called.
    """
    try:
        said = ast.parse(STRING.sub(_tidied, text.strip()), mode="eval")
        calls = said.body.elts if isinstance(said.body, ast.List) else [said.body]
        return [_call(call, functions) for call in calls] or None
    except UNREADABLE:
        return None


def python_rules(name: str, schema: Any, call: str, before: str, behind: str) -> list[str]:
    """Lark of a list of one call, as CallSyntax.rules has it. `before`, `behind`: terms around it."""
    values = ValueRules(PythonNotation(), schema, call)
    keys = {parameter: text_term(f"{parameter}=") for parameter in Schema(schema).properties(schema)}
    members = values.arguments(keys, '/[A-Za-z_][A-Za-z0-9_]*/ "="')
    return [f'{call}: {before} {text_term(f"[{name}(")} {members} ")]" {behind}'.rstrip(), *values.rules]


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
