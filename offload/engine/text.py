"""Text to token ids and back: encodes prompts with the chat template, and decodes tokens as they come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from moe_local.cache.errors import OptionError, shown
from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.engine.conversation import (
    Message,
    check_knows_tools,
    check_messages,
    check_text,
    check_tools,
)

Prompt = str | Sequence[Message] | Sequence[int] | torch.Tensor
"""Text, a conversation of {"role": ..., "content": ...}, or token ids. A content is text, or a list of parts
{"type": "text", "text": ...}."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
TEMPLATE_ARGUMENTS = frozenset(
    {"conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "messages"}
)
"""Arguments of apply_chat_template that are not variables of the template."""
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, so also tokens: each has a byte or more."""


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    template: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    answers: AnswerFormat | None = None,
) -> list[int]:
    """Token ids of a prompt, special tokens included.

    A string is one user turn where the tokenizer has a chat template; with `template=False`, or without one,
    it is text to be continued. A conversation that ends with the assistant is continued there. `tools` (JSON
    schemas) and further `variables` are for the template; a prompt that it is not applied to must have none.
    With `answers`, messages and tools are OpenAI's, and put as the template wants them.
    Ids pass unchanged, and need no tokenizer. Raises OptionError when the prompt cannot be encoded.
    """
    tools, variables = check_tools(tools), {} if variables is None else variables
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise OptionError(
            f"chat_template_kwargs is {shown(variables)}; give a dict of variables by their names"
        )
    if isinstance(prompt, torch.Tensor):
        prompt = _flat_ids(prompt)
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, str | Iterable):
        raise OptionError(f"the prompt is {shown(prompt)}; give text, a list of messages or token ids")
    items: list[Any] = [] if isinstance(prompt, str) else list(prompt)
    if not isinstance(prompt, str) and all(_is_id(item) for item in items):
        _check_unused(tools, variables, "token ids")
        return [int(item) for item in items]
    if tokenizer is None:
        raise OptionError(
            "this model's folder has no tokenizer; put its tokenizer.json there, or give the prompt as a "
            "list of token ids, in Python or to /v1/completions"
        )
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        if template and has_template:
            question = {"role": "user", "content": prompt}
            return _encode_chat(tokenizer, [question], tools, variables, answers)
        _check_unused(tools, variables, "plain text")
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        return ids
    _check_items(items)
    messages = check_messages(items)
    if not (template and has_template):
        raise OptionError(f"a conversation needs a chat template, and {_why_raw(template)}")
    return _encode_chat(tokenizer, messages, tools, variables, answers)


def _check_items(items: Sequence[object]) -> None:
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise OptionError(
                f"item {index} of the prompt is {shown(item)}; give token ids, or messages like "
                '{"role": "user", "content": "..."}'
            )


def _check_unused(tools: object, variables: object, prompt: str) -> None:
    for name, value in (("tools", tools), ("chat_template_kwargs", variables)):
        if value:
            raise OptionError(
                f"{name} are for the chat template, which is not applied to {prompt}; leave them out, or "
                "give messages"
            )


def _why_raw(template: bool) -> str:
    if not template:
        return "template=False turns it off; give plain text"
    return "this tokenizer has none; load the model with one, or give plain text"


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _flat_ids(prompt: torch.Tensor) -> list[int]:
    """A tensor of ids [n] or [1, n] as a list."""
    if prompt.is_floating_point() or prompt.dim() not in (1, 2) or (prompt.dim() == 2 and len(prompt) != 1):
        raise OptionError(
            f"the prompt is {prompt.dtype} of shape {list(prompt.shape)}; one prompt is integers of shape [n]"
        )
    ids: list[int] = prompt.flatten().tolist()
    return ids


def _encode_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: Mapping[str, Any],
    answers: AnswerFormat | None,
) -> list[int]:
    clash = variables.keys() & TEMPLATE_ARGUMENTS
    if clash:
        raise OptionError(f"{min(clash)} is not a variable of the chat template's own; leave it out")
    if tools is not None:
        check_knows_tools(tokenizer, tools)
    continues = messages[-1]["role"] == "assistant"
    if continues and messages[-1].get("tool_calls"):
        raise OptionError(
            "the conversation ends with calls of tools; give their results behind them, as messages of the "
            "role tool"
        )
    if answers is not None:
        answers.check_places(messages)
    try:
        ids = tokenizer.apply_chat_template(
            messages if answers is None else answers.messages(messages),
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tools=tools if answers is None else answers.tools(tools),
            tokenize=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # too long a prompt is refused in better words
            **(variables if answers is None else answers.variables(variables)),
        )
    except Exception as error:  # a template is a program, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(
            f"the model's chat template refuses a conversation of {roles}: {reason}; "
            "change the roles (many templates know no system role), give another chat template, or have "
            "plain text continued"
        ) from error
    return list(ids)


def _ids_of(tokenizer: Any, marks: Iterable[str]) -> dict[int, str]:
    if isinstance(marks, str) or not isinstance(marks, Iterable):
        raise OptionError(f"marks is {shown(marks)}; give a list of special tokens")
    marks = list(marks)
    added: dict[str, int] = tokenizer.get_added_vocab() if marks else {}
    for mark in marks:
        if mark not in added:
            raise OptionError(f"{mark!r} of marks is no special token of this model; leave it out")
    return {added[mark]: mark for mark in marks}


class Detokenizer:
    """Text of one sequence, token by token; the pieces add up to the text of all tokens decoded at once.

    A piece that was returned is final. An incomplete character is held back until all its bytes are there. So
    is a run of byte tokens (<0xE4> ...) of sentencepiece vocabularies until it ends, since one wrong byte
    changes how the decoder reads the whole run.

    Decoding depends on neighbours (the first word loses its space), so tokens are decoded in a window: the
    tokens of the previous piece, for context, and those since. So a token's cost does not grow with the text.

    Special tokens are left out, except for `marks`: each of these stands in the text, and a new one begins
    behind it.
    """

    def __init__(self, tokenizer: Any, marks: Iterable[str] = ()) -> None:
        """Raises OptionError for marks that are no special tokens."""
        self._tokenizer = tokenizer
        self._marks = _ids_of(tokenizer, marks)
        self._window: list[int] = []
        self._context = 0
        """Tokens at the start of the window whose text was returned before."""
        self._given = 0
        """Characters of the window's text that were returned."""
        self._in_byte_run = False

    def add(self, token: int) -> str:
        """The text that this token completes, often "" or more than its own."""
        if token in self._marks:
            return self.flush() + self._marks[token]
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str) and BYTE_TOKEN.fullmatch(name):
            self._window.append(token)
            self._in_byte_run = True
            return ""
        if self._in_byte_run and self._is_dropped(token):  # the bytes on both sides are a single run
            return ""
        self._in_byte_run = False
        self._window.append(token)
        text = self._decode(self._window)
        # at most one unfinished character stands at the end, and it decodes to one replacement character
        stable = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._given : stable]
        self._given = max(self._given, stable)
        if not piece:
            if self._is_dropped(token):
                self._window.pop()
        elif stable == len(text):
            self._move_window()
        else:
            self._shorten_window()
        return piece

    def flush(self) -> str:
        """The text that is still held back, as the decoder shows it at an end. Starts a new text."""
        piece = self._decode(self._window)[self._given :]
        self._window, self._context, self._given, self._in_byte_run = [], 0, 0, False
        return piece

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def _is_dropped(self, token: int) -> bool:
        """Whether it is left out before decoding, as special tokens and ids without a name are."""
        if self._tokenizer.convert_ids_to_tokens(token) is None:
            return True
        return not self._decode([token]) and bool(self._decode([token], special=True))

    def _move_window(self) -> None:
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._given = len(self._decode(self._window))

    def _shorten_window(self) -> None:
        """Keep the last tokens, with the bytes of the last character, which may be unfinished."""
        window = self._window[-LONGEST_CHARACTER:]
        text = self._decode(window)
        if text.endswith(REPLACEMENT):
            self._window, self._context, self._given = window, 0, len(text) - 1
