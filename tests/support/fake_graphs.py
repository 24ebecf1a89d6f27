"""Fake CUDA graphs: a capture records torch's operations, which have no effect before a replay.

They are as strict as CUDA, as far as a CPU can show it. During a capture every result is garbage: the
previous contents of its memory. An operation by which the host would wait for a number raises. A replay does
the same operations on the same memory, whatever it then holds; Python's numbers and shapes are those of the
capture. Results are in a pool, whose memory is reused as soon as nothing refers to it. Graphs keep no tensors
alive: those from before a capture that it reads or writes have to exist in every replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WAITS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "equal",
}
"""Functions of torch that copy numbers from a device to the host."""

WAITING_OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",
}
"""The operations that do so, and the one that copies to a device from pageable memory (`torch.tensor`)."""


class _Block:
    """A block of the pool's memory, and the storage that uses it."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN if read as floats
        self.user: StorageWeakRef | None = None

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the same type, sizes and strides, in this memory."""
        size = like.element_size()
        flat = torch.frombuffer(self.memory.numpy(), dtype=like.dtype, count=self.memory.numel() // size)
        return flat.as_strided(like.size(), like.stride(), like.storage_offset())


class _Outside(NamedTuple):
    """A tensor that is not in the pool, and may be gone by the time of a replay."""

    storage: StorageWeakRef
    dtype: torch.dtype
    place: tuple[int, torch.Size, tuple[int, ...]]
    """Offset, sizes and strides."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Outside:
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, place)

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"a graph uses memory that was freed: {self.dtype} {[*self.place[1]]}"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Pool:
    """Memory for results of captured operations. A block is free once no Python tensor refers to it."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        """Blocks by address."""

    def place(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of garbage like `like` for Python code, and a second tensor on the same memory, which does
        not keep the block from being reused."""
        like = like if like.storage_offset() == 0 else like.clone()
        nbytes = max(64, like.untyped_storage().nbytes())
        fitting = [
            block
            for block in self._blocks.values()
            if block.memory.numel() >= nbytes and (block.user is None or block.user.expired())
        ]
        block = min(fitting, key=lambda block: block.memory.numel(), default=None)
        if block is None:
            block = _Block(-(-nbytes // 64) * 64)
            self._blocks[block.memory.data_ptr()] = block
        given, kept = block.tensor(like), block.tensor(like)
        block.user = StorageWeakRef(given.untyped_storage())
        return given, kept

    def kept(self, tensor: torch.Tensor) -> torch.Tensor | _Outside:
        """For a tensor in the pool, another on the same memory, which does not keep the block from being
        reused. Of any other tensor, where it is: its memory may be freed, too. But single numbers, which are
        given to kernels by value, are kept."""
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            return block.tensor(tensor)
        single = tensor.dim() == 0 and tensor.untyped_storage().nbytes() == tensor.element_size()
        return tensor if single else _Outside.of(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is in the pool."""
        return tensor.untyped_storage().data_ptr() in self._blocks

    @property
    def nbytes(self) -> int:
        return sum(block.memory.numel() for block in self._blocks.values())


class _Operation(NamedTuple):
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[torch.Tensor | None]
    """Where each result is written; None for a view. Empty for an operation in place."""


def _is_outside(x: Any) -> bool:
    return isinstance(x, _Outside)


def _present(x: Any) -> Any:
    return x.tensor() if isinstance(x, _Outside) else x


def _harmless(x: Any) -> Any:
    return x if not torch.is_tensor(x) or x.is_floating_point() else torch.zeros_like(x)


class FakeGraph:
    def __init__(self, operations: list[_Operation], owner: FakeGraphs) -> None:
        self.operations = operations
        self._owner = owner
        self._was_replayed = False

    @torch.inference_mode()
    def replay(self) -> None:
        assert self._owner.recorder is None, "CUDA replays no graph while it captures one"
        if not self._was_replayed:
            self._owner.refuse("replay")
        self._was_replayed = True
        self._owner.replays += 1
        for function, args, kwargs, outputs in self.operations:
            given, named = (tree_map(_present, part, is_leaf=_is_outside) for part in (args, kwargs))
            results = tree_flatten(function(*given, **named))[0]
            for output, result in zip(outputs, results, strict=False):
                if output is not None:
                    output.copy_(result)


class _NoWaits(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function.__name__}")
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, pool: Pool, allocating: Callable[[], None]) -> None:
        """`allocating` is called before a result is placed in the pool."""
        super().__init__()
        self.operations: list[_Operation] = []
        self._pool = pool
        self._allocating = allocating

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = function._schema
        if schema.name in WAITING_OPERATIONS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {schema.name}")
        given = [*args, *(kwargs.get(argument.name) for argument in schema.arguments[len(args) :])]
        written = [
            value
            for argument, value in zip(schema.arguments, given, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        kept = [
            tree_map(lambda x: self._pool.kept(x) if torch.is_tensor(x) else x, part)
            for part in (args, kwargs)
        ]
        if written:
            self.operations.append(_Operation(function, *kept, []))
            return written[0] if len(schema.returns) == 1 else tuple(written)
        if any(returned.alias_info is not None for returned in schema.returns):
            result = function(*args, **kwargs)
        else:  # zeros instead of garbage integers, which may be indices
            result = function(*tree_map(_harmless, args), **tree_map(_harmless, kwargs))
        inputs = {
            x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)
        }
        outputs: list[torch.Tensor | None] = []

        def place(x: Any) -> Any:
            if not torch.is_tensor(x) or (x.numel() and x.untyped_storage().data_ptr() in inputs):
                outputs.append(None)
                return x
            self._allocating()
            garbage, memory = self._pool.place(x)
            outputs.append(memory)
            return garbage

        placed = tree_map(place, result)
        if any(output is not None for output in outputs):
            self.operations.append(_Operation(function, *kept, outputs))
        return placed


class FakeGraphs:
    """The Graphs protocol on the CPU. `fail_at`: after this many captures, the next one fails with `error`.

    `room`: how many captures have enough memory; None: all. The next one runs out of memory where `lacks`
    says: in "begin", for a "result", in "end", at the first "replay" of its graph, or in the "experts" after
    that, which have to call `refuse`.
    """

    def __init__(
        self,
        fail_at: int | None = None,
        error: str = "CUDA error: operation failed due to a previous error during capture",
        room: int | None = None,
        lacks: str = "end",
    ) -> None:
        self.pool = Pool()
        self.recorder: _Recorder | None = None
        self.captures = self.replays = 0
        self.fail_at, self.error = fail_at, error
        self.room, self.lacks = room, lacks
        self.refusals = 0
        self._no_waits = _NoWaits()
        self._in_session = False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        assert not self._in_session
        self._in_session = True
        try:
            yield
        finally:
            self._in_session = False
            assert self.recorder is None, "a capture outlived its session"

    def begin(self, device: torch.device | None = None) -> None:
        assert self._in_session, "the default stream cannot be captured"
        assert self.recorder is None, "a capture had begun"
        if self.captures == self.fail_at:
            raise RuntimeError(self.error)
        self.refuse("begin")
        self.recorder = _Recorder(self.pool, lambda: self.refuse("result"))
        self._no_waits.__enter__()
        self.recorder.__enter__()

    def end(self) -> FakeGraph:
        assert self.recorder is not None, "no capture has begun"
        recorder = self._stop()
        self.refuse("end")
        self.captures += 1
        return FakeGraph(recorder.operations, self)

    def abort(self) -> None:
        if self.recorder is not None:
            self._stop()

    def make_room(self) -> None:
        assert self.recorder is None, "nothing is given back during a capture"

    def refuse(self, place: str) -> None:
        """Raise CUDA's out-of-memory error if memory is to run out at this place now."""
        begun = self.captures - (place in ("replay", "experts"))  # which come after the capture was counted
        if begun == self.room and self.lacks == place:
            self.refusals += 1
            raise torch.OutOfMemoryError("CUDA error: out of memory")

    def _stop(self) -> _Recorder:
        recorder, self.recorder = self.recorder, None
        assert recorder is not None
        recorder.__exit__(None, None, None)
        self._no_waits.__exit__(None, None, None)
        return recorder
