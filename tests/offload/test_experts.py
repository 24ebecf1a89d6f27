"""The experts that stand in for transformers' own: equal outputs, whatever is where and comes when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.spec import experts_modules
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.experts import ExpertRunner, OffloadedExperts, to_host
from moe_local.offload.kernels.shared import Staging, pack, unpack
from moe_local.offload.plan.plan import Request
from moe_local.offload.prefetch.prefetch import Guess, NoPrefetch
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.store.build import build_store
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.tiers.device_arena import DeviceArena
from support import tiny_models

TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "qwen2_moe", "deepseek_v3")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}


class Converted:
    """One tiny model, and its experts in one format."""

    def __init__(self, model: Any, checkpoint: Checkpoint, file: ExpertFile) -> None:
        self.model, self.checkpoint, self.file = model, checkpoint, file
        self.modules = [module for _, module in experts_modules(model)]

    def inputs(self, tokens: int, dtype: torch.dtype, layer: int = 0) -> tuple[torch.Tensor, ...]:
        """hidden [T, D], index [T, 2] and weights [T, 2] of a random routing."""
        generator = torch.Generator().manual_seed(100 * layer + tokens)
        hidden = torch.randn(tokens, self.checkpoint.spec.hidden_size, generator=generator)
        weights, index = torch.rand(tokens, 8, generator=generator).topk(2)
        return hidden.to(dtype), index, weights.to(dtype)

    def stored(self, layer: int, expert: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights in the expert file."""
        buffer = torch.frombuffer(self.file.read(layer, expert), dtype=torch.uint8)
        layout = self.file.layout(layer, expert)
        return codec_for(layout.format).decode(buffer, layout, dtype)

    def rounded(self, layer: int, expert: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The checkpoint's weights as bitsandbytes alone rounds them to NF4 and back."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weights = self.checkpoint.read_expert(self.checkpoint.spec.layers[layer], expert)
        for name, weight in weights.items():
            if weight.dim() == 2:
                # One block a row: 0.50's CPU code reads rows of other than whole blocks wrongly.
                blocks = weight.float().reshape(-1, 64)
                packed, state = quantize_4bit(blocks, compress_statistics=True, quant_type="nf4")
                weights[name] = dequantize_4bit(packed, state).reshape(weight.shape)
        return {name: weight.to(dtype) for name, weight in weights.items()}

    def expected(
        self, layer: int, inputs: tuple[torch.Tensor, ...], *, bitsandbytes: bool = False
    ) -> torch.Tensor:
        """What transformers' own module, run plainly, makes of it with the weights in the expert file."""
        hidden = inputs[0]
        module = self.modules[layer]
        stored = self.checkpoint.spec.layers[layer]
        original = {name: p.data for name, p in module.named_parameters(recurse=False)}
        self.model.config._experts_implementation = "eager"
        try:
            for parameter in module.parameters(recurse=False):
                parameter.data = torch.empty_like(parameter.data, dtype=hidden.dtype)
            for expert in range(stored.num_experts):
                weights = (self.rounded if bitsandbytes else self.stored)(layer, expert, hidden.dtype)
                for name, weight in weights.items():
                    turned = weight.T if stored.transposed and weight.dim() == 2 else weight
                    module.get_parameter(name).data[expert] = turned
            with torch.no_grad():
                return module(*inputs)  # type: ignore[no-any-return]
        finally:
            for name, data in original.items():
                module.get_parameter(name).data = data


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def converted(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Converted]:
    """converted("mixtral", "fp32"), made once."""
    made: dict[tuple[str, str], Converted] = {}

    def make(model_type: str, format: str) -> Converted:
        if (model_type, format) not in made:
            checkpoint = Checkpoint.open(make_checkpoint(model_type))
            file = convert_experts(
                checkpoint, codec_for(format), tmp_path_factory.mktemp("converted") / format
            )
            made[model_type, format] = Converted(tiny_models.tiny_model(model_type), checkpoint, file)
        return made[model_type, format]

    return make


@pytest.fixture
def make_store() -> Iterator[Callable[..., ExpertStore]]:
    stores: list[ExpertStore] = []

    def make(
        made: Converted, slots: int, device: Any = None, ram_slots: int = 3, scheduler: Any = None
    ) -> ExpertStore:
        spec = made.checkpoint.spec
        layers, arena = len(spec.layers), None
        ladders = Request(model="tiny", spec=spec, ram=0, experts=made.file.format, context=64).ladders
        if device is not None:
            arena = DeviceArena([slots] * layers, ladders, device)
        store = build_store(
            made.file,
            spec,
            ladders=ladders,
            ram_slots=[slots if arena is None else ram_slots] * layers,
            arena=arena,
            scheduler=scheduler,
        )
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.check_integrity()
        store.close()


class WrongGuesses:
    """A prefetcher that asks for everything of the next layer, worst first, on every occasion."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.asked = 0

    def predict(self, layer: int, tokens: int) -> list[Guess]:
        ranked = torch.arange(self.store.num_experts(layer)).flip(0)
        return [Guess((layer + 1) % len(self.store.layouts), 1, ranked)]

    def request(self, layer: int, needed: Any, guesses: Any, experts: Any) -> None:
        (guess,), (ranked,) = guesses, experts
        assert ranked == list(range(8))[::-1]
        self.asked += 1
        self.store.prefetch(guess.layer, ranked, distance=guess.distance, budget_bytes=1 << 20)

    def close(self) -> None:
        pass


def attached(made: Converted, store: ExpertStore, prefetcher: Any = None) -> list[OffloadedExperts]:
    runner = ExpertRunner(store, prefetcher or NoPrefetch())
    modules = [OffloadedExperts(module, index) for index, module in enumerate(made.modules)]
    for module in modules:
        module.attach(runner)
    return modules


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_transformers_own_experts(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore], model_type: str, format: str
) -> None:
    made = converted(model_type, format)
    experts = attached(made, make_store(made, slots=8))
    dtype = FORMATS[format]
    for layer in range(len(experts)):
        for tokens in (1, 300 if layer == 1 else 7):
            inputs = made.inputs(tokens, dtype, layer)
            want = made.expected(layer, inputs)
            got = experts[layer](*inputs)
            assert got.dtype == want.dtype == dtype
            assert float(want.abs().max()) > 0.05
            error = (got - want).abs().max() / want.abs().max()
            assert float(error) < TOLERANCE[dtype], (layer, tokens)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_nf4_equals_the_module_with_the_weights_that_bitsandbytes_rounds(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore], model_type: str
) -> None:
    made = converted(model_type, "nf4")
    experts = attached(made, make_store(made, slots=3))
    for tokens in (1, 20):
        inputs = made.inputs(tokens, torch.float32)
        want = made.expected(0, inputs, bitsandbytes=True)
        assert float((experts[0](*inputs) - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", FORMATS)
def test_is_bit_equal_whatever_is_resident_and_whenever_experts_arrive(
    converted: Callable[..., Converted],
    make_store: Callable[..., ExpertStore],
    make_device: Callable[..., Any],
    model_type: str,
    format: str,
) -> None:
    made = converted(model_type, format)
    layers = len(made.modules)
    everything = [
        made.inputs(tokens, FORMATS[format], layer) for tokens in (1, 40) for layer in range(layers)
    ]
    plain = attached(made, make_store(made, slots=8))
    want = [plain[i % layers](*inputs) for i, inputs in enumerate(everything)]
    for slots, device in (
        (2, None),
        (3, None),
        (2, make_device(1)),
        (1, make_device(2)),
        (5, make_device(3)),
    ):
        for guessing in (False, True):
            store = make_store(made, slots, device)
            prefetcher = WrongGuesses(store) if guessing else NoPrefetch()
            experts = attached(made, store, prefetcher)
            for _ in range(2):
                for i, inputs in enumerate(everything):
                    assert torch.equal(experts[i % layers](*inputs), want[i]), (slots, device, guessing, i)
                    store.check_integrity()
            counts = store.snapshot()
            assert counts.misses > 0
            assert not guessing or (prefetcher.asked > 0 and counts.prefetch.issued > 0)
            assert device is None or device.faults == []


@pytest.mark.parametrize("mode", ["auto", "cpu"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", FORMATS)
def test_is_bit_equal_whatever_the_host_computes(
    converted: Callable[..., Converted],
    make_store: Callable[..., ExpertStore],
    make_device: Callable[..., Any],
    any_scheduler: Callable[..., Any],
    model_type: str,
    format: str,
    mode: str,
) -> None:
    """On the fake device both sides run the CPU's kernels, so their parts add up to the same bits."""
    made = converted(model_type, format)
    layers = len(made.modules)
    everything = [
        made.inputs(tokens, FORMATS[format], layer) for tokens in (1, 3, 40) for layer in range(layers)
    ]
    plain = attached(made, make_store(made, slots=8))
    want = [plain[i % layers](*inputs) for i, inputs in enumerate(everything)]
    for slots, ram_slots, seed in ((2, 8, 1), (1, 3, 2), (5, 6, 3)):
        device = make_device(seed)
        store = make_store(made, slots, device, ram_slots, any_scheduler(seed, mode))
        prefetcher = WrongGuesses(store) if seed == 2 else NoPrefetch()
        experts = attached(made, store, prefetcher)
        shares = count_shares(store)
        for _ in range(3):
            for i, inputs in enumerate(everything):
                assert torch.equal(experts[i % layers](*inputs), want[i]), (slots, ram_slots, i)
                store.check_integrity()
        assert shares["host"] > 0
        assert mode == "cpu" or shares["device"] > 0
        assert device.faults == []
        assert store.snapshot().stall.cpu >= 0


def count_shares(store: ExpertStore) -> Counter[str]:
    """Experts that the host and the device will have computed."""
    counts: Counter[str] = Counter()
    assert store.host is not None
    divide = store.host.divide

    def counting(*args: Any) -> Any:
        share = divide(*args)
        counts.update(host=len(share.host), device=len(share.device))
        return share

    store.host.divide = counting  # type: ignore[method-assign]
    return counts


def test_the_device_waiting_for_the_cpu_is_a_stall(
    converted: Callable[..., Converted],
    make_store: Callable[..., ExpertStore],
    make_device: Callable[..., Any],
    any_scheduler: Callable[..., Any],
) -> None:
    """The fake device takes a millisecond for every time it runs out of work while the host computes."""
    made = converted("mixtral", "nf4")
    store = make_store(made, 2, make_device(luck=0.95), 8, any_scheduler(mode="cpu"))
    assert store.below is not None
    store.below.preload()
    attached(made, store)[0](*made.inputs(1, torch.float32))
    stats = store.snapshot()
    assert stats.misses == 2
    assert stats.stall.total == stats.stall.cpu == pytest.approx(0.001)


def test_staging_keeps_what_it_is_told_to_and_serves_in_and_out_of_inference_mode() -> None:
    staging = Staging(torch.device("cpu"))
    with torch.inference_mode():
        staging.reserve(8).copy_(torch.arange(8, dtype=torch.uint8))
    grown = staging.reserve(1000, keep=8)
    assert grown[:8].tolist() == list(range(8))
    grown[8:] = 1
    assert staging.reserve(16)[:8].tolist() == list(range(8))


def test_ids_guesses_and_hidden_reach_the_host_in_one_transfer() -> None:
    """From a device all three are packed into one tensor of bytes."""
    index = torch.tensor([[3, 1], [2, 7]])
    guesses = [torch.tensor([5, 6, 0])]
    hidden = torch.randn(2, 6).bfloat16()
    staging = Staging(torch.device("cpu"))
    plain = to_host(index, guesses, hidden, staging)
    assert plain.ids == [3, 1, 2, 7]
    assert plain.guesses == [[5, 6, 0]]
    assert plain.hidden is hidden
    packed = unpack(staging.bring(pack(torch.tensor([3, 1, 2, 7, 5, 6, 0]), hidden)), 7, hidden)
    assert packed.numbers == [3, 1, 2, 7, 5, 6, 0]
    assert packed.hidden.dtype == torch.bfloat16
    assert torch.equal(packed.hidden, hidden)
    assert packed.hidden.data_ptr() != hidden.data_ptr()


def test_counts_what_the_router_chose(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore]
) -> None:
    made = converted("mixtral", "fp32")
    store = make_store(made, slots=2)
    experts = attached(made, store)
    want = torch.zeros(3, 8, dtype=torch.int64)
    for tokens in (1, 5, 1, 30):
        for layer in range(3):
            inputs = made.inputs(tokens, torch.float32, layer)
            experts[layer](*inputs)
            want[layer] += torch.bincount(inputs[1].flatten(), minlength=8)
    routed = store.snapshot().routed
    assert [list(counts) for counts in routed.counts] == want.tolist()
    assert routed.tokens == (37, 37, 37)


def test_weights_in_another_dtype_than_the_hidden_state(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore]
) -> None:
    made = converted("mixtral", "bf16")
    experts = attached(made, make_store(made, slots=2))
    hidden, index, weights = made.inputs(9, torch.bfloat16)
    want = made.expected(0, (hidden, index, weights))
    got = experts[0](hidden, index, weights.float())
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got, want, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("tokens", [1, 9])
def test_under_autocast_it_computes_as_transformers_does(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore], tokens: int
) -> None:
    made = converted("qwen3_moe", "fp32")
    experts = attached(made, make_store(made, slots=2))
    inputs = made.inputs(tokens, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = made.expected(0, inputs), experts[0](*inputs)
    exact = made.expected(0, inputs)
    assert got.dtype == want.dtype
    assert not torch.equal(got, exact)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-2


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradients_are_refused_where_they_are_asked_for(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore], tokens: int
) -> None:
    made = converted("mixtral", "fp32")
    experts = attached(made, make_store(made, slots=2))
    hidden, index, weights = made.inputs(tokens, torch.float32)
    want = experts[0](hidden, index, weights)
    assert not want.requires_grad
    got = experts[0](hidden.requires_grad_(), index, weights)
    assert torch.equal(got, want)
    with pytest.raises(MoeLocalError, match="no backward pass"):
        got.sum().backward()
    with torch.inference_mode():
        assert torch.equal(experts[0](hidden, index, weights), want)


def test_before_it_is_attached_it_answers_zeros_and_retired_it_refuses(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore]
) -> None:
    made = converted("mixtral", "fp32")
    inputs = made.inputs(3, torch.float32)
    experts = OffloadedExperts(made.modules[0], 0)
    assert torch.equal(experts(*inputs), torch.zeros(3, 64))
    assert list(experts.parameters()) == []
    experts.attach(ExpertRunner(make_store(made, slots=8), NoPrefetch()))
    assert bool(experts(*inputs).any())
    assert experts(*made.inputs(0, torch.float32)).shape == (0, 64)
    experts.retire("the model is closed")
    with pytest.raises(MoeLocalError, match="the model is closed"):
        experts(*inputs)


def test_an_error_while_computing_leaves_no_lease(
    converted: Callable[..., Converted], make_store: Callable[..., ExpertStore]
) -> None:
    made = converted("mixtral", "fp32")
    store = make_store(made, slots=2)
    experts = attached(made, store)
    hidden, index, weights = made.inputs(1, torch.float32)
    for tokens in (1, 6):
        with pytest.raises(RuntimeError):
            experts[0](
                hidden[:, :10].expand(tokens, -1), index.expand(tokens, -1), weights.expand(tokens, -1)
            )
        store.check_integrity()
        assert not any(store.tier.cache.pins(0, expert) for expert in range(8))
    assert torch.allclose(
        experts[0](hidden, index, weights), made.expected(0, (hidden, index, weights)), atol=1e-5
    )
