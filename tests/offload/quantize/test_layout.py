"""The flat buffer: aligned, without overlap, the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.quantize.codec import codecs
from moe_local.offload.quantize.layout import ALIGNMENT, DTYPE_BYTES, PAGE, TensorSpec, make_layout
from moe_local.offload.quantize.views import TORCH_DTYPES, segment_view, zero_padding

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)
experts = st.lists(shapes, min_size=1, max_size=4).map(
    lambda found: [TensorSpec(f"t{index}", shape) for index, shape in enumerate(found)]
)


@given(experts, st.sampled_from(sorted(codecs())))
@settings(max_examples=80, deadline=None)
def test_segments_are_aligned_in_order_and_inside(tensors, name):
    layout = codecs()[name].layout(tensors)
    end = 0
    for segment in layout.segments:
        assert segment.offset % ALIGNMENT == 0
        assert end <= segment.offset < end + ALIGNMENT
        end = segment.offset + segment.nbytes
    assert layout.nbytes % PAGE == 0
    assert end <= layout.nbytes < end + ALIGNMENT + PAGE
    assert layout.tensors == tuple(tensors)
    assert {segment.name for segment in layout.segments} == {tensor.name for tensor in tensors}
    assert layout == codecs()[name].layout(list(tensors))


def test_an_expert_fills_whole_pages():
    sizes = {
        numel: make_layout("bf16", [], [("w", "values", "bfloat16", (numel,))]).nbytes
        for numel in (0, 1, 2048, 2049)
    }
    assert sizes == {0: 4096, 1: 4096, 2048: 4096, 2049: 8192}


def test_parts_of_one_tensor():
    layout = codecs()["nf4"].layout([TensorSpec("a", (4, 64)), TensorSpec("b", (4,))])
    assert [segment.part for segment in layout.parts("a")] == ["q", "absmax", "absmax_scale", "offset"]
    assert [segment.part for segment in layout.parts("b")] == ["values"]
    assert list(layout.parts("c")) == []


def test_views_cover_their_bytes_only():
    layout = make_layout(
        "x", [], [("a", "p", "int8", (3, 5)), ("b", "p", "float32", ()), ("c", "p", "float16", (2,))]
    )
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for segment in layout.segments:
        view = segment_view(buffer, segment)
        assert view.shape == segment.shape
        assert view.dtype == TORCH_DTYPES[segment.dtype]
        view.view(-1).view(torch.uint8).fill_(1) if segment.shape else view.fill_(1.0)
    assert [segment.offset for segment in layout.segments] == [0, 256, 512]
    assert buffer.nonzero().view(-1).tolist() == [*range(15), 258, 259, *range(512, 516)]


def test_zero_padding_clears_what_no_segment_owns():
    layout = make_layout("x", [], [("a", "p", "uint8", (300,)), ("b", "p", "float32", (2,))])
    buffer = torch.ones(layout.nbytes + 10, dtype=torch.uint8)
    zero_padding(buffer, layout)
    ones = buffer.nonzero().view(-1).tolist()
    assert ones == [*range(300), *range(512, 520), *range(layout.nbytes, layout.nbytes + 10)]


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_sizes_of_dtypes(dtype):
    assert TORCH_DTYPES[dtype].itemsize == DTYPE_BYTES[dtype]
