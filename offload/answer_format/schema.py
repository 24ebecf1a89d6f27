"""What a JSON schema of a function's arguments says about each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_REFERENCES = 16
"""That are followed from one schema to the next; more are a circle."""
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}


class Schema:
    """A schema as a whole, by which references in its parts are resolved."""

    def __init__(self, root: Any) -> None:
        """`root`: anything but a mapping says nothing."""
        self.root: Mapping[str, Any] = root if isinstance(root, Mapping) else {}

    def resolved(self, schema: Any) -> Mapping[str, Any]:
        """What a part is after its references into the whole."""
        for _ in range(MOST_REFERENCES):
            if not isinstance(schema, Mapping):
                return {}
            path = schema.get("$ref")
            if not isinstance(path, str):
                return schema
            schema = self.root if path.startswith("#") else {}
            for step in path.split("/")[1:]:
                schema = schema.get(step) if isinstance(schema, Mapping) else None
        return {}

    def with_definitions(self, schema: Any) -> Any:
        """A part that can stand alone."""
        defined = {key: self.root[key] for key in ("$defs", "definitions") if key in self.root}
        return {**defined, **schema} if isinstance(schema, Mapping) else schema

    def properties(self, schema: Any) -> dict[str, tuple[Any, bool]]:
        """The schema of each property of an object, and whether it is required."""
        found = self.resolved(schema)
        properties, required = found.get("properties"), listed(found.get("required"))
        if not isinstance(properties, Mapping):
            return {}
        return {str(name): (part, name in required) for name, part in properties.items()}

    def additional(self, schema: Any) -> Any:
        """The schema of an object's values where it names no properties, but allows any; None: it does not.

        `"properties": {}` alone is how one says that there are none.
        """
        found = self.resolved(schema)
        said = found.get("additionalProperties", "properties" not in found)
        if not found or self.properties(schema) or said is False:
            return None
        return said if isinstance(said, Mapping) else {}

    def choices(self, schema: Any) -> list[Any] | None:
        """The values among which a schema leaves the choice; None where it does not list them."""
        found = self.resolved(schema)
        values = [found["const"]] if "const" in found else found.get("enum")
        return values if isinstance(values, list) and values else None

    def kinds(self, schema: Any, depth: int = 0) -> set[str]:
        """The types of JSON that a schema says it allows; none where it does not say."""
        found = self.resolved(schema)
        said = found.get("type")
        if isinstance(said, str):
            return {said}
        if isinstance(said, list):
            return {kind for kind in said if isinstance(kind, str)}
        if (choices := self.choices(schema)) is not None:
            return {KINDS.get(type(value), "object") for value in choices}
        if depth == MOST_REFERENCES:
            return set()
        return {kind for part in self.parts(schema) for kind in self.kinds(part, depth + 1)}

    def parts(self, schema: Any) -> list[Any]:
        """The schemas that a schema is put together of."""
        found = self.resolved(schema)
        return [part for name in ("anyOf", "oneOf", "allOf") for part in listed(found.get(name))]


def listed(value: Any) -> list[Any]:
    """A value that has to be a list; anything else is an empty one."""
    return value if isinstance(value, list) else []
