"""Lark of what a JSON schema allows, for arguments that are written in another notation than JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from moe_local.offload.answer_format.schema import MOST_REFERENCES, Schema
from moe_local.offload.forms import json_rule


class Notation(ABC):
    """How values are written."""

    true, false, null = '"true"', '"false"', '"null"'
    """Terms of Lark, as all that follows."""
    comma = '","'
    string: str
    """Any string, with its quotes."""

    @abstractmethod
    def quoted(self, text: str) -> str:
        """One string, with its quotes."""

    @abstractmethod
    def key(self, name: str | None) -> str:
        """What stands in front of a value in an object; None: any name."""


class ValueRules:
    """Collects rules of the arguments of one function."""

    def __init__(self, notation: Notation, schema: Any, prefix: str) -> None:
        """`schema`: of all arguments. `prefix`: what the names of rules begin with."""
        self._notation = notation
        self._schema = Schema(schema)
        self._prefix = prefix
        self.rules: list[str] = []
        self._any = ""
        self._named: dict[str, str] = {}
        """The rule of what each reference in the schema leads to, which may refer to itself."""

    def arguments(self, keys: Mapping[str, str], any_key: str) -> str:
        """A term of all arguments, as `members` has it; of any, each with `any_key` in front of its value,
        where the schema names none and allows them."""
        values = self._schema.additional(self._schema.root)
        if values is None:
            return self.members(keys, self._schema.root)
        return self._any_number(f"{any_key} {self.value(values, 1)}")

    def members(self, keys: Mapping[str, str], schema: Any, depth: int = 0) -> str:
        """A term of an object's properties with commas between them, without what stands around them.

        `keys`: the properties in their order, each with the term in front of its value.
        """
        properties = self._schema.properties(schema)
        first, later = '""', '""'
        for name in reversed(list(keys)):
            part, required = properties[name]
            member = self._rule(f"{keys[name]} {self.value(part, depth + 1)}")
            with_more = f"{member} {later}"
            later, first = (
                self._rule(f"{self._notation.comma} {with_more}" + ("" if required else f" | {later}")),
                self._rule(with_more + ("" if required else f" | {first}")),
            )
        return first

    def value(self, schema: Any, depth: int = 0) -> str:
        """A term of a value; what a schema does not say, or says too deeply, may be anything."""
        found, choices = self._schema.resolved(schema), self._schema.choices(schema)
        path = schema.get("$ref") if isinstance(schema, Mapping) else None
        if isinstance(path, str):
            if path not in self._named:
                self._named[path] = name = f"{self._prefix}_named_{len(self._named)}"
                self.rules.append(f"{name}: {self.value(found)}")
            return self._named[path]
        if choices is not None:
            return self._one_of(map(self._constant, choices))
        if depth >= MOST_REFERENCES:
            return self._anything()
        if "type" not in found and (parts := self._schema.parts(schema)):
            return self._one_of(self.value(part, depth + 1) for part in parts)
        kinds = sorted(self._schema.kinds(schema))
        return self._one_of(self._of_kind(kind, found, depth) for kind in kinds) or self._anything()

    def _of_kind(self, kind: str, schema: Mapping[str, Any], depth: int) -> str:
        notation = self._notation
        match kind:
            case "string":
                return notation.string
            case "boolean":
                return f"({notation.true} | {notation.false})"
            case "null":
                return notation.null
            case "integer" | "number":
                return self._rule(json_rule({**schema, "type": kind}))
            case "array":
                return self._list(self.value(schema.get("items"), depth + 1))
            case "object" if properties := self._schema.properties(schema):
                keys = {name: notation.key(name) for name in properties}
                return f'"{{" {self.members(keys, schema, depth)} "}}"'
            case "object":
                if schema.get("additionalProperties") is False:
                    return '"{}"'
                return self._object(self.value(self._schema.additional(schema), depth + 1))
        return self._anything()

    def _list(self, item: str) -> str:
        return self._rule(f'"[" {self._any_number(item)} "]"')

    def _object(self, value: str) -> str:
        return self._rule(f'"{{" {self._any_number(f"{self._notation.key(None)} {value}")} "}}"')

    def _any_number(self, item: str) -> str:
        return f"({item} ({self._notation.comma} {item})*)?"

    def _anything(self) -> str:
        if not self._any:
            self._any = value = f"{self._prefix}_any"
            notation = self._notation
            number = self._rule(json_rule({"type": "number"}))
            kinds = [notation.string, notation.true, notation.false, notation.null, number]
            self.rules.append(f"{value}: {' | '.join([*kinds, self._list(value), self._object(value)])}")
        return self._any

    def _constant(self, value: Any) -> str:
        match value:
            case str():
                return self._notation.quoted(value)
            case True | False:
                return self._notation.true if value else self._notation.false
            case None:
                return self._notation.null
            case list():
                items = f" {self._notation.comma} ".join(map(self._constant, value))
                return f'"[" {items} "]"'
            case dict():
                members = [
                    f"{self._notation.key(name)} {self._constant(part)}" for name, part in value.items()
                ]
                inner = f" {self._notation.comma} ".join(members)
                return f'"{{" {inner} "}}"'
        return json.dumps(json.dumps(value))

    def _one_of(self, terms: Iterable[str]) -> str:
        different = list(dict.fromkeys(terms))
        return f"({' | '.join(different)})" if len(different) > 1 else "".join(different)

    def _rule(self, right: str) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}: {right}")
        return name
