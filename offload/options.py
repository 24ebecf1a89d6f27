"""What a user may ask of `load()`, checked before anything is read or allocated."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from moe_local.cache.errors import OptionError
from moe_local.cache.keys import parse_bytes
from moe_local.offload.chat_template import check_chat_template
from moe_local.offload.prefetch.names import prefetchers
from moe_local.offload.ranges import plain_number

if TYPE_CHECKING:
    import torch

DENSE_FORMATS = ("auto", "nf4", "int8", "bf16", "fp16", "fp32")
ACTIVATIONS = ("native", "int8")
MISS = ("auto", "fetch", "cpu")

BUDGET = ("device", "vram", "ram", "slots", "dense", "context", "parallel")
"""Options that say how much room there is for experts."""

MOST_CARDS = 64
"""More than any machine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The keyword arguments of `load()`, validated when made: a LoadOptions that exists is well-formed.

    Sizes may be given as text ("20GiB") and are kept as bytes. What depends on the machine or on the model
    (a device that is not there, slots below top-k) is checked where those are known. Raises OptionError.
    The `help` of each field is what the command line shows for its flag.
    """

    device: str = field(
        default="auto",
        metadata={
            "help": "auto, cpu, cuda or cuda:N; auto takes CUDA devices if there are any, all of them "
            "(as cuda does) if one does not hold everything."
        },
    )
    vram: int | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "Most GPU memory to use, such as 20GiB, for everything: dense part, KV cache, experts. "
            "With several cards this is for each; 24GiB,12GiB or 2x24GiB lists them one by one."
        },
    )
    ram: int | None = field(
        default=None, metadata={"help": "Most RAM to use, such as 40GiB, for everything that is kept there."}
    )
    slots: int | None = field(
        default=None,
        metadata={"help": "Experts kept per MoE layer in the fastest tier, instead of as many as fit."},
    )
    experts: str = field(
        default="nf4",
        metadata={
            "help": "Format of the routed experts: nf4, int8, q3, q2, mxfp4, fp8, bf16, fp16, fp32 or native "
            "(as stored); or a format for each expert, chosen to harm the answers least: mixed:BITS, such as "
            "mixed:3.5 bits a weight on average, or auto, as many bits as the budget holds."
        },
    )
    activations: str = field(
        default="native",
        metadata={"help": "What the CPU kernel multiplies weights with: native (the compute dtype) or int8."},
    )
    dense: str = field(
        default="auto",
        metadata={
            "help": "Format of all other weights: auto (as in the checkpoint), nf4, int8, bf16, fp16 or fp32."
        },
    )
    context: int | None = field(
        default=None,
        metadata={"help": "Tokens of conversation to make room for; default the model's, 8192 at most."},
    )
    parallel: int = field(
        default=1,
        metadata={"help": "Answers at a time, each with a context of its own; for serve and batches."},
    )
    policy: str = field(
        default="adaptive",
        metadata={
            "help": "What leaves a full cache first: lru, lfu, fifo or adaptive, the better of lru and lfu."
        },
    )
    prefetch: str = field(
        default="auto",
        metadata={
            "help": "Bring the next layers' experts early: auto while that makes tokens faster, off, or "
            "always, as their routers guess (router), corrected by what calibrate found (learned)."
        },
    )
    miss: str = field(
        default="auto",
        metadata={
            "help": "Experts absent from VRAM: fetch brings them, cpu computes them on the CPU, "
            "auto does what is faster. With fetch, runs on a GPU are equal bit by bit."
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template of MODEL, in Jinja, instead of its own."}
    )

    def __post_init__(self) -> None:
        if self.vram is not None:
            object.__setattr__(self, "vram", _parse_cards(self.vram))
        if self.ram is not None:
            object.__setattr__(self, "ram", _memory(self.ram, "ram"))
        for name in ("slots", "context", "parallel"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
            _check_count(name, getattr(self, name))
        torch = sys.modules.get("torch")  # there if a torch.device is
        if torch is not None and isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise OptionError(f"unknown device {self.device!r}; use auto, cpu, cuda or cuda:N")
        self._check_experts()
        _check_name("activations", self.activations, ACTIVATIONS)
        _check_name("dense", self.dense, DENSE_FORMATS)
        _check_name("policy", self.policy, _policies())
        _check_name("prefetch", self.prefetch, prefetchers())
        _check_name("miss", self.miss, MISS)
        if self.chat_template is not None:
            check_chat_template(self.chat_template)

    def _check_experts(self) -> None:
        from moe_local.offload.quantize.mix import AUTO, canonical, is_mixed

        if isinstance(self.experts, str):
            object.__setattr__(self, "experts", canonical(self.experts))
        if not (isinstance(self.experts, str) and is_mixed(self.experts)):
            _check_name("experts", self.experts, [*_expert_formats(), "mixed:BITS", AUTO])

    @property
    def budget(self) -> str:
        """The given options that say what experts "auto" has to fit, in words: equal for equal requests.

        What memory happens to be free is not part of it: who asks for nothing asks for the same again later.
        """
        asked = (
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if option.name in BUDGET and getattr(self, option.name) != option.default
        )
        return ", ".join(asked) or "what is free"

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, object]) -> LoadOptions:
        """The options with these names. Raises OptionError for a name that is none, with the nearest one."""
        known = [option.name for option in fields(cls)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise OptionError(f"unknown option {name!r}; {hint}")
        return cls(**keywords)  # type: ignore[arg-type]

    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices that may be used, the first one alone if that holds everything.

        Raises OptionError as `torch_device`, and where `vram` names more cards than there are.
        """
        import torch

        from moe_local.offload.gpu.usable import usable_cards

        first = self.torch_device()
        named = len(self.vram) if isinstance(self.vram, tuple) else 0
        if first.type != "cuda" or ":" in self.device:
            if named:
                raise OptionError(f"vram names {named} cards, but the device is {first}; give one size")
            return (first,)
        usable = usable_cards()
        if named > (count := len(usable)):
            raise OptionError(
                f"vram names {named} cards, but there are {count} CUDA devices; give {count} sizes at most"
            )
        cards = [torch.device("cuda", index) for index in usable[: named or count]]
        return tuple(cards if named else sorted(cards, key=lambda card: card != first))

    def card_vram(self, card: int) -> int | None:
        """What `vram` allows on the n-th of `torch_devices`; None: all of it."""
        return self.vram[card] if isinstance(self.vram, tuple) else self.vram

    def torch_device(self) -> torch.device:
        """The device to load on, or the first of them.

        Raises OptionError if it is not there, or torch cannot compute on it, or for `vram` without CUDA. Says
        once through logging where the CPU is taken though there is an NVIDIA GPU.
        """
        import torch  # here, so that the command line can show its help without it

        from moe_local.offload.gpu.usable import REMEDY, tell_unused, unusable, usable_cards

        device = self.device
        if device == "auto":
            device = "cuda" if usable_cards() else "cpu"
            if device == "cpu":
                tell_unused()
        found = torch.device(device)
        if found.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (found.index or 0) >= count:
                raise OptionError(
                    f"device {self.device!r} is not there: {count} CUDA devices found; use device='cpu', or "
                    "ask moe-local doctor"
                )
            if self.activations != "native":
                raise OptionError(
                    f"activations {self.activations!r} is for the CPU kernel only; use native on {found}"
                )
            index = torch.cuda.current_device() if found.index is None else found.index
            if found.index is None and unusable(index) is not None:
                index = next(iter(usable_cards()), index)
            if (reason := unusable(index)) is not None:
                raise OptionError(f"device {self.device!r} cannot be used: {reason}; {REMEDY}, or use 'cpu'")
            return torch.device("cuda", index)
        if self.vram is not None:
            raise OptionError(
                f"vram is given but the device is {found}, which has none; leave it out and set ram"
            )
        return found


def _parse_cards(value: object) -> int | tuple[int, ...]:
    """Bytes, of several cards if several are named: "20GiB", "24GiB,12GiB", "2x24GiB" or a list of sizes."""
    if isinstance(value, int | float):
        return _memory(value, "vram")
    parts = list(value) if isinstance(value, list | tuple) else str(value).split(",")
    sizes: list[int] = []
    for part in parts:
        times = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(.+)", part) if isinstance(part, str) else None
        count = int(times[1]) if times else 1
        if not 1 <= count <= MOST_CARDS:
            raise OptionError(f"vram {value!r} names {count} cards; write for example 2x24GiB")
        sizes += [_memory(times[2] if times else part, "vram")] * count
    if not 1 <= len(sizes) <= MOST_CARDS:
        raise OptionError(f"vram {value!r} names {len(sizes)} cards; name 1 to {MOST_CARDS}")
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _memory(value: str | int | float, what: str) -> int:
    """Bytes; refuses a bare number like 24, which nobody means as bytes."""
    size = parse_bytes(value, what)
    if size < 1 << 16 and re.fullmatch(r"[\d.]+", str(value).strip()):
        raise OptionError(f"{what} {value} would be {value} bytes; write for example {value}GiB")
    return size


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} {value!r} is not a number from 1 up")


def _check_name(option: str, value: object, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if value not in names:
        only = f"{names[0]} is the only one so far" if len(names) == 1 else f"use one of {', '.join(names)}"
        raise OptionError(f"unknown {option} {value!r}; {only}")


def _expert_formats() -> Iterable[str]:
    from moe_local.offload.quantize.codec import expert_formats

    return expert_formats()


def _policies() -> Iterable[str]:
    from moe_local.cache.policies import POLICIES

    return POLICIES
