"""Chat templates that a user gives instead of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.offload.chat_template import check_chat_template
from support.chat_templates import DIALECTS, THINKING

QUESTION = {"role": "user", "content": "Will it rain?"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }}", "line 2: Unexpected end of template.*; correct it$"),
        ("{{ messages }}\n\n{{ 'a' | nope }}", "chat_template is no template in Jinja: line 3: No filter"),
        ("{{ messages", "line 1: unexpected end of template"),
        ("template.jinja", "has no place for messages: 'template.jinja'; give a chat template in Jinja"),
        ("The messages:\n\n{{ bos_token }} no messages", "has no place for messages: 'The messages:"),
        (Path("template.jinja"), r"is .*Path\('template.jinja'\); give the text of a template in Jinja"),
        ("", "has no place for messages: ''"),
    ],
)
def test_what_is_no_template(template: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        moe_local.load("demo", chat_template=template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [dialect.template for dialect in (*DIALECTS.values(), THINKING)])
def test_templates_are_left_as_they_are(template: str) -> None:
    assert check_chat_template(template) == template


def test_a_template_for_training() -> None:
    """What only transformers knows: it marks what a model is trained on."""
    check_chat_template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )


def test_it_decides_on_prompts_and_answers(make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint("mixtral", tokenizer=True))
    with moe_local.load(folder, device="cpu") as model:
        own = model.stream([QUESTION]).prompt_ids
        with pytest.raises(OptionError, match="knows no tools"):
            model.stream([QUESTION], tools=TOOLS)
    template = DIALECTS["qwen"].template
    with moe_local.load(folder, device="cpu", chat_template=template) as model:
        assert model.tokenizer.chat_template == template
        prompt = model.tokenizer.decode(model.stream([QUESTION], tools=TOOLS).prompt_ids)
        assert prompt == "[weather]<user>Will it rain?<assistant>"
        assert model.stream([QUESTION]).prompt_ids != own
        assert "<function=" in model.answers.grammar({"weather": None})


def test_it_needs_a_tokenizer(make_checkpoint: Callable[..., Path]) -> None:
    folder = str(make_checkpoint("mixtral"))
    with pytest.raises(OptionError, match="has no tokenizer for a chat template; add one, or leave that out"):
        moe_local.load(folder, device="cpu", chat_template="{{ messages }}")
