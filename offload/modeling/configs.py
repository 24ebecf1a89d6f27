"""Makes and reads transformers' config objects."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

EQUAL_FACTORS = re.compile(r"got high_freq_factor=(\S+) and low_freq_factor=\1$")


def make_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config object for a config.json of a model type that it knows. Raises as transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_of_use)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))


def attention_of(config: Any) -> str | None:
    """The attention implementation of a model's config: a fast `config._attn_implementation`.

    The attribute itself costs some microseconds per layer and token: a config looks attributes up under their
    aliases first, in Python, and this one is a property that reads another.
    """
    own: dict[str, Any] = object.__getattribute__(config, "__dict__")
    found: str | None = own.get("_attn_implementation_internal")
    return config._attn_implementation if found is None else found


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for the warning about Llama 4 Scout's rotary factors: two equal factors give a step where others
    give a ramp, and are what Meta published."""
    return not EQUAL_FACTORS.search(record.getMessage())
