"""Chat templates that a user gives, checked before a model is loaded."""

from __future__ import annotations

import re

from moe_local.cache.errors import OptionError, shown

READS_MESSAGES = re.compile(r"\{[{%](?:(?!%\}|\}\}).)*\bmessages\b", re.DOTALL)
"""In an expression or a statement."""


def check_chat_template(text: object, called: str = "chat_template") -> str:
    """The text of a template in Jinja, as it is. Raises OptionError for what is none, which it calls
    `called`."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(text, str):
        raise OptionError(f"{called} is {shown(text)}; give the text of a template in Jinja")
    try:
        render_jinja_template([], chat_template=text)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise OptionError(
            f"{called} is no template in Jinja: line {error.lineno}: {reason}; correct it"
        ) from error
    if not READS_MESSAGES.search(text):  # a file's name, say: a conversation would be lost without a word
        raise OptionError(f"{called} has no place for messages: {shown(text)}; give a chat template in Jinja")
    return text
