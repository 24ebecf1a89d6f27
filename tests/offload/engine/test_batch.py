"""generate_ids against transformers' generate: same arguments, same tensor."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.offload.engine.batch import generate_ids
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.engine.sampling import make_settings, needs_hf_generate
from support import tiny_models

torch.set_num_threads(1)
PAD = 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tiny_tokenizer()


def engine_for(model: Any, rows: int = 2) -> Engine:
    return Engine(model, make_kv(model, rows, 600), chunk=16)


def random_prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, max(lengths)] and their mask."""
    width = max(lengths)
    ids = random_prompt(width, rows=len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return ids, mask


def hf_generate(model: Any, ids: torch.Tensor, seed: int | None = None, **options: Any) -> torch.Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        out: torch.Tensor = model.generate(ids, **options)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20, "eos_token_id": None},
        {"max_new_tokens": 20, "repetition_penalty": 1.8},
        {"max_new_tokens": 30, "no_repeat_ngram_size": 2, "eos_token_id": None},
        {"max_new_tokens": 60, "eos_token_id": list(range(100, 130))},
        {"max_new_tokens": 60, "min_new_tokens": 40, "eos_token_id": list(range(3, 320, 3))},
        {"max_length": 40, "min_length": 35, "eos_token_id": list(range(3, 320, 3))},
        {"max_new_tokens": 12, "suppress_tokens": list(range(3, 300)), "eos_token_id": None},
        {"max_new_tokens": 12, "bad_words_ids": [[7], [8, 9]], "forced_eos_token_id": 2},
        {"max_new_tokens": 12, "encoder_repetition_penalty": 1.5, "eos_token_id": None},
    ],
)
def test_greedy_options(mixtral: Any, options: dict[str, Any]) -> None:
    ids = random_prompt(23)
    mask = torch.ones_like(ids)
    out = generate_ids(engine_for(mixtral), ids, mask, do_sample=False, **options)
    assert out.tolist() == hf_generate(mixtral, ids, do_sample=False, **options).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.3, "top_p": 0.9},
        {"top_k": 5, "repetition_penalty": 1.3},
        {"min_p": 0.05, "top_k": 40, "temperature": 2},
        {"typical_p": 0.6, "min_new_tokens": 10, "eos_token_id": list(range(2, 320, 2))},
    ],
)
def test_seeded_sampling(mixtral: Any, options: dict[str, Any]) -> None:
    ids = random_prompt(11)
    options = {"do_sample": True, "max_new_tokens": 25, **options}
    out = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), seed=17, **options)
    if "temperature" in options:
        options["temperature"] = float(options["temperature"])
    assert out.tolist() == hf_generate(mixtral, ids, seed=17, **options).tolist()


def test_without_a_seed_the_global_generator_is_used(mixtral: Any) -> None:
    ids = random_prompt(11)
    options = {"do_sample": True, "max_new_tokens": 25, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        out = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), **options)
    assert out.tolist() == hf_generate(mixtral, ids, seed=5, **options).tolist()


def test_a_seeded_call_leaves_the_global_generator_alone(mixtral: Any) -> None:
    before = torch.random.get_rng_state()
    ids = random_prompt(4)
    for beams in (1, 2):
        generate_ids(engine_for(mixtral), ids, seed=1, do_sample=True, num_beams=beams, max_new_tokens=3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("given", [True, False])
def test_left_padded_batch(hf: Any, given: bool) -> None:
    ids, mask = left_padded([9, 21, 3, 14, 21])
    options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": list(range(100, 130))}
    engine = engine_for(hf, rows=2)
    out = generate_ids(engine, ids, mask if given else None, **options)
    assert out.tolist() == hf_generate(hf, ids, **options, attention_mask=mask).tolist()
    assert (out[:, -1] == PAD).any(), "rows of different lengths were meant"
    assert not engine.active


def test_lengths_count_the_padding_as_transformers_does(mixtral: Any) -> None:
    ids, mask = left_padded([4, 15])
    options = {"max_length": 30, "min_length": 22, "do_sample": False, "eos_token_id": list(range(3, 320, 3))}
    out = generate_ids(engine_for(mixtral), ids, mask, **options)
    assert out.tolist() == hf_generate(mixtral, ids, attention_mask=mask, **options).tolist()


def test_a_single_prompt_with_pad_ids_inside_goes_by_transformers_guess(mixtral: Any) -> None:
    """Without a mask transformers hides ids equal to the pad token, wherever they stand; so do we."""
    ids = random_prompt(12)
    ids[0, 5] = PAD
    options = {"max_new_tokens": 10, "do_sample": False}
    out = generate_ids(engine_for(mixtral), ids, **options)
    assert out.tolist() == hf_generate(mixtral, ids, **options, attention_mask=None).tolist()
    shown = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), **options)
    assert shown.tolist() == hf_generate(mixtral, ids, **options).tolist()
    assert shown.tolist() != out.tolist()


@pytest.mark.parametrize("hole", ["right", "middle", "all"])
def test_other_masks_are_handed_over(mixtral: Any, hole: str) -> None:
    ids = random_prompt(8, rows=2)
    mask = torch.ones_like(ids)
    mask[0, {"right": slice(6, 8), "middle": slice(3, 5), "all": slice(0, 8)}[hole]] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    engine = engine_for(mixtral)
    engine.step = None  # type: ignore[method-assign, assignment]
    out = generate_ids(engine, ids, mask, **options)
    assert out.tolist() == hf_generate(mixtral, ids, attention_mask=mask, **options).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        {"renormalize_logits": True, "num_beams": 2},
    ],
)
def test_what_the_loop_does_not_do_is_handed_over(mixtral: Any, options: dict[str, Any]) -> None:
    ids = random_prompt(8)
    options = {"max_new_tokens": 6, **options}
    assert needs_hf_generate(mixtral, options)
    engine = engine_for(mixtral)
    engine.step = None  # type: ignore[method-assign, assignment]
    out = generate_ids(engine, ids, torch.ones_like(ids), seed=3, **options)
    assert out.tolist() == hf_generate(mixtral, ids, seed=3, **options).tolist()


def test_a_dictionary_of_scores_comes_as_transformers_makes_it(mixtral: Any) -> None:
    ids = random_prompt(8)
    out = generate_ids(
        engine_for(mixtral), ids, max_new_tokens=4, return_dict_in_generate=True, output_scores=True
    )
    assert len(out.scores) == 4
    assert out.sequences.shape == (1, 12)


def test_stop_strings_across_token_borders(mixtral: Any, tokenizer: Any) -> None:
    ids = random_prompt(10)
    free = hf_generate(mixtral, ids, max_new_tokens=60, do_sample=False, eos_token_id=None)[0, 10:].tolist()
    pieces = [tokenizer.decode([token]) for token in free]
    ascii_pairs = [i for i in range(5, 50) if pieces[i].isascii() and pieces[i + 1].isascii()]
    stop = next((pieces[i][-1] + pieces[i + 1][0] for i in ascii_pairs), None)
    assert stop is not None, "no printable pair: choose another seed"
    options = {"max_new_tokens": 60, "do_sample": False, "stop_strings": [stop]}
    out = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), tokenizer=tokenizer, **options)
    assert out.tolist() == hf_generate(mixtral, ids, tokenizer=tokenizer, **options).tolist()
    assert out.shape[1] < 70


def test_stop_strings_may_begin_in_a_tensors_prompt(mixtral: Any, tokenizer: Any) -> None:
    """As in transformers; in answers to text they may not."""
    ids = tokenizer("the expert routers", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": PAD}
    first = hf_generate(mixtral, ids, **options)[0, ids.shape[1]]
    options["stop_strings"] = "s" + tokenizer.decode([first])
    out = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), tokenizer=tokenizer, **options)
    assert out.tolist() == hf_generate(mixtral, ids, tokenizer=tokenizer, **options).tolist()
    assert out.shape[1] == ids.shape[1] + 1


def test_a_row_that_is_too_long_is_refused_before_any_is_computed(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = left_padded([4, 20])
    engine = Engine(mixtral, make_kv(mixtral, 1, 16), chunk=16)
    monkeypatch.setattr(engine, "step", lambda: pytest.fail("computed"))
    with pytest.raises(OptionError, match="the prompt has 20 tokens, the context holds 16"):
        generate_ids(engine, ids, mask, max_new_tokens=2)
    assert engine.active == []


def test_return_sequences_are_drawn_one_by_one(mixtral: Any) -> None:
    ids = random_prompt(6, rows=2)
    options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    out = generate_ids(engine_for(mixtral), ids, seed=40, num_return_sequences=3, **options)
    assert out.shape == (6, 14)
    for index, row in enumerate(out):
        prompt = ids[index // 3][None]
        assert row.tolist() == hf_generate(mixtral, prompt, seed=40 + index, **options)[0].tolist()


def test_the_checkpoints_own_defaults() -> None:
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    model.generation_config.update(do_sample=True, top_p=0.5, temperature=0.6, max_new_tokens=7)
    ids = random_prompt(5)
    out = generate_ids(engine_for(model), ids, torch.ones_like(ids), seed=2)
    assert out.tolist() == hf_generate(model, ids, seed=2).tolist()


def test_a_generation_config_object(mixtral: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.5, pad_token_id=0)
    ids = random_prompt(5)
    out = generate_ids(engine_for(mixtral), ids, torch.ones_like(ids), generation_config=config)
    assert out.tolist() == hf_generate(mixtral, ids, generation_config=config).tolist()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor([1, 2]), None, r"shape \[2\]"),
        (torch.zeros((1, 0), dtype=torch.long), None, r"shape \[1, 0\]"),
        (torch.tensor([[0.5]]), None, "float32"),
        (torch.tensor([[True]]), None, "bool"),
        (torch.tensor([[5, 6]]), torch.tensor([[1]]), r"attention_mask has shape \[1, 1\]"),
        (torch.tensor([[5, 999]]), None, "token id 999"),
    ],
)
def test_bad_tensors(mixtral: Any, ids: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate_ids(engine_for(mixtral), ids, mask, max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 2])
def test_errors_of_transformers_are_one_line(mixtral: Any, beams: int) -> None:
    with pytest.raises(OptionError, match="tokenizer") as caught:
        generate_ids(engine_for(mixtral), random_prompt(6), stop_strings=["a"], num_beams=beams)
    assert "\n" not in str(caught.value)


def test_a_stream_in_the_engine_is_not_disturbed(mixtral: Any) -> None:
    engine = engine_for(mixtral)
    engine.join([5, 6], make_settings(mixtral, [5, 6]))
    with pytest.raises(MoeLocalError, match="1 sequences are being generated"):
        generate_ids(engine, random_prompt(4), max_new_tokens=2)


def test_after_a_failure_the_engine_is_empty(mixtral: Any) -> None:
    engine = engine_for(mixtral)
    hook = mixtral.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        generate_ids(engine, random_prompt(4, rows=3), max_new_tokens=2)
    hook.remove()
    engine.check_integrity()
    assert not engine.active
    ids = random_prompt(4, rows=3)
    out = generate_ids(engine, ids, max_new_tokens=5)
    assert out.tolist() == hf_generate(mixtral, ids, max_new_tokens=5).tolist()


def test_results_follow_the_callers_dtype(mixtral: Any) -> None:
    ids = random_prompt(4).to(torch.int32)
    assert generate_ids(engine_for(mixtral), ids, max_new_tokens=3).dtype == torch.int32


def test_random_batches_equal_each_alone(mixtral: Any) -> None:
    chance = random.Random(0)
    for seed in range(2):
        ids, mask = left_padded([chance.randint(1, 20) for _ in range(chance.randint(2, 6))])
        eos = chance.sample(range(3, 320), 30)
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": eos}
        out = generate_ids(engine_for(mixtral, rows=1 + seed % 3), ids, mask, **options)
        for row, alone, seen in zip(out, ids, mask, strict=True):
            prompt = alone[seen.bool()][None]
            expected = hf_generate(mixtral, prompt, **options)[0, prompt.shape[1] :].tolist()
            new = row[ids.shape[1] :].tolist()
            assert new == expected + [PAD] * (len(new) - len(expected))
