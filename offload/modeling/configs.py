"""Configs as transformers' objects."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

EQUAL_FACTORS = re.compile(r"got high_freq_factor=(\S+) and low_freq_factor=\1$")


def make_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json whose model type it has. Raises whatever that raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_of_use)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))


def attention_of(config: Any) -> str | None:
    """The attention that a model's config asks for, as `config._attn_implementation`.

    That costs every layer of a token some microseconds: an attribute of a config is looked up under its other
    names first, in Python, and this one is a property of another.
    """
    own: dict[str, Any] = object.__getattribute__(config, "__dict__")
    found: str | None = own.get("_attn_implementation_internal")
    return config._attn_implementation if found is None else found


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for the doubt about Llama 4 Scout's positions: two equal factors are a step where others have a
    ramp, and what Meta published."""
    return not EQUAL_FACTORS.search(record.getMessage())
