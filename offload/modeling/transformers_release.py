"""Whether the installed transformers is one that moe-local can build on.

Models, configs and tokenizers are asked for in public ways, but loading without experts, conversion rules and
cache layers have none. What of transformers' insides is used is named here, so that a release that moved it
is told apart from a mistake of ours, at import and in one line.
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
"""Names by module of transformers."""


class TransformersError(MoeLocalError, ImportError):
    """The installed transformers is too old, too new, or not there."""


def check_release() -> None:
    """Raise TransformersError if something is not where it is looked for. Imports transformers."""
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
