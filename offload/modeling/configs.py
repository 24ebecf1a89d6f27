"""Makes and reads transformers' config objects."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Model types that are published as another's architecture under a name of their own, and its name."""

OPTIONS = frozenset({"attn_implementation", "_attn_implementation"}) | {
    f"output_{name}" for name in ("attentions", "hidden_states", "router_logits")
}
"""Fields of a config that say how its publisher ran the model. What they ask for is not returned here, but
costs time and memory, and attention may ask for a library that is not installed."""

EQUAL_FACTORS = re.compile(r"got high_freq_factor=(\S+) and low_freq_factor=\1$")


def make_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config object for a config.json of a model type that it knows. Raises as transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_of_use)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(_without_options(fields))


def _without_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_options(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in OPTIONS
    }


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
