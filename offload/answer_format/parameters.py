"""Parameters of functions whose values are written as text: what it means, and which text may stand there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.schema import Schema
from moe_local.offload.forms import json_rule


class Parameters:
    """A function's parameters, from their JSON schema.

    Strings are written without quotes, all else as JSON. A parameter that may be a string or null counts as
    one of strings; a value that is no JSON counts as a string, whatever the schema says.
    """

    def __init__(self, schema: Any) -> None:
        """`schema`: of the object of all arguments; anything else has no parameters."""
        self._schema = Schema(schema)
        self._properties = self._schema.properties(schema)

    def of_any_name(self, name: str) -> Parameters:
        """With one parameter of this name that stands for all, where the schema names none and allows any;
        else without a parameter."""
        values = self._schema.additional(self._schema.root)
        named = {} if values is None else {name: values}
        return Parameters(self._schema.with_definitions({"properties": named}))

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Each parameter, and whether it is required."""
        return ((name, required) for name, (_, required) in self._properties.items())

    def value(self, name: str, text: str) -> Any:
        """What the text of an argument means."""
        kinds = self._schema.kinds(self._properties[name][0]) if name in self._properties else set()
        if _are_text(kinds):
            return None if "null" in kinds and text.strip() == "null" else text
        if "boolean" in kinds and text.strip() in ("True", "False"):  # as templates of Python write them
            return text.strip() == "True"
        try:
            value = parse_json(text)
            json.dumps(value, allow_nan=False)
        except ValueError:
            return text
        return value

    def is_text(self, name: str) -> bool:
        """Whether the grammar has an argument as a string without quotes."""
        return "string" in self._schema.kinds(self._properties[name][0])

    def rules(self, name: str, rule: str, closing: str, tail: str, marks: MarkTokens) -> list[str]:
        """Lark of an argument's value and of the mark `closing` and the text `tail` behind it."""
        schema, _ = self._properties[name]
        end = f"{marks.term(closing)} {json.dumps(tail)}" if tail else marks.term(closing)
        if not self.is_text(name):
            whole = self._schema.with_definitions(schema)
            return [f"{rule}: {rule}_json {end}", f"{rule}_json: {json_rule(whole)}"]
        choices = self._schema.choices(schema)
        if choices is not None and all(isinstance(choice, str) for choice in choices):
            return [f"{rule}: ({' | '.join(map(json.dumps, choices))}) {end}"]
        return [marks.text_rule(rule, closing, tail)]


def _are_text(kinds: set[str]) -> bool:
    return "string" in kinds and kinds <= {"string", "null"}
