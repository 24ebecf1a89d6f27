"""JSON of a schema, penalties and biases, as the openai package asks for them."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pydantic
import pytest

import moe_local

QUESTION: list[Any] = [{"role": "user", "content": "What is a router?"}]


TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)

COLOUR = {"$defs": {"Colour": {"enum": ["red", "blue"]}}, "type": "object", "additionalProperties": False}
COLOUR |= {"properties": {"colour": {"$ref": "#/$defs/Colour"}}, "required": ["colour"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "paint", "parameters": COLOUR}},
    {"type": "function", "function": {"name": 'a "quoted" one'}},
]


class Verdict(pydantic.BaseModel):
    topic: Literal["cache", "router"]
    sure: bool


def test_an_answer_that_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Verdict, max_tokens=200, n=2, temperature=1, seed=0
    )
    assert [type(choice.message.parsed) for choice in answer.choices] == [Verdict, Verdict]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]


def test_any_object_as_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text.lstrip().startswith("{")


def check_call(call: Any) -> str:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "paint":
        assert arguments in ({"colour": "red"}, {"colour": "blue"})
    else:
        assert arguments == {}
    return str(call.function.name)


def test_a_call_that_is_demanded(
    client: openai.OpenAI, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    asked = {"model": "demo", "messages": QUESTION, "tools": TOOLS, "max_tokens": 200, "temperature": 2.0}
    answer = client.chat.completions.create(**asked, tool_choice="required", n=8, seed=0)
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
    names = [check_call(call) for choice in answer.choices for call in choice.message.tool_calls]
    assert len(names) == 8
    assert {choice.message.content for choice in answer.choices} == {None}
    for tool in TOOLS:
        name = tool["function"]["name"]
        choice = {"type": "function", "function": {"name": name}}
        stream = client.chat.completions.create(**asked, tool_choice=choice, seed=1, stream=True)
        calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
        assert [check_call(call) for call in calls] == [name]


def test_a_schema_beside_tools(
    client: openai.OpenAI, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either is an answer; no other is. Tools of which none may be called leave the schema alone."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    schema = {**Verdict.model_json_schema(), "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "max_tokens": 200, "temperature": 2.0}
    asked |= {"tools": TOOLS, "response_format": form, "n": 8, "seed": 0}
    (opening,) = model.tokenizer.encode("<", add_special_tokens=False)
    for bias, kinds in ((-100, {"stop"}), (100, {"tool_calls"}), (None, {"stop", "tool_calls"})):
        biased = {} if bias is None else {"logit_bias": {str(opening): bias}}
        answer = client.chat.completions.create(**asked, **biased)
        assert {choice.finish_reason for choice in answer.choices} == kinds
        for choice in answer.choices:
            if choice.finish_reason == "tool_calls":
                (call,) = choice.message.tool_calls
                assert check_call(call) in ("paint", 'a "quoted" one')
                assert choice.message.content is None
            else:
                Verdict.model_validate_json(choice.message.content)
    for choice, reason in (("none", "stop"), ("required", "tool_calls")):
        answer = client.chat.completions.create(**asked, tool_choice=choice)
        assert {each.finish_reason for each in answer.choices} == {reason}


def allowed(mode: Any, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_some_of_the_tools(
    serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is shown no others, and may, or must, call one of these."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    said = '<tool_call>\n{"name": "paint", "arguments": {}}\n</tool_call>'
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "tools": TOOLS}
    says = scripted(said)
    with serving(says) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        for names, shown in (
            (["paint"], "[paint]"),
            (['a "quoted" one', "paint"], '[paint][a "quoted" one]'),
            ([], ""),
        ):
            choice: Any = allowed("auto", *names)
            (found,) = client.chat.completions.create(**asked, tool_choice=choice).choices
            assert says.prompts[-1] == f"{shown}What is a router?"
            assert found.finish_reason == ("tool_calls" if names else "stop")


def test_a_call_of_some_tools_that_is_demanded(
    client: openai.OpenAI, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    asked = {"model": "demo", "messages": QUESTION, "tools": TOOLS, "max_tokens": 200, "temperature": 2.0}
    choice: Any = allowed("required", 'a "quoted" one')
    answer = client.chat.completions.create(**asked, tool_choice=choice, n=4, seed=0)
    names = [check_call(call) for found in answer.choices for call in found.message.tool_calls]
    assert names == ['a "quoted" one'] * 4


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        (allowed("auto", "fly"), TOOLS, "allows 'fly'; the tools are paint, a \"quoted\" one"),
        (allowed("auto", "fly"), [], "allows 'fly'; the tools are none"),
        (allowed("must", "paint"), TOOLS, "allowed_tools is 'must'; auto and required are known"),
        (allowed("required"), TOOLS, "demands a call, and there are no tools"),
        ({"type": "allowed_tools"}, TOOLS, "allowed_tools is None; auto and required"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, TOOLS, "give a list of functions"),
        ({"type": "function", "function": {"name": "fly"}}, TOOLS, "demands 'fly'; the tools are paint, a"),
        ({"type": "function"}, TOOLS, "demands None; the tools are paint"),
        ({"type": "function", "function": {"name": []}}, TOOLS, r"demands \[\]; the tools are paint"),
        (
            "required",
            [{"function": {"name": "f", "parameters": "x"}}],
            r"parameters of tools\[0\] are 'x'; give",
        ),
        ("required", [], "demands a call, and there are no tools"),
        (
            "required",
            [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "this schema or grammar cannot be enforced: .*not",
        ),
    ],
)
def test_calls_that_cannot_be_demanded(
    server: Any,
    model: moe_local.Model,
    monkeypatch: pytest.MonkeyPatch,
    choice: Any,
    tools: list[Any],
    message: str,
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    body = {"messages": QUESTION, "tools": tools, "tool_choice": choice}
    answer = server.http.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert re.search(message, said)
    assert "\n" not in said


@pytest.mark.parametrize(
    "asked", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"logit_bias": {"9": 12.0, "10": -100}}]
)
def test_penalties_and_biases_do_as_in_python(
    client: openai.OpenAI, model: moe_local.Model, asked: dict[str, Any]
) -> None:
    sampling = {"temperature": 2.0, "seed": 1}
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=60, **sampling, **asked
    )
    plain, expected = (
        model.generate(QUESTION, max_new_tokens=60, **sampling, **more).text for more in ({}, asked)
    )
    assert answer.choices[0].message.content == expected != plain
