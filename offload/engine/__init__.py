"""The decode loop: sequences, their key-value memory, picking tokens, text in and out."""

from moe_local.offload.modeling.transformers_release import check_release

check_release()
