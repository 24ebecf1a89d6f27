"""Grammars of answers that call a tool: since `tool_choice` is "required" or a function by its name, or since
the answer is to be JSON of a schema unless it is a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.answer_format.answer_format import AnswerFormat, functions_of
from moe_local.offload.forms import json_rule


def call_grammar(
    answers: AnswerFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: Mapping[str, Any] | None,
    schema: Any = None,
) -> str:
    """One call as the model writes it, in the Lark of `Model.generate(grammar=...)`.

    `choice`: {"type": "function", "function": {"name": ...}}; None: any of the tools. `schema`: that of JSON
    that may be the answer instead; None: it has to be a call. Raises OptionError for a tool that there is
    not.
    """
    known = functions_of(tools)
    if choice is not None:
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in known:
            raise OptionError(f"tool_choice demands {name!r}; the tools are {', '.join(known) or 'none'}")
        known = {name: known[name]}
    if not known and schema is None:
        raise OptionError("tool_choice demands a call, and there are no tools; give some")
    return answers.grammar(known, None if schema is None else json_rule(schema))
