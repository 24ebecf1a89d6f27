"""MoE blocks of a router and experts and nothing else, whose router can run in the layer's library call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.router import NativeRouter
from moe_local.offload.native.library import Router


class TokenBlock:
    """One MoE block whose router runs in the library. Holds the router's address, checked at each call."""

    def __init__(self, router: str, experts: str) -> None:
        """Names of the block's parts."""
        self.router, self.experts = router, experts
        self._struct: Router | None = None
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that `_struct` was made for."""
        self._guard: Guard | None = None

    @classmethod
    def of(cls, module: nn.Module) -> TokenBlock | None:
        """The block of a module with just these parts; None for others. What the module computes with them is
        not checked here."""
        parts = dict(module.named_children())
        routers = [name for name, part in parts.items() if hasattr(part, "_native_router")]
        if len(parts) != 2 or len(routers) != 1:
            return None
        router = routers[0]
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(False)):
            return None
        if any(True for _ in parts[router].buffers()):  # which a Guard does not watch
            return None
        return cls(router, next(name for name in parts if name != router))

    def agrees(self, module: Any, x: torch.Tensor) -> bool:
        """Whether the block passes its input x [1, 1, D] to its router, that and the router's choice to its
        experts, and returns their output; compared bit by bit, on random numbers."""
        generator = torch.Generator().manual_seed(17)
        x, answer = (torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(2))
        given: dict[str, tuple[Any, ...]] = {}

        def note(name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                given[name] = (*args, *kwargs.values(), output)
                return output if name == self.router else answer.view(1, -1)

            return getattr(module, name).register_forward_hook(hook, with_kwargs=True).remove

        with contextlib.ExitStack() as hooks, torch.no_grad():
            hooks.callback(note(self.router))
            hooks.callback(note(self.experts))
            try:
                output = module(x)
            except (RuntimeError, TypeError, ValueError, AttributeError):
                return False
        asked, told = given.get(self.router, ()), given.get(self.experts, ())
        if len(asked) != 2 or len(told) != 4:
            return False
        _logits, weights, ids = asked[1]
        pairs = [(asked[0], x), (told[0], x), (told[1], ids), (told[2], weights)]
        pairs.append((output[0] if isinstance(output, tuple) else output, answer))
        return all(a.dtype is b.dtype and torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in pairs)

    def struct(self, module: Any, dtype: torch.dtype) -> Router | None:
        """The library's description of the router, for inputs of `dtype`; None: the module must be called."""
        router = module._modules.get(self.router)
        native: NativeRouter | None = getattr(router, "_native_router", None)
        if native is None or not native.unchanged(router):
            return None
        if self._guard is not None and dtype is self._dtype and self._guard.holds():
            return self._struct
        guard = Guard(module, [module, router])
        if not guard.holds() or not native.takes(router, dtype) or not native.ready(router):
            return None
        self._struct, self._dtype, self._guard = native.struct(dtype), dtype, guard
        return self._struct

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_struct": None, "_guard": None}
