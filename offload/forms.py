"""Forms of an answer, JSON schemas and grammars in Lark, in the words of llguidance. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_local.cache.errors import OptionError, first_line

WHITE_SPACE = r"( |\n[ \t]{0,20})?"
"""Whitespace allowed between any two JSON tokens, as in llama.cpp. Without this limit, a model that is
unwilling to write JSON may emit whitespace without end."""


def json_grammar(schema: Any) -> str:
    """A JSON schema as a grammar of llguidance. Raises OptionError for what is not a JSON schema at all."""
    from llguidance import LLMatcher

    _check_schema(schema)
    return LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": WHITE_SPACE})


def json_rule(schema: Any) -> str:
    """A JSON schema as the right side of a rule of a Lark grammar. Raises as `json_grammar`."""
    _check_schema(schema)
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def lark_grammar(lark: Any) -> str:
    """A grammar in llguidance's dialect of Lark. Raises OptionError if it is not text."""
    from llguidance import LLMatcher

    if not isinstance(lark, str):
        raise OptionError(f"grammar is of type {type(lark).__name__}; it must be text, in llguidance's Lark")
    return LLMatcher.grammar_from_lark(lark)


def led_grammar(lead: str, grammar: str) -> str:
    """A grammar of what the Lark `lead` says, in which `@content` stands for `grammar`."""
    content = json.loads(grammar)["grammars"][0] if grammar.startswith("{") else {"lark_grammar": grammar}
    return json.dumps({"grammars": [{"lark_grammar": lead}, {**content, "name": "content"}]})


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, Mapping):
        raise OptionError(f"json_schema is of type {type(schema).__name__}; it must be a dict, a JSON schema")
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise OptionError(f"json_schema is not valid JSON: {first_line(error)}") from error
    except RecursionError as error:
        raise OptionError("json_schema is nested too deeply; give a flatter one") from error
