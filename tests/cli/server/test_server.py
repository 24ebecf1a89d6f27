"""The server over real sockets: as the openai package, curl and Prometheus use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import moe_local
from moe_local.cli.server import prompts, refusals, watch
from moe_local.cli.server.protocol import ChatRequest
from moe_local.offload.engine.text import encode_prompt

QUESTION: list[Any] = [{"role": "user", "content": "What is a router?"}]


@pytest.fixture(scope="module")
def expected(model: moe_local.Model, server: Any) -> str:
    """The greedy answer, as Python gives it."""
    return model.generate(QUESTION, max_new_tokens=40, do_sample=False).text


def test_a_chat(client: openai.OpenAI, expected: str) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 10
    assert answer.object == "chat.completion"
    assert answer.model == "demo"


def test_a_chat_as_a_stream(client: openai.OpenAI, expected: str) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_completion_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert len(chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client: openai.OpenAI, model: moe_local.Model) -> None:
    answer = client.completions.create(model="demo", prompt="The router", max_tokens=12, temperature=0)
    assert (
        answer.choices[0].text
        == model.generate("The router", template=False, max_new_tokens=12, do_sample=False).text
    )
    several = client.completions.create(
        model="demo", prompt=["The router", "An expert"], n=2, max_tokens=5, echo=True, seed=1, temperature=1
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    starts = [choice.text.startswith(("The router", "An expert")) for choice in several.choices]
    assert starts == [True] * 4
    ids = model.tokenizer("The router")["input_ids"]
    stream = client.completions.create(model="demo", prompt=ids, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_a_long_conversation_is_refused_or_shortened(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "Yes."}]
    talk = [{"role": "system", "content": "Be brief."}, *turns * 40, *QUESTION]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=talk, max_tokens=40)
    assert refused.value.code == "context_length_exceeded"

    def ask(messages: Any) -> Any:
        shorten = {"truncation": "auto"}
        return client.chat.completions.create(
            model="demo", messages=messages, max_tokens=40, temperature=0, extra_body=shorten
        )

    answer = ask(talk)
    left_out = answer.usage.prompt_tokens_details.left_out_exchanges
    assert 0 < left_out < 40
    assert answer.usage.prompt_tokens <= 2048 - 40
    by_hand = ask([talk[0], *turns * (40 - left_out), *QUESTION])
    assert by_hand.choices[0].message.content == answer.choices[0].message.content
    assert by_hand.usage.prompt_tokens == answer.usage.prompt_tokens
    assert not hasattr(by_hand.usage.prompt_tokens_details, "left_out_exchanges")
    with pytest.raises(openai.BadRequestError, match="the context holds 2048"):
        ask([{"role": "user", "content": "word " * 5000}])


def test_a_completion_that_names_no_limit_has_openais(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The", temperature=2, seed=1)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    longer = client.completions.create(model="demo", prompt="The", temperature=2, seed=1, max_tokens=30)
    assert longer.usage.completion_tokens > 16


def test_minus_one_means_no_limit(serving: Any, model: moe_local.Model) -> None:
    """As llama.cpp and vLLM have it: no more than what the server allows."""
    sampling: dict[str, Any] = {"temperature": 2.0, "seed": 3}
    endless: Any = {"logit_bias": {str(model.tokenizer.eos_token_id): -100}}
    with serving(max_tokens=30) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        text = client.completions.create(model="demo", prompt="The", max_tokens=-1, **sampling, **endless)
        assert (text.usage.completion_tokens, text.choices[0].finish_reason) == (30, "length")
        for limit in ("max_tokens", "max_completion_tokens"):
            ask: Any = {"model": "demo", "messages": QUESTION, limit: -1, **sampling}
            chat = client.chat.completions.create(**ask, **endless)
            assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (30, "length")
        off, none, one = (
            client.chat.completions.create(**ask, extra_body={"top_k": k}).choices[0].message.content
            for k in (-1, 0, 1)
        )
        assert off == none != one


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=20, temperature=1.5, **options
        )
        return [choice.message.content for choice in answer.choices]

    three = ask(n=3, seed=7)
    assert len(set(three)) > 1
    assert ask(n=3, seed=7) == three
    assert ask(seed=8) == [three[1]], "each choice draws from the next seed"


def test_the_lowest_seed_follows_the_highest(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=1, temperature=1, n=2, seed=2**63 - 1
    )
    assert len(answer.choices) == 2


def test_stop_strings_are_not_shown(client: openai.OpenAI, expected: str) -> None:
    word = expected.split()[4]
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            max_tokens=40,
            temperature=0,
            stop=[word, "nowhere"],
            stream=stream,
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == expected[: expected.index(word)]
        assert reason == "stop"


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI, model: moe_local.Model) -> None:
    questions = [
        f"Tell me about {what}." for what in ("experts", "the cache", "a miss", "prefetch", "tokens")
    ]
    alone = {
        question: model.generate(question, max_new_tokens=24, do_sample=False).text for question in questions
    }

    def ask(question: str) -> str | None:
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            temperature=0,
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, questions * 2))
    assert answers == [alone[question] for question in questions * 2]


def test_a_conversation_is_not_computed_twice(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello there, what can you tell me about memory?"}]
    first = client.chat.completions.create(model="demo", messages=messages, max_tokens=20, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And more?"},
    ]
    second = client.chat.completions.create(model="demo", messages=messages, max_tokens=5, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_one_prompt_of_several_answers_is_computed_and_counted_once(
    client: openai.OpenAI, server: Any
) -> None:
    question: list[Any] = [
        {
            "role": "user",
            "content": "Say something new about memory, about disks, and about the links between them.",
        }
    ]
    before = server.batcher.reused_tokens
    answer = client.chat.completions.create(model="demo", messages=question, n=3, max_tokens=2, seed=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    each = answer.usage.prompt_tokens
    assert 20 < each < 60
    assert answer.usage.completion_tokens == 6
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) < each
    assert server.batcher.reused_tokens - before >= 2 * (each - 1)


def test_each_prompt_of_a_completion_is_counted_once(client: openai.OpenAI) -> None:
    prompts = ["An expert", "The router is"]
    apart = [client.completions.create(model="demo", prompt=prompt, max_tokens=1) for prompt in prompts]
    together = client.completions.create(model="demo", prompt=prompts, n=2, max_tokens=1)
    assert together.usage is not None
    assert together.usage.completion_tokens == 4
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in apart if one.usage)


def test_two_conversations_in_turn_compute_only_what_is_new(
    client: openai.OpenAI, server: Any, model: moe_local.Model
) -> None:
    """Counted where it is computed, in the model's own forward."""
    computed: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        computed.append(kwargs["input_ids"].numel())

    hook = model.hf.register_forward_pre_hook(count, with_kwargs=True)
    talks: list[list[Any]] = [
        [{"role": "user", "content": f"Tell me {what}, and then all that you know about memory."}]
        for what in ("about routers", "why experts are many")
    ]
    before = [0, 0]
    try:
        for turn in range(3):
            for which, talk in enumerate(talks):
                computed.clear()
                answer = client.chat.completions.create(
                    model="demo", messages=talk, max_tokens=20, temperature=0
                )
                usage = answer.usage
                assert usage is not None
                assert usage.prompt_tokens_details is not None
                cached = usage.prompt_tokens_details.cached_tokens or 0
                # a prompt, and a token for each but the last of the answer
                assert sum(computed) == usage.prompt_tokens - cached + usage.completion_tokens - 1
                if turn:
                    assert cached >= before[which] - 3
                before[which] = usage.total_tokens
                talk += [
                    {"role": "assistant", "content": answer.choices[0].message.content},
                    {"role": "user", "content": "Go on."},
                ]
    finally:
        hook.remove()


def test_the_map_of_the_cache(serving: Any) -> None:
    with moe_local.load("demo", slots=3, parallel=2, device="cpu") as model, serving(model) as server:

        def get() -> dict[str, Any]:
            report: dict[str, Any] = server.http.get(f"{server.url}/v1/cache").json()
            return report

        first = get()
        assert first["slots"] == [3] * 5
        assert first["tier"] == "ram"
        assert (first["running"], first["waiting"], first["parallel"]) == (0, 0, 2)
        body = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, "stream": True}
        times = []
        with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {") and len(times) < 3:
                    time.sleep(0.11)
                    times.append(get()["time"])
        server.until(lambda: get()["counts"] == json.loads(json.dumps(model.stats().to_dict())))
        last = get()
        assert times == sorted(set(times)), "pictures are taken while an answer is on its way"
        residents = [{expert for expert, state in enumerate(row) if state == "1"} for row in last["states"]]
        cache = model.parts.store.tier.cache
        assert residents == [set(cache.residents(layer)) for layer in range(5)]
        assert all(len(row) == 8 for row in last["states"])
        counts = model.stats()
        assert last["counts"]["misses"] > 0
        assert [sum(row) // 2 for row in last["uses"]] == list(counts.routed.tokens)
        metrics = server.http.get(f"{server.url}/metrics").text
        assert "moe_local_expert_slots 15.0" in metrics
        assert f"moe_local_experts_resident {sum(map(len, residents)):.1f}" in metrics
        model.check_integrity()


def test_a_map_when_no_step_ends(
    serving: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(watch, "FIRST_SECONDS", 0.1)
    with serving() as server:
        model._turn.begin()
        try:
            none_yet = server.http.get(f"{server.url}/v1/cache")
            assert none_yet.status_code == 503
            assert "busy with one long step" in none_yet.json()["error"]["message"]
        finally:
            model._turn.end()
        server.until(lambda: server.http.get(f"{server.url}/v1/cache").status_code == 200)
        time.sleep(0.15)
        model._turn.begin()
        try:
            old = [server.http.get(f"{server.url}/v1/cache").json()["time"] for _ in range(2)]
        finally:
            model._turn.end()
        assert old[0] == old[1]


THOUGHT = "<think>\nLet me see.\n</think>\n\nIt routes."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_reasoning(serving: Any, scripted: Any) -> None:
    with serving(scripted(THOUGHT)) as server:
        body = {"messages": QUESTION}
        url = f"{server.url}/v1/chat/completions"
        message = server.http.post(url, json=body).json()["choices"][0]["message"]
        assert message == {
            "role": "assistant",
            "content": "It routes.",
            "reasoning_content": "\nLet me see.\n",
        }
        lines = server.http.post(url, json={**body, "stream": True}).text.splitlines()
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "\nLet me see.\n"
        assert "".join(delta.get("content", "") for delta in deltas) == "It routes."


def test_tools(serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[Any] = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Linz"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    template = (
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.content }}"
        "{% for call in m.tool_calls %}{% set f = call.function %}{{ f.name }} {{ f.arguments.city }}"
        "{% endfor %}{% endfor %}"
    )
    says = scripted(f"Let me look. {CALL}")
    with serving(says) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with monkeypatch.context() as without:
            without.setattr(model.tokenizer, "chat_template", None)
            for tools in (TOOLS, []):
                with pytest.raises(openai.BadRequestError, match="needs a chat template"):
                    client.chat.completions.create(model="demo", messages=QUESTION, tools=tools)
        with pytest.raises(openai.BadRequestError, match="this model knows no tools"):
            client.chat.completions.create(model="demo", messages=QUESTION, tools=TOOLS)
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        answer = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look. "
        assert choice.message.tool_calls is not None
        call: Any = choice.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Graz"})
        assert "[weather]What is a router?weather Linzrain" in says.prompts[0]
        stream = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, stream=True)
        calls: list[Any] = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
        assert [(c.index, c.function.name) for c in calls] == [(0, "weather")]


def test_calls_in_a_conversation_that_the_template_would_leave_out(
    serving: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    called = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    said: Any = {"role": "assistant", "content": "Let me look.", "tool_calls": [called]}
    with serving() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="message 1 has calls of tools, for which"):
            client.chat.completions.create(model="demo", messages=[*QUESTION, said, *QUESTION])


def test_an_earlier_answer_with_an_empty_list_of_calls() -> None:
    """Some clients send it back so, and templates ask only whether there is a list."""
    said = {"role": "assistant", "content": "Hi", "tool_calls": []}
    asked = ChatRequest(messages=[*QUESTION, said])
    assert asked.conversation()[-1] == {"role": "assistant", "content": "Hi"}


def test_an_earlier_refusal_is_text() -> None:
    parts = [{"type": "text", "text": "No. "}, {"type": "refusal", "refusal": "Never."}]
    for said in ({"content": parts}, {"content": None, "refusal": "No. Never."}):
        asked = ChatRequest(messages=[*QUESTION, {"role": "assistant", **said}])
        assert asked.conversation()[-1] == {"role": "assistant", "content": "No. Never."}


def test_models_and_health(client: openai.OpenAI, server: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "small-1"]
    for name in ("demo", "small-1"):  # which the server was told to go by, too
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, messages=QUESTION, max_tokens=1).choices
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5' here; this server has 'demo'"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    health = server.http.get(f"{server.url}/health").json()
    assert health["status"] == "ok"


def test_metrics(client: openai.OpenAI, server: Any) -> None:
    def read() -> dict[str, float]:
        text = server.http.get(f"{server.url}/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = read()
    client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=7, temperature=0)
    after = read()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["moe_local_tokens_total"] == 7
    assert grown["moe_local_time_to_first_token_seconds_count"] == 1
    assert grown["moe_local_time_per_output_token_seconds_count"] == 6
    assert grown["moe_local_expert_hits_total"] + grown["moe_local_expert_misses_total"] > 0
    assert {
        'moe_local_stall_seconds_total{cause="disk"}',
        'moe_local_bytes_total{link="disk"}',
    } <= after.keys()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages is missing; give it"),
        ({"messages": QUESTION, "max_token": 5}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"massages": QUESTION}, "unknown field 'massages'; did you mean 'messages'?"),
        ({"messages": QUESTION, "zebra": 5}, "unknown field 'zebra'; leave it out"),
        ({"messages": QUESTION, "cache_prompt": True}, "unknown field 'cache_prompt'; leave it out"),
        ({"messages": QUESTION, "max_tokens": "5"}, 'max_tokens is "5"; it should be a valid integer'),
        ({"messages": QUESTION, "n": True}, "n is true; it should be a valid integer"),
        ({"messages": QUESTION, "frequency_penalty": 2.5}, "frequency_penalty is 2.5; it must be a number"),
        ({"messages": QUESTION, "logit_bias": {"x": 1}}, "logit_bias has 'x'; it must be token ids"),
        ({"messages": QUESTION, "logit_bias": {"9999": 1}}, "logit_bias has '9999'; it must be token ids"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character, at 0"),
        ({"messages": 100 * "x"}, f'messages is "{59 * "x"}...; it should be a valid list'),
        ({"messages": {}}, "messages is an object; it should be a valid list"),
        ({"messages": QUESTION, "n": "\ud800"}, r'n is "\ud800"; it should be a valid integer'),
        ({"messages": []}, "messages is empty; give at least 1"),
        ({"messages": [{"content": "x"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user"}]}, "message 0 has no content"),
        ({"messages": QUESTION, "temperature": -1}, "temperature is -1.0; it must be a number, 0 or more"),
        ({"messages": QUESTION, "top_p": 1.5}, "top_p is 1.5; it must be a number, from 0 to 1"),
        (
            {"messages": QUESTION, "repetition_penalty": 0},
            "repetition_penalty is 0.0; it must be a number above",
        ),
        ({"messages": QUESTION, "max_tokens": 0}, "max_tokens is 0; it must be a whole number, 1 or more"),
        ({"messages": QUESTION, "max_tokens": -2}, "max_tokens is -2; it must be a whole number, 1 or more"),
        ({"messages": QUESTION, "top_k": -2}, "top_k is -2; it must be a whole number, 0 or more"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "of type 'refusal'"),
        (
            {"messages": QUESTION, "max_completion_tokens": 0},
            "max_completion_tokens is 0; it must be a whole",
        ),
        (
            {"messages": QUESTION, "seed": 2**63},
            "seed is 9223372036854775808; it must be a whole number, from",
        ),
        ({"messages": QUESTION, "n": 100}, "n is 100; it should be less than or equal to 16"),
        ({"messages": QUESTION, "stop": [""]}, "a stop string is empty"),
        ({"messages": QUESTION, "stop": ["a"] * 65}, "there are 65 stop strings; at most 64 are looked for"),
        ({"messages": QUESTION, "logprobs": 3}, "logprobs is 3; it should be a valid boolean"),
        ({"messages": QUESTION, "top_logprobs": 3}, "top_logprobs need logprobs: true beside them"),
        (
            {"messages": QUESTION, "logprobs": True, "top_logprobs": 21},
            "top_logprobs is 21; it must be a whole number, from 0 to 20",
        ),
        ({"messages": QUESTION, "response_format": {"type": "grammar"}}, "text, json_object and json_schema"),
        ({"messages": QUESTION, "response_format": {"type": "json_schema"}}, "has no json_schema.schema"),
        (
            {
                "messages": QUESTION,
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}},
            },
            "this schema or grammar cannot be enforced: Invalid type: objekt",
        ),
        ({"messages": QUESTION, "tool_choice": "required"}, "tool_choice demands a call, and there are no"),
        ({"messages": QUESTION, "chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "type 'image_url' without text; this model takes text only",
        ),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "the context holds"),
    ],
)
def test_bad_requests_are_one_line(server: Any, body: dict[str, Any], message: str) -> None:
    headers = {"content-type": "application/json"}
    answer = server.http.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_errors_that_clients_act_upon_have_openais_codes(server: Any, capfd: Any) -> None:
    """And the tokenizer says nothing of its own about a conversation that is too long."""
    long: list[dict[str, str]] = [{"role": "user", "content": "word " * 5000}]
    bodies: list[tuple[dict[str, Any], int, str | None]] = [
        ({"messages": long}, 400, "context_length_exceeded"),
        ({"messages": QUESTION, "model": "gpt-5"}, 404, "model_not_found"),
        ({"messages": QUESTION, "top_p": 2.0}, 400, None),
    ]
    for body, status, code in bodies:
        answer = server.http.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
    assert "longer than" not in capfd.readouterr().err


def test_the_field_at_fault_is_named_as_clients_know_it(server: Any) -> None:
    bodies: list[tuple[Any, str | None]] = [
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "x", "stop": [3]}, "stop"),
        ({"prompt": "x", "logit_bias": {"5": "much"}}, "logit_bias"),
        ({"prompt": "x", "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"prompt": "x", "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"prompt": "x", "min_p": -1}, "min_p"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ([], None),
    ]
    for body, at_fault in bodies:
        answer = server.http.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == at_fault
        assert error["message"].startswith((at_fault or "the body", "unknown field"))


def test_what_looks_whether_it_lives_may_ask_for_no_body(server: Any) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models"):
        answer = server.http.head(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"{",
            "the body is not JSON: Expecting property name enclosed in double quotes at line 1, column 2 "
            "(character 1)",
        ),
        (
            '{"prompt": "ä",\n "n": }'.encode(),
            "the body is not JSON: Expecting value at line 2, column 7 (character 22)",
        ),
        (b'{"prompt": "\xe4"}', "POST /v1/completions: the body is not UTF-8: byte 12 is 0xe4"),
        (b'{"prompt": ' + b"[" * 200_000, "POST /v1/completions: the body is nested too deeply"),
    ],
    ids=["cut", "no value", "latin-1", "deep"],
)
def test_where_a_body_is_no_json(server: Any, content: bytes, message: str) -> None:
    headers = {"content-type": "application/json"}
    answer = server.http.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == message


def test_bodies_that_are_no_requests(server: Any) -> None:
    url = f"{server.url}/v1/chat/completions"
    for content in (b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe"):
        answer = server.http.post(url, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.http.post(
            url, content=json.dumps({"messages": QUESTION}), headers={"content-type": kind}
        )
        assert answer.status_code == 415
        assert "send Content-Type: application/json" in answer.json()["error"]["message"]
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)):
        answer = server.http.request(method, server.url + path)
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert path in message
        assert ("base URLs end in /v1" in message) == (status == 404)
        assert message.endswith("; use POST") == (status == 405)


def test_a_page_of_another_origin_that_may_not_ask_is_told_how_it_may() -> None:
    app = FastAPI()
    refusals.add_to(app)
    app.add_api_route("/v1/chat/completions", lambda: None, methods=["POST"])
    asking = {"origin": "http://other", "access-control-request-method": "POST"}
    answer = TestClient(app).options("/v1/chat/completions", headers=asking)
    assert answer.status_code == 405
    assert "serve --cors ORIGIN" in answer.json()["error"]["message"]


def test_fields_that_change_nothing(client: openai.OpenAI, expected: str) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=40,
        temperature=0,
        frequency_penalty=0,
        logit_bias={},
        user="someone",
        store=False,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        reasoning_effort="low",
        extra_body={"top_k": None, "stop": None},
    )
    assert answer.choices[0].message.content == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Any, expected: str) -> None:
    body = {"messages": QUESTION, "max_tokens": 40, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    command += ["-d", json.dumps(body)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events) == expected


def test_nobody_waits_for_a_long_prompt(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is encoded, here, until others have been served."""
    begun, others = threading.Event(), threading.Event()

    def encode(tokenizer: Any, prompt: Any, **options: Any) -> list[int]:
        if len(prompt) > prompts.LONG_PROMPT:
            begun.set()
            assert others.wait(60)
        return encode_prompt(tokenizer, prompt, **options)

    monkeypatch.setattr(prompts, "encode_prompt", encode)
    body = {"messages": QUESTION, "max_tokens": 1}
    with ThreadPoolExecutor() as pool:
        prompt = {"prompt": "word " * 50_000}
        long = pool.submit(server.http.post, f"{server.url}/v1/completions", json=prompt)
        assert begun.wait(60)
        short = server.http.post(f"{server.url}/v1/chat/completions", json=body)
        assert short.status_code == 200
        assert server.http.get(f"{server.url}/v1/cache").status_code == 200
        assert not long.done()
        others.set()
        assert "the context holds 2048" in long.result().json()["error"]["message"]


def test_when_the_batcher_is_gone(serving: Any) -> None:
    with serving() as server:
        server.batcher.close("the model is closed")
        for reply in (
            server.http.get(f"{server.url}/v1/cache"),
            server.http.get(f"{server.url}/metrics"),
            server.http.post(f"{server.url}/v1/chat/completions", json={"messages": QUESTION}),
        ):
            assert reply.status_code == 500
            assert reply.json()["error"]["message"] == "the model is closed"


def test_parts_of_text_and_developers(client: openai.OpenAI, expected: str) -> None:
    parts: Any = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a router?"}]
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], max_tokens=40, temperature=0
    )
    assert answer.choices[0].message.content == expected


def test_a_client_that_goes_away_frees_its_row(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before its answer, whose tokens take 50 ms each, would have come to its end."""
    engine = server.batcher._engine
    step = engine.step

    def slow() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    url = f"{server.url}/v1/chat/completions"
    body = {"messages": QUESTION, "max_tokens": 1500, "temperature": 2.0, "n": 3}
    with server.http.stream("POST", url, json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(url, json=body, timeout=httpx.Timeout(60, read=0.05))
    server.until_idle()


def test_other_pages_may_ask_only_if_allowed(server: Any) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "content-type, x-api-key, x-stainless-os"
        answer = server.http.options(f"{server.url}/v1/chat/completions", headers=headers)
        return answer.headers.get("access-control-allow-origin") if answer.is_success else None

    assert allowed("https://page.example") == "https://page.example"
    assert allowed("https://evil.example") is None


class TestGuarded:
    """A key, a small body, a short queue."""

    @pytest.fixture(scope="class")
    def guarded(self, serving: Any) -> Iterator[Any]:
        with serving(queue=0, api_key="s3cret", body_bytes=2000, max_tokens=400) as running:
            yield running

    @pytest.mark.parametrize(
        "given", [None, "Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cret2"]
    )
    def test_the_key(self, guarded: Any, given: str | None) -> None:
        headers = {} if given is None else {"Authorization": given}
        answer = guarded.http.get(f"{guarded.url}/v1/models", headers=headers)
        assert answer.status_code == 401
        assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
        assert guarded.http.get(f"{guarded.url}/health").status_code == 200

    def test_with_the_key(self, guarded: Any) -> None:
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["demo"]

    def test_more_than_there_will_ever_be_room_for(self, guarded: Any) -> None:
        headers = {"Authorization": "Bearer s3cret"}
        body = {"messages": QUESTION, "n": 4}
        answer = guarded.http.post(f"{guarded.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 400
        assert "4 answers are asked for at once, 3 can be" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("chunked", [False, True])
    def test_long_bodies(self, guarded: Any, chunked: bool) -> None:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        content: Any = iter([body[:1500], body[1500:]]) if chunked else body
        headers = {"Authorization": "Bearer s3cret", "content-type": "application/json"}
        answer = guarded.http.post(f"{guarded.url}/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == 413
        assert "2000 are allowed" in answer.json()["error"]["message"]

    def test_more_than_can_be_answered_is_told_when_to_come_back(
        self, guarded: Any, model: moe_local.Model
    ) -> None:
        headers = {"Authorization": "Bearer s3cret"}
        url = f"{guarded.url}/v1/chat/completions"
        body = {"messages": QUESTION, "max_tokens": 4}
        model._turn.begin()  # nothing is answered for now
        try:
            with ThreadPoolExecutor() as pool:
                first = pool.submit(guarded.http.post, url, json={**body, "n": 3}, headers=headers)
                guarded.until(lambda: guarded.health()["waiting"] == 3)
                answer = guarded.http.post(url, json=body, headers=headers)
                model._turn.end()
                assert first.result().status_code == 200
        finally:
            if model._turn.mine:
                model._turn.end()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert "try again later" in answer.json()["error"]["message"]
