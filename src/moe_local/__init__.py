"""moe-local: large Mixture-of-Experts models on one ordinary GPU.

model = moe_local.load("mixtral-8x7b", vram="20GiB", ram="40GiB")
for token in model.stream("Why is the sky blue?"):
    print(token.text, end="")
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from moe_local.cache.errors import MoeLocalError

if TYPE_CHECKING:
    __version__: str
    from moe_local.cache.policies import register_policy
    from moe_local.cache.policy import EvictionPolicy
    from moe_local.offload.conversion import convert
    from moe_local.offload.load import load
    from moe_local.offload.model import Model
    from moe_local.offload.plan.fit import fit
    from moe_local.offload.prefetch.names import register_prefetcher
    from moe_local.offload.prefetch.prefetch import Guess, Prefetcher

if "torch" not in sys.modules:  # it reads this once, when it is imported; see offload/system/threads.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "EvictionPolicy",
    "Guess",
    "Model",
    "MoeLocalError",
    "Prefetcher",
    "__version__",
    "convert",
    "fit",
    "load",
    "register_policy",
    "register_prefetcher",
]

_HOMES = {
    "EvictionPolicy": "moe_local.cache.policy",
    "Guess": "moe_local.offload.prefetch.prefetch",
    "Model": "moe_local.offload.model",
    "Prefetcher": "moe_local.offload.prefetch.prefetch",
    "convert": "moe_local.offload.conversion",
    "fit": "moe_local.offload.plan.fit",
    "load": "moe_local.offload.load",
    "register_policy": "moe_local.cache.policies",
    "register_prefetcher": "moe_local.offload.prefetch.names",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import moe_local` alone stays free of torch (PEP 562)."""
    if name in _HOMES:
        from importlib import import_module

        from moe_local.offload.system.collector import uncollected

        with uncollected():
            return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """That of the installed package, as pyproject.toml has it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moe-local")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
