"""Answers of Mistral's models, whose templates refuse ids of calls that are not nine letters and digits."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence

from moe_local.offload.answer_format.answer_format import Message, calls_of
from moe_local.offload.answer_format.marked import MarkedFormat
from moe_local.offload.answer_format.template_needs import NONE

ID = re.compile(r"[A-Za-z0-9]{9}")
SETTINGS = re.compile(r"\[MODEL_SETTINGS\](.*?)\[/MODEL_SETTINGS\]", re.DOTALL)
"""Where templates say, far in front of the question, whether to think."""


class MistralFormat(MarkedFormat):
    """The usual format but for the ids, and for where a prompt turns thoughts off."""

    def is_told_to_think(self, prompt_ids: Sequence[int]) -> bool:
        said = SETTINGS.search(self.tokenizer.decode(list(prompt_ids)))
        return said is None or f'"{NONE}"' not in said[1]

    def call_id(self) -> str:
        return uuid.uuid4().hex[:9]

    def call_ids(self, messages: Sequence[Message]) -> dict[str, str]:
        """Digests of those made elsewhere, the same in each request, so that prompts begin alike."""
        ids = [call.get("id") for message in messages for call in calls_of(message)]
        return {
            old: hashlib.sha256(old.encode(errors="replace")).hexdigest()[:9]
            for old in ids
            if isinstance(old, str) and not ID.fullmatch(old)
        }
