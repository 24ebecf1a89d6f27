"""MoE blocks of a router, experts and perhaps a shared expert, computed with the rest of their layer."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.library_call import matrix_of, same_format
from moe_local.offload.dense.router import NativeRouter
from moe_local.offload.dense.token_calls import attempt
from moe_local.offload.dense.token_mlp import TokenMlp, run
from moe_local.offload.native.library import Matrix, Mlp, Router


class Described(NamedTuple):
    """The library's descriptions of a block's parts but for the experts."""

    router: Router
    shared: Mlp | None
    share: Matrix | None
    activations: str
    """Of `shared`; see QuantizedLinear."""

    def add_shared(self, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """What the block gives for x [T, D], for which its experts give `answer` [T, D]."""
        if self.shared is None:
            return answer
        return answer + run(self.shared, self.share, x, self.activations)


class TokenBlock:
    """One MoE block whose router, and shared expert if it has one, run in the library. Holds addresses, which
    are checked at each call."""

    def __init__(self, router: str, experts: str, shared: str | None, share: str | None) -> None:
        """Names of the block's parts. `share` is a linear layer; the sigmoid of what it gives is how much of
        the shared expert's output counts."""
        self.router, self.experts, self.shared, self.share = router, experts, shared, share
        self._described: Described | None = None
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that `_described` was made for."""
        self._guard: Guard | None = None

    @classmethod
    def of(cls, module: nn.Module) -> TokenBlock | None:
        """The block of a module with just these parts; None for others. What the module computes with them is
        not checked here."""
        kinds: dict[str, list[str]] = {"router": [], "experts": [], "shared": [], "share": []}
        for name, part in module.named_children():
            kinds[_kind_of(part)].append(name)
        if [len(kinds["router"]), len(kinds["experts"])] != [1, 1] or len(kinds["shared"]) > 1:
            return None
        if len(kinds["share"]) > len(kinds["shared"]):
            return None
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(False)):
            return None
        names = (next(iter(found), None) for found in kinds.values())
        return cls(*names)  # type: ignore[arg-type]

    def agrees(self, module: Any, x: torch.Tensor) -> bool:
        """Whether the block passes its input x [1, 1, D] to its parts, the router's choice to its experts,
        and returns their output, with the shared expert's added; compared bit by bit, on random numbers."""
        generator = torch.Generator().manual_seed(17)

        def random(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator).to(like.dtype)

        x, answer, extra = random(x), random(x), random(x)
        answers = {self.experts: answer, self.shared: extra, self.share: random(x[..., :1])}
        given: dict[str, tuple[Any, ...]] = {}

        def note(name: str) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                given[name] = (*args, *kwargs.values(), output)
                return output if name == self.router else answers[name].view(output.shape)

            return getattr(module, name).register_forward_hook(hook, with_kwargs=True).remove

        names = [name for name in (self.router, self.experts, self.shared, self.share) if name is not None]
        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.callback(note(name))
            output = attempt(module, x)
        if output is None:
            return False
        asked, told = given.get(self.router, ()), given.get(self.experts, ())
        if len(asked) != 2 or len(told) != 4 or given.keys() != set(names):
            return False
        _logits, weights, ids = asked[1]
        pairs = [(asked[0], x), (told[0], x), (told[1], ids), (told[2], weights)]
        pairs += [(given[name][0], x) for name in names[2:]]
        if self.share is not None:
            extra = answers[self.share].sigmoid() * extra
        wanted = answer if self.shared is None else answer + extra
        pairs.append((output[0] if isinstance(output, tuple) else output, wanted))
        return all(a.dtype is b.dtype and torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in pairs)

    def describe(self, module: Any, dtype: torch.dtype) -> Described | None:
        """The library's descriptions of the parts, for inputs of `dtype`; None: the module must be called."""
        parts = module._modules
        router = parts.get(self.router)
        native: NativeRouter | None = getattr(router, "_native_router", None)
        if native is None or not native.unchanged(router):
            return None
        shared, calls = None, None
        if self.shared is not None:
            shared = parts.get(self.shared)
            calls = getattr(shared, "_token_mlp", None)
            if calls is None or not calls.ready(shared, dtype):
                return None
        if self._described is not None and dtype is self._dtype and self._guard is not None:
            mlp = None if calls is None else calls.struct
            if mlp is self._described.shared and self._guard.holds():
                return self._described
        return self._find(module, dtype, native, shared, calls)

    def _find(
        self, module: Any, dtype: torch.dtype, native: NativeRouter, shared: Any, calls: TokenMlp | None
    ) -> Described | None:
        router, share = module._modules[self.router], module._modules.get(self.share)
        guard = Guard(module, [module, *(part for part in (router, shared, share) if part is not None)])
        if not guard.holds() or not native.takes(router, dtype) or not native.ready(router):
            return None
        if self.share is not None and (not _is_share(share) or not same_format([share], dtype)):
            return None
        self._described = Described(
            native.struct(dtype),
            None if calls is None else calls.struct,
            None if share is None else matrix_of(share),
            "native" if calls is None else calls.activations,
        )
        self._dtype, self._guard = dtype, guard
        return self._described

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_described": None, "_guard": None}


def _kind_of(part: nn.Module) -> str:
    if hasattr(part, "_native_router"):
        return "router"
    if hasattr(part, "_token_mlp"):
        return "shared"
    return "share" if _is_share(part) else "experts"


def _is_share(part: Any) -> bool:
    return getattr(part, "out_features", None) == 1
