"""Checks whether moe-local works with the installed release of transformers.

Models, configs and tokenizers are used through public interfaces, but there are none for loading without
experts, for conversion rules and for cache layers. The internals of transformers that are used are listed
here, so that a release in which they have moved is reported at import, in one line.
"""

from __future__ import annotations

from importlib import import_module, metadata

from moe_local.cache.errors import MoeLocalError

WORKS = "5.17 to 5.24"
REMEDY = "pip install 'transformers>=5.17,<5.25'"

INTERNALS = {
    "cache_utils": ("DynamicLayer", "DynamicSlidingWindowLayer", "EncoderDecoderCache"),
    "conversion_mapping": ("get_model_conversion_mapping",),
    "core_model_loading": ("MergeModulelist", "WeightConverter", "WeightRenaming", "rename_source_key"),
    "modeling_utils": ("PreTrainedModel._load_pretrained_model", "PreTrainedModel._from_config"),
    "models.auto.configuration_auto": ("CONFIG_MAPPING",),
    "models.auto.modeling_auto": (
        "MODEL_FOR_CAUSAL_LM_MAPPING",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    ),
}
"""Module of transformers -> the internal names that are used from it."""


class TransformersError(MoeLocalError, ImportError):
    """The installed transformers is too old, too new, or not there."""


def check_release() -> None:
    """Raise TransformersError if one of INTERNALS is missing. Imports transformers."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        raise TransformersError(f"transformers is not installed; moe-local needs it: {REMEDY}") from error
    for module, names in INTERNALS.items():
        for name in names:
            try:
                found = import_module(f"transformers.{module}")
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError) as error:
                raise TransformersError(
                    f"transformers {version} has no {module}.{name}, which moe-local builds on; "
                    f"it works with {WORKS}: {REMEDY}"
                ) from error
