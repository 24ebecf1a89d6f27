"""Peers: the pipe between the benchmark and a process that answers, and llama.cpp where it is installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import contenders
import pytest
from peers import client, install, serve

from moe_local.offload.checkpoint.spec import model_spec
from support.tiny_models import tiny_model

WIDER = {"qwen3_5_moe": {"head_dim": 64}, "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8}}
"""What llama.cpp needs of a tiny model, or what makes it more like the published one."""
LLAMA_CPP = install.interpreter(install.default_folder())
"""The Python of llama.cpp's environment below the user's MOE_LOCAL_HOME, which tests have another of; None if
it is not installed."""
WEIGHTS = {"expert_bytes": 90, "expert_numel": 160, "dense_bytes": 30, "dense_numel": 40}
COUNTING = f"""
import sys
sys.path.insert(0, sys.argv[1])
from serve import Pipe
pipe = Pipe()
print("a library's own words")
about = {{"name": "counting", "version": "1", "detail": "", "threads": 1, "weights": {WEIGHTS}}}
review = lambda prompt, ids: {{"sum": sum(prompt) + sum(ids)}}
pipe.serve(about, sum, lambda token: print("more words") or token + 1, review=review)
"""


@pytest.fixture
def counting(repository: Path) -> list[str]:
    """A peer that continues a prompt with its sum and what follows it, and talks to itself."""
    return [sys.executable, "-c", COUNTING, str(repository / "benchmarks" / "peers")]


def test_answers_are_kept_and_words_are_not_mistaken_for_them(counting: Any) -> None:
    with client.Peer(counting) as peer:
        peer.answer([1, 2, 3], 4, keep=False)
        peer.answer([5], 3, keep=True)
    (answer,) = peer.answers
    assert answer.ids == (5, 6, 7)
    assert answer.prompt_tokens == 1
    assert answer.ms_per_token == pytest.approx(1000 * answer.decode_s / 2)


def test_times_are_from_the_prompt_to_the_first_id_and_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a prompt takes 10 s, and each id after it one."""
    now = 0.0
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=lambda: now))

    def first(prompt: list[int]) -> int:
        nonlocal now
        now += 10
        return sum(prompt)

    def following(token: int) -> int:
        nonlocal now
        now += 1
        return token + 1

    found = serve.measure([2, 3], 4, first, following, lambda: {"read_bytes": 7 * now})
    assert found == {
        "prefill_s": 10.0,
        "decode_s": 3.0,
        "ids": [5, 6, 7, 8],
        "figures": {"read_bytes": 21.0},
    }


def test_answers_are_reviewed_when_that_is_asked_for(counting: Any) -> None:
    with client.Peer(counting) as peer:
        assert "review" not in peer.ask([1, 2], 2)
        assert peer.ask([1, 2], 2, review=True)["review"] == {"sum": 1 + 2 + 3 + 4}


def test_summary(counting: Any) -> None:
    from moe_local.offload.plan.bandwidth import Bandwidths

    with client.Peer(counting) as peer:
        peer.answers = [contenders.Answer(10, s, s, tuple(range(6))) for s in (0.1, 0.4, 0.2)]
        summary = peer.summary(Bandwidths(ram=12_000.0))
    assert summary["bits_per_weight"] == {"all": 4.8, "experts": 4.5, "dense": 6.0}
    assert summary["read_bytes_per_token"] == 120
    assert summary["ms_per_token"] == pytest.approx({"median": 40, "min": 20, "max": 80})
    assert summary["prefill_tokens_per_s"] == pytest.approx({"median": 50, "min": 25, "max": 100})
    assert summary["floor_ms_per_token"] == pytest.approx(10)
    assert summary["share_of_floor"] == pytest.approx(0.25)
    assert (summary["version"], summary["threads"]) == ("1", 1)


def test_a_peer_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with 1.*no such model"):
        client.Peer([sys.executable, "-c", "raise SystemExit('no such model')"])


def test_a_peer_that_dies_half_way_says_why(counting: Any) -> None:
    with client.Peer(counting) as peer, pytest.raises(SystemExit, match=r"(?s)ended with 1.*TypeError"):
        peer.answer(["not an id"], 2, keep=True)  # type: ignore[list-item]
    assert peer.answers == []


def test_an_interrupted_installation_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    assert install.interpreter(tmp_path) is None
    (tmp_path / install.COMPLETE).write_text('{"requirements": ["llama-cpp-python==0.1"]')
    assert install.interpreter(tmp_path) is None
    (tmp_path / install.COMPLETE).write_text('{"requirements": ["llama-cpp-python==0.1"]}')
    assert install.interpreter(tmp_path) is None


def test_an_environment_for_another_processor_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    folders = {isa: install.default_folder(isa) for isa in install.PROCESSORS}
    assert len(set(folders.values())) == len(folders)
    assert "-DGGML_NATIVE=ON" in install.cmake_args("native")
    plain = install.cmake_args("avx2").split()
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON"} <= set(plain)
    assert not any("AVX512" in argument for argument in plain)
    (tmp_path / install.COMPLETE).write_text(json.dumps(install._contents("avx2")))
    assert install.interpreter(tmp_path, "avx2") is not None
    assert install.interpreter(tmp_path) is None


def test_an_installation_for_another_processor_that_fails_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one may be gone by then."""
    (tmp_path / install.COMPLETE).write_text(json.dumps(install._contents("native")))
    monkeypatch.setattr(install, "_pip", lambda folder: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(SystemExit, match="pip could not install"):
        install.install(tmp_path, "avx2")
    assert install.interpreter(tmp_path) is None


@pytest.mark.parametrize(
    "kind",
    [
        *("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe_lite", "gpt_oss", "qwen3_5_moe", "qwen3_next"),
        "nemotron_h",
    ],
)
def test_llama_cpp_computes_what_transformers_computes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """The same greedy ids from float32 weights, so that what is timed is the model it should be."""
    import torch
    from transformers import AutoModelForCausalLM

    if LLAMA_CPP is None:
        pytest.skip("llama.cpp is not installed: python benchmarks/peers/install.py")
    file, checkpoint = tmp_path / "m.gguf", make_checkpoint(kind, **WIDER.get(kind, {}))
    writer = [str(LLAMA_CPP), str(client.HERE / "gguf_file.py"), str(checkpoint), str(file)]
    subprocess.run([*writer, "--type", "F32"], check=True, capture_output=True)
    prompts = [[3 + 7 * i % 251 for i in range(40)], [100, 4, 5]]
    with client.Peer([str(LLAMA_CPP), str(client.HERE / "llama_cpp_peer.py"), str(file)]) as peer:
        for prompt in prompts:
            peer.answer(prompt, 8, keep=True)
    assert peer.hello["name"] == "llama.cpp"
    assert peer.weights.bits()["experts"] == 32
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(prompts, peer.answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert list(answer.ids) == ids[0, len(prompt) :].tolist()


def test_llama_cpp_continues_sequences_together_as_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Prompts of different lengths, from float32 weights; and how many experts their steps used."""
    if LLAMA_CPP is None:
        pytest.skip("llama.cpp is not installed: python benchmarks/peers/install.py")
    file = tmp_path / "m.gguf"
    writer = [str(LLAMA_CPP), str(client.HERE / "gguf_file.py"), str(tiny_checkpoint), str(file)]
    subprocess.run([*writer, "--type", "F32"], check=True, capture_output=True)
    prompts = [[3 + 7 * i % 251 for i in range(40)], [100, 4, 5], [9, 300]]
    command = [str(LLAMA_CPP), str(client.HERE / "llama_cpp_peer.py"), str(file)]
    with client.Peer(command) as peer:
        alone = [peer.ask(prompt, 6)["ids"] for prompt in prompts]
    with client.Peer([*command, "--parallel", "4"]) as peer:
        record = peer.ask(prompts, 6, review=True)
        again = peer.ask(prompts[1:], 6)
    assert [list(ids) for ids in zip(*record["ids"], strict=True)] == alone
    assert [list(ids) for ids in zip(*again["ids"], strict=True)] == alone[1:]
    assert 3 * 2 <= record["review"]["experts_per_step"] <= 3 * 2 * len(prompts)  # three layers, two a token
    assert "review" not in again


@pytest.fixture
def module(repository: Path) -> ModuleType:
    """transformers_peer, which runs in a process of its own and finds its modules beside it."""
    sys.path.insert(0, str(repository / "benchmarks" / "peers"))
    try:
        return importlib.import_module("transformers_peer")
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize(
    "model_type",
    ["mixtral", "qwen3_moe", "qwen3_5_moe", "gpt_oss", "deepseek_v3", "gemma4"],
)
def test_the_weights_of_a_token_are_counted_whatever_the_config_calls_them(
    module: ModuleType, model_type: str
) -> None:
    model = tiny_model(model_type)
    spec = model_spec(model.config)
    chosen = sum(layer.top_k * layer.expert_numel for layer in spec.layers)
    assert module.weights(model)["expert_numel"] == chosen


def test_weights_made_for_a_peer_keep_its_numbers_in_bounds(
    module: ModuleType, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """In the shapes of the checkpoint, though there is none: only its config.json is read."""
    import torch
    from transformers.utils import logging

    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    peer = module.Transformers(str(tmp_path), random=True)
    logging.enable_progress_bar()  # which a process of its own does without
    read = module.weights(peer.model)
    assert read["expert_numel"] == 3 * 2 * 3 * 64 * 128
    assert all(parameter.device.type == "cpu" for parameter in peer.model.parameters())
    with torch.inference_mode():
        logits = peer.model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    ids = [peer.first([1, 2, 3]), *(peer.following(token) for token in (5, 6))]
    assert all(0 <= token < 512 for token in ids)
