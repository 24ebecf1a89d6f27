"""Few tokens' choice of experts in one call of the library, where a model needs six operations or twenty."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.token_calls import attempt
from moe_local.offload.kernels.cpu import plain_matrix
from moe_local.offload.modeling.stand_in import stand_in
from moe_local.offload.native.library import (
    DTYPES,
    SIGMOID,
    SOFTMAX,
    Matrix,
    Router,
    check,
    library,
    loaded_library,
)
from moe_local.offload.system.threads import kernel_threads

FEW_TOKENS = 16
"""For more tokens torch's threads are faster."""

TRIALS = 32
"""Tokens on which a model's router is compared with the library's."""

CORRECTION = "e_score_correction_bias"
"""The name of a buffer that is added to scores for the choice alone."""

SETTINGS = ("top_k", "num_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
"""Attributes of a router that may change what it gives."""


class Way(NamedTuple):
    """How a router gets from logits to weights: see Router in moe_native.h."""

    normalized: bool = False
    scoring: int = SOFTMAX
    groups: int = 0
    top_groups: int = 0
    best: int = 0
    scaling: float = 1.0

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [T, E] in fp32."""
        return logits.softmax(-1) if self.scoring == SOFTMAX else logits.sigmoid()

    def weights(self, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The weights of these experts [T, K], from logits [T, E] in fp32."""
        weights = self.scores(logits).gather(1, experts)
        if self.normalized:
            least = 1e-20 if self.scoring == SIGMOID else 0.0
            weights = weights / (weights.sum(-1, keepdim=True) + least)
        return weights * self.scaling


def use_native_routers(model: nn.Module) -> None:
    """Let the library compute those routers of `model`, in CPU memory, that it is able to, for few tokens.

    Such a router has one weight, perhaps a bias and a correction, and returns (logits, weights, experts); how
    it gets weights from logits is found out by trial.
    """
    if library() is None:
        return
    last: Way | None = None
    for module in model.modules():
        router = NativeRouter.of(module)
        if router is not None and router.agrees(module, last):
            last = router.way
            cls: Any = type(module)
            module._native_router = router  # type: ignore[assignment]
            module.__class__ = _native(cls)


class NativeRouter:
    """The library's call for one router. Holds the addresses of its weights, checked before each call."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self.settings = settings
        """The module's SETTINGS."""
        self.top_k: int = settings[0]
        self.way = Way()
        self.dtype = torch.float32
        """The dtype of the weights that the module returns."""
        self.in_fp32 = False
        """Whether logits are computed in fp32, whatever the dtype of inputs and weights is."""
        self.mixes = False
        """Whether weights in fp32 take inputs of 16 bits, and give the same dtypes then."""
        self._where: tuple[Any, ...] | None = None
        self._matrix: Matrix | None = None
        self._correction: torch.Tensor | None = None
        self._structs: dict[torch.dtype, Router] = {}
        """By the dtype of inputs, of the weights at their present addresses."""

    @classmethod
    def of(cls, module: nn.Module) -> NativeRouter | None:
        """The call for a module that has a router's parameters and nothing else; None for other modules."""
        weight, top_k = (getattr(module, name, None) for name in ("weight", "top_k"))
        parameters = {name for name, _ in module.named_parameters()}
        if not isinstance(top_k, int) or "top_k" not in vars(module):
            return None
        if not parameters or parameters - {"weight", "bias"}:
            return None
        buffers = {name for name, _ in module.named_buffers()}
        if any(True for _ in module.children()) or buffers - {CORRECTION}:
            return None
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in DTYPES:
            return None
        router = cls(_settings(module)) if 1 <= top_k <= weight.shape[0] else None
        return router if router is not None and router.ready(module) else None

    def ready(self, module: Any) -> bool:
        """Update the addresses of the module's weights.

        False if the library cannot read them, or if a setting of the module has changed.
        """
        weight, bias = module.weight, getattr(module, "bias", None)
        correction = module._buffers.get(CORRECTION)
        where = tuple((x.data_ptr(), x.dtype) for x in (weight, bias, correction) if x is not None)
        if where != self._where:
            others = [x for x in (bias, correction) if x is not None]
            if not _is_readable(weight) or not all(
                x.shape == weight.shape[:1] and _is_readable(x) for x in others
            ):
                return False
            self._where, self._matrix, self._correction = where, plain_matrix(weight, bias), correction
            self._structs = {}
        return self.unchanged(module)

    def unchanged(self, module: Any) -> bool:
        """Whether the module has the settings that it had."""
        return _settings(module) == self.settings

    def takes(self, module: Any, dtype: torch.dtype) -> bool:
        """Whether the module, with its weights as they are, takes inputs of this dtype."""
        own = module.weight.dtype
        return dtype is own or (self.mixes and own is torch.float32 and dtype in DTYPES)

    def struct(self, dtype: torch.dtype) -> Router:
        """The library's description of the router, for inputs of this dtype. Valid after `ready`, until the
        weights move."""
        made = self._structs.get(dtype)
        if made is None:
            made = self._structs[dtype] = self._described(dtype)
        return made

    def _described(self, dtype: torch.dtype) -> Router:
        assert self._matrix is not None
        way, correction = self.way, self._correction
        return Router(
            ctypes.pointer(self._matrix),
            top_k=self.top_k,
            normalized=way.normalized,
            scaling=way.scaling,
            dtype=DTYPES[self.dtype],
            logits_dtype=DTYPES[self.logits_dtype(dtype)],
            scoring=way.scoring,
            correction_dtype=0 if correction is None else DTYPES[correction.dtype],
            correction=None if correction is None else correction.data_ptr(),
            groups=way.groups,
            top_groups=way.top_groups,
            best=way.best,
        )

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.in_fp32 else dtype

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D], which it `takes` -> logits [T, E], weights [T, K], experts [T, K] int64; a token's are
        those that it has alone.

        To be called only after `ready`.
        """
        assert self._matrix is not None
        tokens = x.shape[0]
        logits = torch.empty(tokens, self._matrix.rows, dtype=self.logits_dtype(x.dtype))
        weights = torch.empty(tokens, self.top_k, dtype=torch.float32)
        experts = torch.empty(tokens, self.top_k, dtype=torch.int64)
        check(
            loaded_library().moe_route(
                ctypes.byref(self.struct(x.dtype)),
                x.data_ptr(),
                tokens,
                DTYPES[x.dtype],
                logits.data_ptr(),
                weights.data_ptr(),
                experts.data_ptr(),
                kernel_threads(),
            )
        )
        return logits, weights if self.dtype is torch.float32 else weights.to(self.dtype), experts

    def agrees(self, module: nn.Module, first: Way | None = None) -> bool:
        """Whether the module gives the same in one of the ways, of which `first` is tried first; keeps it.

        The module is called with a single token, as it will be in use, and with all tokens in a single call.
        A copy of it is, with corrections that matter, whatever its own are.
        """
        module = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(5)
        tokens = self._tokens(module, generator)
        trials: list[tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]]] = []
        for variant in self._variants(module, generator):
            x = -tokens.abs() if variant.negated else tokens
            trials += [(variant.module, part, attempt(variant.module, part)) for part in (x[:1], x)]
        rounded = attempt(copy.deepcopy(module).bfloat16(), tokens[:1].bfloat16())
        answers = [answer for *_, answer in trials]
        if not all(map(_is_answer, (*answers, rounded))):
            return False
        self.dtype, self.in_fp32 = answers[0][1].dtype, rounded[0].dtype is torch.float32
        self.mixes = self.in_fp32 and _mixes(module, tokens[:1], answers[0])
        found = False
        for way in (*([] if first is None else [first]), *self._ways(module)):
            self.way, self._where = way, None
            found = all(self.ready(copied) and self._agrees_on(x, wanted) for copied, x, wanted in trials)
            if found:
                break
        self._where = None  # a copy's
        return found

    def _variants(self, module: nn.Module, generator: torch.Generator) -> Iterator[_Variant]:
        """Copies of a module, with corrections that matter; with such as make all corrected scores negative;
        and with weights for which all logits of negated tokens are far below zero."""
        for shift, negated in ((0.0, False), (2.0, False), (0.0, True)):
            copied = copy.deepcopy(module)
            correction = copied._buffers.get(CORRECTION)
            if correction is not None:
                random = torch.randn(correction.shape, generator=generator, dtype=torch.float32)
                correction.copy_(random / 4 - shift)
            elif shift:
                continue
            if negated:
                weight: Any = copied.weight
                weight.data = weight.data.abs()
            yield _Variant(copied, negated)

    def _ways(self, module: Any) -> Iterator[Way]:
        groups, top_groups, scaling = (
            getattr(module, name, None) for name in ("num_group", "topk_group", "routed_scaling_factor")
        )
        choices = [(0, 0, 0)]
        if isinstance(groups, int) and isinstance(top_groups, int) and 1 <= top_groups <= groups:
            size = module.weight.shape[0] // groups
            if self.top_k <= top_groups * size:
                choices += [(groups, top_groups, best) for best in (1, 2) if best <= size]
        scalings = [1.0] + ([float(scaling)] if isinstance(scaling, int | float) and scaling != 1 else [])
        kinds = product((SOFTMAX, SIGMOID), (False, True))
        for factor, (scoring, normalized), groups_of in product(scalings, kinds, choices):
            yield Way(normalized, scoring, *groups_of, factor)

    def __getstate__(self) -> dict[str, Any]:
        """Without cached addresses, which are not valid for a copy."""
        return {**self.__dict__, "_where": None, "_matrix": None, "_correction": None, "_structs": {}}

    def _tokens(self, module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        """[TRIALS, D]: random tokens, some with nearly equal and some with very different scores."""
        given: Any = module.weight
        weight: torch.Tensor = given.detach().float()
        x = torch.randn(TRIALS, weight.shape[1], generator=generator, dtype=torch.float32)
        sizes = torch.logspace(-1, 1, TRIALS, dtype=torch.float32)[:, None]
        return (x * sizes / weight.square().sum(dim=1).mean().sqrt().clamp_min(1e-6)).to(given.dtype)

    def _agrees_on(self, x: torch.Tensor, wanted: tuple[torch.Tensor, ...]) -> bool:
        """Whether the library gives for each of the tokens x [T, D] what is wanted for all."""
        got = tuple(map(torch.cat, zip(*map(self, x.split(1)), strict=True)))
        if any(a.shape != b.shape or a.dtype is not b.dtype for a, b in zip(got, wanted, strict=True)):
            return False
        theirs = wanted[0].float()
        steps = 32 if wanted[0].dtype is torch.float32 else 4  # sums of thousands, or one rounding of them
        allowed = steps * torch.finfo(wanted[0].dtype).eps * (1 + theirs.abs().amax(-1, keepdim=True))
        logits = (got[0].float() - theirs).abs() <= allowed
        # experts that rank alike may swap places, and some modules give the chosen in any order
        ranked = theirs if self.way.scoring == SOFTMAX else theirs.sigmoid()
        if self._correction is not None:
            ranked = self.way.scores(theirs) + self._correction.float()
        mine, asked = (ranked.gather(1, ids).sort(-1).values for ids in (got[2], wanted[2]))
        same = (mine - asked).abs() <= allowed
        # Compare with weights computed from the module's logits: weights computed from the library's
        # logits would be less close where logits are rounded to 16 bits.
        weights = self.way.weights(theirs, wanted[2])
        off = (weights - wanted[1].float()).abs()
        exact = off <= 1e-6 + 2 * torch.finfo(self.dtype).eps * weights
        return bool(logits.all() and same.all() and exact.all())


class _Variant(NamedTuple):
    """A copy of a router to be tried, and whether it is given negative tokens."""

    module: Any
    negated: bool


def _mixes(module: nn.Module, x: torch.Tensor, wanted: tuple[torch.Tensor, ...]) -> bool:
    """Whether a module gives the dtypes `wanted` for an input of 16 bits, too."""
    answer = attempt(module, x.bfloat16())
    return _is_answer(answer) and all(a.dtype is b.dtype for a, b in zip(answer, wanted, strict=True))


def _settings(module: Any) -> tuple[Any, ...]:
    own, cls = vars(module), type(module)
    return tuple(own[name] if name in own else getattr(cls, name, None) for name in SETTINGS)


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 3 and all(map(torch.is_tensor, answer))


def _is_readable(weight: torch.Tensor) -> bool:
    return weight.dtype in DTYPES and weight.is_cpu and weight.is_contiguous()


@cache
def _native(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x, weight = hidden_states, self.weight
        if (
            args
            or kwargs
            or x.shape[-1] != weight.shape[1]
            or not 0 < x.numel() <= FEW_TOKENS * weight.shape[1]
            or (x.dim() != 2 and x.numel() > weight.shape[1])
            or not self._native_router.takes(self, x.dtype)
            or not x.is_cpu
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not self._native_router.ready(self)
        ):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return self._native_router(x.reshape(-1, x.shape[-1]).contiguous())

    return stand_in(cls, _native, forward)
