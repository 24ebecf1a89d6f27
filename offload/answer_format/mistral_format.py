"""Answers of Mistral's models, whose templates refuse ids of calls that are not nine letters and digits."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence

from moe_local.offload.answer_format.answer_format import Message, calls_of
from moe_local.offload.answer_format.marked import MarkedFormat

ID = re.compile(r"[A-Za-z0-9]{9}")


class MistralFormat(MarkedFormat):
    """The usual format but for the ids."""

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
