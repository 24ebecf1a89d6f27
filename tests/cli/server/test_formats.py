"""Models that write answers each in their own way, as clients see them: all in OpenAI's and Anthropic's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import moe_local
from support.chat_templates import DIALECTS, HYBRID, LLAMAS, tokenizer_of

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "exact": {"type": "boolean"},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
KNOWN = {**DIALECTS, **LLAMAS, "hybrid": HYBRID}
QUESTION: list[Any] = [{"role": "user", "content": "Will it rain?"}]


@pytest.fixture(scope="module")
def mixtral(make_checkpoint: Callable[..., Path]) -> Iterator[moe_local.Model]:
    with moe_local.load(str(make_checkpoint("mixtral", tokenizer=True)), device="cpu", parallel=2) as loaded:
        yield loaded


Talking = Callable[[str], tuple[Any, openai.OpenAI]]


@pytest.fixture
def talking(mixtral: moe_local.Model, serving: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talking]:
    """talking(name): a server of the model, which talks in that dialect, and a client."""
    with contextlib.ExitStack() as stack:

        def talk(name: str) -> tuple[Any, openai.OpenAI]:
            monkeypatch.setattr(mixtral, "tokenizer", tokenizer_of(KNOWN[name]))
            server = stack.enter_context(serving(mixtral))
            return server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

        yield talk


def forced(monkeypatch: pytest.MonkeyPatch, model: moe_local.Model, lark: str) -> None:
    """Let the model answer nothing else, marks and all."""
    submit = model.submit

    def submitted(*arguments: Any, **options: Any) -> Any:
        return submit(*arguments, **{**options, "grammar": lark})

    monkeypatch.setattr(model, "submit", submitted)


def check(call: Any) -> dict[str, Any]:
    assert call.function.name == "weather"
    given: dict[str, Any] = json.loads(call.function.arguments)
    assert given["unit"] in ("C", "F")
    assert given["days"] in range(1, 10)
    assert given.get("exact") in (True, False, None)
    return given


@pytest.mark.parametrize("name", [*DIALECTS, *LLAMAS])
def test_a_call_that_is_demanded(name: str, talking: Talking, mixtral: moe_local.Model) -> None:
    """It is written in the model's own way, and read; and with its result it is shown to the model again."""
    server, client = talking(name)
    asked: dict[str, Any] = {"model": mixtral.name, "tools": TOOLS, "temperature": 1.0, "max_tokens": 300}
    ends = {"harmony": "<|end|>", "lfm": "<|tool_call_start|>"}
    if name in ends:  # else a model that knows nothing thinks without an end
        asked["logit_bias"] = {str(server.server.answers.tokens.ids[ends[name]]): 20}
    answer = client.chat.completions.create(messages=QUESTION, tool_choice="required", seed=0, n=2, **asked)
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        check(call)
    choice_of: Any = {"type": "function", "function": {"name": "weather"}}
    stream = client.chat.completions.create(
        messages=QUESTION, tool_choice=choice_of, seed=1, stream=True, **asked
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    (streamed,) = (call for delta in deltas for call in delta.tool_calls or ())
    check(streamed)
    assert not any(delta.content for delta in deltas)
    messages = [
        *QUESTION,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    messages[1]["tool_calls"] = messages[1]["tool_calls"][:1]
    again = client.chat.completions.create(messages=messages, seed=0, **{**asked, "max_tokens": 1})
    assert again.usage is not None
    assert answer.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


MESSAGES = (
    'start: <|channel|> "analysis" <|message|> "Let me see." <|end|> <|start|> "assistant" '
    '<|channel|> "final" <|message|> answer\n'
)


def test_channels(talking: Talking, mixtral: moe_local.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thoughts are told apart in all three interfaces; a text that is continued has no marks."""
    server, client = talking("harmony")
    forced(monkeypatch, mixtral, MESSAGES + 'answer: "It rains."')
    asked: dict[str, Any] = {"model": mixtral.name, "messages": QUESTION, "max_tokens": 100}
    answer = client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert (message.content, message.model_dump()["reasoning_content"]) == ("It rains.", "Let me see.")
    assert answer.choices[0].finish_reason == "stop"
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "It rains."
    thought = "".join(delta.model_dump().get("reasoning_content") or "" for delta in deltas)
    assert thought == "Let me see."
    response = client.responses.create(model=mixtral.name, input="Will it rain?", max_output_tokens=100)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == "It rains."
    assert 5 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens  # type: ignore[union-attr]
    blocks = server.http.post(f"{server.url}/v1/messages", json=asked).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    assert blocks[1]["text"] == "It rains."
    text = client.completions.create(model=mixtral.name, prompt="Will it rain?", max_tokens=100)
    assert text.choices[0].text == "analysisLet me see.assistantfinalIt rains."


def test_a_schema_beside_tools_binds_the_final_message(talking: Talking, mixtral: moe_local.Model) -> None:
    server, client = talking("harmony")
    verdict = {"enum": ["rain", "sun"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": verdict}}
    tokens = server.server.answers.tokenizer.convert_tokens_to_ids
    for bias, reason in ((100, "stop"), (-100, "tool_calls")):
        answer = client.chat.completions.create(
            model=mixtral.name,
            messages=QUESTION,
            tools=TOOLS,
            response_format=form,
            max_tokens=200,
            logit_bias={  # else a model that knows nothing thinks without an end
                str(tokens("f")): bias,
                str(tokens("a")): -100,
                str(tokens("<|channel|>")): 50,
                str(tokens("<|end|>")): 20,
            },
        )
        choice = answer.choices[0]
        assert choice.finish_reason == reason
        if choice.message.tool_calls:
            check(choice.message.tool_calls[0])
        else:
            assert json.loads(choice.message.content or "") in ("rain", "sun")


VERDICT = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
VERDICT |= {"additionalProperties": False}


class Thinker:
    """Asks a model that thinks first if it may, briefly: one that knows nothing has to be pushed."""

    def __init__(self, talking: Talking, model: moe_local.Model) -> None:
        self.server, self.client = talking("hybrid")
        self.name = model.name
        ids = self.server.server.answers.tokens.ids
        self.push = {str(ids["<think>"]): 100, str(ids["</think>"]): 4}
        self.drawn = {"max_tokens": 300, "temperature": 1.0, "seed": 2}

    def chat(self, **options: Any) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}}
        asked = {"response_format": form, "logit_bias": self.push, **self.drawn, **options}
        return self.client.chat.completions.create(model=self.name, messages=QUESTION, **asked)


@pytest.fixture
def thinker(talking: Talking, mixtral: moe_local.Model) -> Thinker:
    return Thinker(talking, mixtral)


def check_verdict(text: str | None) -> None:
    assert json.loads(text or "") in ({"rain": True}, {"rain": False})


def test_json_behind_a_thought_is_the_content_in_all_interfaces(thinker: Thinker) -> None:
    choice = thinker.chat().choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning_content
    check_verdict(choice.message.content)
    deltas = [chunk.choices[0].delta for chunk in thinker.chat(stream=True)]
    check_verdict("".join(delta.content or "" for delta in deltas))
    assert any(delta.model_dump().get("reasoning_content") for delta in deltas)
    response = thinker.client.responses.create(
        model=thinker.name,
        input="Will it rain?",
        max_output_tokens=300,
        temperature=1.0,
        text={"format": {"type": "json_schema", "name": "verdict", "schema": VERDICT}},
        extra_body={"logit_bias": thinker.push, "seed": 2},
    )
    assert [item.type for item in response.output] == ["reasoning", "message"]
    check_verdict(response.output_text)
    asked = {"model": thinker.name, "messages": QUESTION, "logit_bias": thinker.push, **thinker.drawn}
    form = {"format": {"type": "json_schema", "schema": VERDICT}}
    url = f"{thinker.server.url}/v1/messages"
    blocks = thinker.server.http.post(url, json={**asked, "output_config": form}).json()["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text"]
    check_verdict(blocks[1]["text"])


def test_a_call_that_is_demanded_may_follow_a_thought(thinker: Thinker) -> None:
    choice = thinker.chat(response_format={"type": "text"}, tools=TOOLS, tool_choice="required").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.reasoning_content
    check(choice.message.tool_calls[0])


OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("off", [{"reasoning_effort": "none"}, {"extra_body": OFF}])
def test_thoughts_that_are_turned_off_stay_off(thinker: Thinker, off: dict[str, Any]) -> None:
    message = thinker.chat(**off).choices[0].message
    check_verdict(message.content)
    assert "reasoning_content" not in message.model_dump()


def test_a_limit_within_the_thought_leaves_no_content(thinker: Thinker) -> None:
    endless = {name: 100 if bias == 100 else -100 for name, bias in thinker.push.items()}
    choice = thinker.chat(max_tokens=20, logit_bias=endless).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("length", "")
    assert choice.message.reasoning_content
