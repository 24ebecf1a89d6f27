"""Generation settings: transformers' options and defaults, checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.sampling import (
    DEFAULT_MAX_NEW_TOKENS,
    imply_sampling,
    make_settings,
    needs_hf_generate,
)
from support import tiny_models

torch.set_num_threads(1)


def test_the_loop_keeps_what_it_can() -> None:
    kept = [
        {},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 1},
        {"guidance_scale": 1.0},
        {"stop_strings": "a"},
    ]
    kept += [{"use_cache": True}, {"num_return_sequences": 2, "do_sample": True}, {"streamer": None}]
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    assert [needs_hf_generate(model, options) for options in kept] == [False] * len(kept)
    assert needs_hf_generate(model, {"streamer": object()})
    model.generation_config.num_beams = 4
    assert needs_hf_generate(model, {})
    with pytest.raises(OptionError, match="forced_eos_token_id has 320"):
        needs_hf_generate(model, {"forced_eos_token_id": 320})


def test_defaults_come_from_the_checkpoint_then_from_us() -> None:
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    settings = make_settings(model, [5])
    assert (settings.max_new_tokens, settings.do_sample, settings.eos_ids) == (
        DEFAULT_MAX_NEW_TOKENS,
        False,
        {2},
    )
    assert settings.pad_id == 0
    model.generation_config.update(do_sample=True, max_new_tokens=7, eos_token_id=[2, 9])
    settings = make_settings(model, [5])
    assert (settings.max_new_tokens, settings.do_sample, settings.eos_ids) == (7, True, {2, 9})
    assert make_settings(model, [5], max_new_tokens=9).max_new_tokens == 9
    assert make_settings(model, [5], max_new_tokens=None).max_new_tokens == 7
    assert make_settings(model, [5], eos_token_id=None).eos_ids == frozenset()
    assert not make_settings(model, [5], do_sample=False).do_sample


def test_a_temperature_near_0_takes_the_likeliest(mixtral: Any) -> None:
    """Scores divided by it would overflow, and any token would be drawn."""
    settings = make_settings(mixtral, [5], do_sample=True, temperature=1e-38, top_p=0.9, seed=1)
    assert (settings.do_sample, settings.processors) == (False, [])
    assert make_settings(mixtral, [5], do_sample=True, temperature=1e-5).do_sample


def test_lengths_count_the_prompt_and_its_padding(mixtral: Any) -> None:
    assert make_settings(mixtral, [5] * 6, max_length=20).max_new_tokens == 14
    assert make_settings(mixtral, [5] * 6, max_length=20, padding=4).max_new_tokens == 10
    assert make_settings(mixtral, [5] * 6, max_new_tokens=20, padding=4).max_new_tokens == 20


def test_a_call_does_not_change_the_checkpoints_config(mixtral: Any) -> None:
    before = mixtral.generation_config.to_dict()
    make_settings(mixtral, [5], temperature=0.5, do_sample=True, max_new_tokens=3, seed=1)
    assert mixtral.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "unknown generation option 'temprature'; did you mean temperature"),
        ({"max_tokens": 5}, "unknown generation option 'max_tokens'; did you mean"),
        ({"zzz": 5}, "unknown generation option 'zzz'"),
        ({"validate": 5}, "unknown generation option 'validate'"),
        ({"trust_remote_code": True}, "unknown generation option 'trust_remote_code'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, 1 or more"),
        ({"max_new_tokens": -4}, "max_new_tokens"),
        ({"max_length": 5}, "max_length 5 leaves no new token after 6 of prompt"),
        ({"do_sample": True, "temperature": 0.0}, "set do_sample=False"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0; it must be a number, 0 or more"),
        ({"do_sample": True, "top_p": 3.0}, "top_p is 3.0; it must be a number, from 0 to 1"),
        ({"do_sample": True, "top_k": -3}, "top_k is -3"),
        ({"do_sample": True, "top_k": "five"}, "top_k is 'five'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number above 0"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number, 0 or more"),
        (
            {"seed": 2**63},
            "seed is 9223372036854775808; it must be a whole number, from -9223372036854775808",
        ),
        ({"bad_words_ids": [[5], [5, 320]]}, "bad_words_ids has 320; it must be token ids, from 0 to 319"),
        ({"sequence_bias": [[[320], 1.0]]}, "sequence_bias has 320"),
        ({"forced_eos_token_id": [2, 320]}, "forced_eos_token_id has 320"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id has -1"),
        (
            {"exponential_decay_length_penalty": (3, 1.1), "eos_token_id": [2, 320]},
            "eos_token_id has 320",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id, or a list of them"),
        ({"eos_token_id": [2, None]}, r"eos_token_id is \[2, None\]; it must be"),
        ({"pad_token_id": True}, "pad_token_id is True; it must be"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"stop_strings": ["a"]}, "tokenizer"),
    ],
)
def test_bad_options_are_one_line(mixtral: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make_settings(mixtral, [5] * 6, **options)
    assert "\n" not in str(caught.value)


def test_implied_sampling() -> None:
    assert imply_sampling({"temperature": 0.7}) == {"temperature": 0.7, "do_sample": True}
    assert imply_sampling({"temperature": 0, "top_p": 0.9, "seed": 1}) == {"do_sample": False, "seed": 1}
    assert imply_sampling({"temperature": 1e-38, "top_p": 0.9}) == {"do_sample": False}
    assert imply_sampling({"temperature": -1e-9})["do_sample"], "which is refused later"
    assert imply_sampling({"top_p": 0.9, "do_sample": False}) == {"top_p": 0.9, "do_sample": False}
    assert imply_sampling({"max_new_tokens": 3, "top_k": None}) == {"max_new_tokens": 3, "top_k": None}
