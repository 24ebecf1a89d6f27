"""Grammars of answers that call a tool: since `tool_choice` is "required" or a function by its name, or since
the answer is to be JSON of a schema unless it is a call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.cli.answer_parser import CLOSE_CALL, OPEN_CALL
from moe_local.offload.engine.grammar import json_rule

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def call_grammar(
    tools: Sequence[Mapping[str, Any]], choice: Mapping[str, Any] | None, schema: Any = None
) -> str:
    """One call, marked as AnswerParser looks for it, in the Lark of `Model.generate(grammar=...)`.

    `choice`: {"type": "function", "function": {"name": ...}}; None: any of the tools. `schema`: that of JSON
    that may be the answer instead; None: it has to be a call. Raises OptionError for a tool that there is
    not.
    """
    functions = [tool.get("function") for tool in tools]
    known = {f["name"]: f for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)}
    if choice is not None:
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in known:
            raise OptionError(f"tool_choice demands {name!r}; the tools are {', '.join(known) or 'none'}")
        known = {name: known[name]}
    if not known and schema is None:
        raise OptionError("tool_choice demands a call, and there are no tools; give some")
    answers = [f"call_{number}" for number in range(len(known))] + ["json"] * (schema is not None)
    rules = ["start: " + " | ".join(answers)]
    if schema is not None:
        rules.append(f"json: {json_rule(schema)}")
    for number, (name, function) in enumerate(known.items()):
        # As terminals of Lark, which are written as JSON's strings are.
        opening = json.dumps(f'{OPEN_CALL}\n{{"name": {json.dumps(name)}, "arguments": ')
        closing = json.dumps("}\n" + CLOSE_CALL)
        rules.append(f"call_{number}: {opening} arguments_{number} {closing}")
        rules.append(f"arguments_{number}: {json_rule(function.get('parameters') or NO_ARGUMENTS)}")
    return "\n".join(rules)
