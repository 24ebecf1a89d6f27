"""What a chat template can be given, found out by rendering a short conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_local.cache.files import parse_json

NAME, KEY, THOUGHT = "probed_function", "probed_parameter", "probed_thought"
ARGUMENTS = json.dumps({KEY: "a"})
CALL_ID = "probe1234"
"""Of the form that the strictest templates demand."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn thoughts on and off: of Qwen3, GLM and others; of DeepSeek-V3.1 and others."""
EFFORT, MOST, NONE = "reasoning_effort", "high", "none"
"""The variable of gpt-oss and others for how long to think; of Mistral for whether to: `high` or `none`."""
QUESTION = [{"role": "user", "content": "a"}]


class _Found(NamedTuple):
    as_text: bool = False
    """Whether a call's arguments are given as text, not as what it says."""
    content: str | None = ""
    """What a message has as its content that consists of calls alone; of None, transformers drops the key."""


class TemplateNeeds:
    """Differences between templates that nothing in them declares. They are looked for once, on first use."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: None for a model that has none."""
        self._tokenizer = tokenizer

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message of OpenAI's, where the arguments of calls are text, as the template wants it."""
        calls = message.get("tool_calls")
        if not calls:
            return dict(message)
        changed = {**message, "tool_calls": [self._call(call) for call in calls]}
        content = message.get("content")
        if not content or (isinstance(content, str) and content.isspace()):
            changed["content"] = self._found.content
        return changed

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A tool with all that the template takes for granted."""
        function = tool.get("function")
        if self._takes_bare_tools or not isinstance(function, Mapping):
            return dict(tool)
        usual = {"description": "", "parameters": {"type": "object", "properties": {}}}
        return {**tool, "function": {**usual, **{k: v for k, v in function.items() if v is not None}}}

    @cached_property
    def shows_calls(self) -> bool:
        """Whether it has a place for calls of a conversation."""
        shown = self._render(*self._found)
        return shown is None or NAME in shown

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Those of SWITCHES that make a difference."""
        shown = {
            name: [self.rendered(QUESTION, variables={name: on}) for on in (True, False)] for name in SWITCHES
        }
        return tuple(name for name, (on, off) in shown.items() if on != off)

    @cached_property
    def effort_is_switch(self) -> bool:
        """Whether an effort of `none` turns thoughts off: with it the template does what it does without any,
        and with another something else."""
        usual, off, on = (
            self.rendered(QUESTION, variables=given) for given in ({}, {EFFORT: NONE}, {EFFORT: MOST})
        )
        return usual == off != on

    def variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the template, with an effort for what they say otherwise where it has to be one.

        An effort that the template refuses counts as `high`: all but `none` are to think.
        """
        effort = given.get(EFFORT)
        told = [given[name] for name in SWITCHES if isinstance(given.get(name), bool)]
        if self.effort_is_switch and told:
            effort = NONE if False in told else effort or MOST
        if effort is not None and not self._takes(effort) and self._takes(MOST):
            effort = MOST
        return dict(given) if effort is None else {**given, EFFORT: effort}

    def _takes(self, effort: Any) -> bool:
        return self.rendered(QUESTION, variables={EFFORT: effort}) is not None

    @cached_property
    def thought_key(self) -> str:
        """The key of a thought in a message with calls; `reasoning_content` where thoughts are not shown."""
        keys = ("reasoning_content", "thinking", "reasoning")
        shown = ((key, self._render(*self._found, {key: THOUGHT})) for key in keys)
        return next((key for key, text in shown if text and THOUGHT in text), keys[0])

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        given = function.get("arguments")
        if self._found.as_text and isinstance(given, Mapping):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
        elif not self._found.as_text and isinstance(given, str):
            with suppress(ValueError):  # else it is for the template to refuse
                function["arguments"] = parse_json(given)
        return {**call, "function": function}

    @cached_property
    def _found(self) -> _Found:
        """Text where the template passes it on as it stands, so that the model is shown what it has written;
        an object where that is refused, or would stand where an object has tags of its own. Of contents, the
        one that leaves no trace."""
        best: list[tuple[tuple[int, int], _Found]] = []
        has_tags = False
        for as_text, content in product((True, False), ("", None)):
            shown = self._render(as_text, content)
            if shown is None or KEY not in shown:
                continue
            if (ARGUMENTS not in shown) if as_text else (f"{{'{KEY}'" in shown):
                continue
            has_tags |= not as_text and ARGUMENTS.replace(" ", "") not in shown.replace(" ", "")
            best.append(((shown.count("None"), len(shown)), _Found(as_text, content)))
        return min(best, key=lambda pair: (pair[1].as_text is has_tags, pair[0]), default=((), _Found()))[1]

    @cached_property
    def _takes_bare_tools(self) -> bool:
        return self.rendered(QUESTION, _tool({"name": NAME})) is not None

    def _render(
        self, as_text: bool, content: str | None, said: Mapping[str, str] = MappingProxyType({})
    ) -> str | None:
        function = {"name": NAME, "arguments": ARGUMENTS if as_text else json.loads(ARGUMENTS)}
        call = {"id": CALL_ID, "type": "function", "function": function}
        parameters = {"type": "object", "properties": {}}
        return self.rendered(
            [
                *QUESTION,
                {"role": "assistant", "content": content, "tool_calls": [call], **said},
                {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": "a"},
            ],
            _tool({"name": "other", "description": "a", "parameters": parameters}),
        )

    def rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """A prompt of messages and tools as the template wants them; None where it refuses."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=True,
                    **variables,
                )
            )
        except Exception:  # a template is a program, and raises what it likes
            return None


def _tool(function: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function}]
