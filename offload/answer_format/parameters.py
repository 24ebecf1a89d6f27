"""Parameters of functions whose values are written as text: what it means, and which text may stand there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_local.cache.files import parse_json
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.forms import json_rule

MOST_REFERENCES = 16
"""That are followed from one schema to the next; more are a circle."""
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}


class Parameters:
    """A function's parameters, from their JSON schema.

    Strings are written without quotes, all else as JSON. A parameter that may be a string or null counts as
    one of strings; a value that is no JSON counts as a string, whatever the schema says.
    """

    def __init__(self, schema: Any) -> None:
        """`schema`: of the object of all arguments; anything else has no parameters."""
        self._root: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
        properties = self._resolved(self._root).get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Each parameter, and whether it is required."""
        required = self._resolved(self._root).get("required") or ()
        return ((name, name in required) for name in self._properties)

    def value(self, name: str, text: str) -> Any:
        """What the text of an argument means."""
        kinds = self._kinds(self._properties.get(name))
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

    def rules(self, name: str, rule: str, closing: str, tail: str, marks: MarkTokens) -> list[str]:
        """Lark of an argument's value and of the mark `closing` and the text `tail` behind it."""
        schema = self._properties[name]
        found = self._resolved(schema)
        end = f"{marks.term(closing)} {json.dumps(tail)}" if tail else marks.term(closing)
        if "string" not in self._kinds(schema):
            defined = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            whole = {**defined, **schema} if isinstance(schema, Mapping) else schema
            return [f"{rule}: {rule}_json {end}", f"{rule}_json: {json_rule(whole)}"]
        choices = [found["const"]] if "const" in found else found.get("enum")
        if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
            return [f"{rule}: ({' | '.join(map(json.dumps, choices))}) {end}"]
        return [marks.text_rule(rule, closing, tail)]

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        """What a schema is after its references into the whole one."""
        for _ in range(MOST_REFERENCES):
            if not isinstance(schema, Mapping):
                return {}
            path = schema.get("$ref")
            if not isinstance(path, str):
                return schema
            schema = self._root if path.startswith("#") else {}
            for step in path.split("/")[1:]:
                schema = schema.get(step) if isinstance(schema, Mapping) else None
        return {}

    def _kinds(self, schema: Any, depth: int = 0) -> set[str]:
        """The types of JSON that a schema says it allows; none where it does not say."""
        found = self._resolved(schema)
        said = found.get("type")
        if isinstance(said, str):
            return {said}
        if isinstance(said, list):
            return {kind for kind in said if isinstance(kind, str)}
        values = [found["const"]] if "const" in found else found.get("enum")
        if isinstance(values, list):
            return {KINDS.get(type(value), "object") for value in values}
        if depth == MOST_REFERENCES:
            return set()
        parts = [part for name in ("anyOf", "oneOf", "allOf") for part in _list(found.get(name))]
        return {kind for part in parts for kind in self._kinds(part, depth + 1)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _are_text(kinds: set[str]) -> bool:
    return "string" in kinds and kinds <= {"string", "null"}
