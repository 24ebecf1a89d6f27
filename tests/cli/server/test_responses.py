"""`/v1/responses` over real sockets, as the openai package asks for them and takes them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

import moe_local
from moe_local.cache.errors import BusyError, MoeLocalError, OptionError, TransferError
from moe_local.cli.server.items import as_messages
from moe_local.cli.server.kept import KeptResponses

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
QUESTION = "What is a router?"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
ANSWER = "<think>Where? Graz.</think>\n\nI look.\n" + CALL % "Graz" + "\n" + CALL % "Linz"
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}|"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}{{ f.name }} {{ f.arguments.city }},"
    "{% endfor %}{% endfor %}"
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Graz"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
TOOL: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
Ask = Callable[..., dict[str, Any]]


class Verdict(pydantic.BaseModel):
    topic: Literal["cache", "router"]
    sure: bool


def ask(server: Any, **body: Any) -> dict[str, Any]:
    """A whole response; of the openai package's type to the last field."""
    reply = server.http.post(f"{server.url}/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json(), strict=True)
    whole: dict[str, Any] = reply.json()
    return whole


def events(server: Any, **body: Any) -> list[dict[str, Any]]:
    """Those of a stream; each of the openai package's type."""
    found: list[dict[str, Any]] = server.events("/v1/responses", body)
    for event in found:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert len({event["response"]["id"] for event in found if "response" in event}) == 1
    return found


def nameless(value: Any) -> Any:
    """Without what is made anew each time, and without how much was computed before."""
    if isinstance(value, list):
        return [nameless(item) for item in value]
    if not isinstance(value, dict):
        return value
    new = ("id", "call_id", "created_at", "input_tokens_details")
    return {name: nameless(part) for name, part in value.items() if name not in new}


def test_a_text(client: openai.OpenAI, server: Any, model: moe_local.Model) -> None:
    expected = model.generate(QUESTION, max_new_tokens=40, do_sample=False)
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "max_output_tokens": 40, "temperature": 0}
    answer = client.responses.create(**asked)
    assert answer.output_text == expected.text
    (item,) = answer.output
    assert (item.type, item.status) == ("message", answer.status)
    assert answer.usage is not None
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
    )
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.total_tokens == chat.usage.total_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    parts = [{"type": "input_text", "text": QUESTION[:5]}, {"type": "input_text", "text": QUESTION[5:]}]
    again = ask(server, **{**asked, "input": [{"type": "message", "role": "user", "content": parts}]})
    assert nameless(again) == nameless(answer.to_dict())
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_a_stream_is_the_whole_in_parts(client: openai.OpenAI, server: Any) -> None:
    asked: dict[str, Any] = {"input": QUESTION, "max_output_tokens": 6, "temperature": 0}
    whole = ask(server, **asked)
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    found = events(server, **asked)
    assert nameless(found[-1]["response"]) == nameless(whole)
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 6,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event.get("delta", "") for event in found) == text
    with client.responses.stream(model="demo", **asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots[-1] == text


def test_thoughts_text_and_calls(
    serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    says = scripted(ANSWER)
    with serving(says) as server:
        asked: dict[str, Any] = {"input": "Rain?", "tools": [TOOL], "instructions": "Be brief."}
        whole = ask(server, **asked)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        thought, text, *calls = whole["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Where? Graz."}]
        assert text["content"][0]["text"] == "I look.\n"
        assert [json.loads(call["arguments"])["city"] for call in calls] == ["Graz", "Linz"]
        assert len({item["id"] for item in whole["output"]}) == len({c["call_id"] for c in calls}) + 2 == 4
        thoughts = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
        assert thoughts == pytest.approx(len("<think>Where? Graz.</think>\n\n") / says.size, abs=1)

        found = events(server, **asked)
        assert nameless(found[-1]["response"]) == nameless(whole)
        added = [event["output_index"] for event in found if event["type"].endswith("output_item.added")]
        assert added == [0, 1, 2, 3]
        parts: dict[str, str] = {}
        for event in found:
            if event["type"].endswith(".delta"):
                parts[event["item_id"]] = parts.get(event["item_id"], "") + event["delta"]
        assert list(parts.values()) == ["Where? Graz.", "I look.\n", *(call["arguments"] for call in calls)]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with client.responses.stream(model="demo", **asked) as stream:
            final = stream.get_final_response()
        assert [item.type for item in final.output] == kinds

        outputs = [
            {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls
        ]
        shown = "[weather]<system>|Be brief.|<user>|Rain?|<assistant>Where? Graz.|I look.\n"
        shown += "|weather Graz,weather Linz,"
        shown += "<tool>|rain|<tool>|rain|"
        ask(server, **{**asked, "input": [{"role": "user", "content": "Rain?"}, *whole["output"], *outputs]})
        assert says.prompts[-1] == shown
        ask(server, **{**asked, "input": outputs}, previous_response_id=whole["id"])
        assert says.prompts[-1] == shown


def test_functions_in_a_namespace(
    serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    space = {"type": "namespace", "name": "alps", "description": "There.", "tools": [TOOL]}
    says = scripted((CALL % "Graz").replace("weather", "alps__weather"))
    with serving(says) as server:
        asked: dict[str, Any] = {"input": "Rain?", "tools": [space, TOOL]}
        whole = ask(server, **asked)
        (call,) = whole["output"]
        assert (call["namespace"], call["name"]) == ("alps", "weather")
        assert nameless(events(server, **asked)[-1]["response"]) == nameless(whole)
        assert says.prompts[-1] == "[alps__weather][weather]<user>|Rain?|"
    message, _ = as_messages([{**call}, {"role": "user", "content": "So?"}])
    assert message["tool_calls"][0]["function"]["name"] == "alps__weather"


def test_white_space_alone_is_no_message_beside_a_call(serving: Any, scripted: Any) -> None:
    with serving(scripted("\n \n")) as server:
        (item,) = ask(server, input="x")["output"]
        assert item["content"][0]["text"] == "\n \n"
    with serving(scripted("")) as server:
        (item,) = ask(server, input="x")["output"]
        assert (item["content"][0]["text"], item["status"]) == ("", "completed")


def test_a_call_that_is_demanded(
    client: openai.OpenAI, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    for choice in ("required", {"type": "function", "name": "weather"}):
        asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 200}
        answer = client.responses.create(model="demo", input=QUESTION, **asked)
        (call,) = answer.output
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Graz"})


def test_some_of_the_tools(
    serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    space = {"type": "namespace", "name": "alps", "description": "There.", "tools": [TOOL]}
    says = scripted("None.")
    with serving(says) as server:
        for named, shown in (({}, "[weather]"), ({"namespace": "alps"}, "[alps__weather]")):
            allowed = {"type": "function", "name": "weather", **named}
            choice = {"type": "allowed_tools", "mode": "auto", "tools": [allowed]}
            whole = ask(server, input="Rain?", tools=[space, TOOL], tool_choice=choice)
            assert whole["tool_choice"] == choice
            assert says.prompts[-1] == f"{shown}<user>|Rain?|"


def test_an_answer_that_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="demo", input=QUESTION, text_format=Verdict, max_output_tokens=200, temperature=1
    )
    assert type(answer.output_parsed) is Verdict


def test_a_class_beside_tools(
    client: openai.OpenAI, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    (opening,) = model.tokenizer.encode("<", add_special_tokens=False)
    asked: dict[str, Any] = {"input": QUESTION, "tools": [TOOL], "text_format": Verdict, "temperature": 1}
    answers = [
        client.responses.parse(
            model="demo", max_output_tokens=200, **asked, extra_body={"logit_bias": {str(opening): bias}}
        )
        for bias in (-100, 100)
    ]
    assert type(answers[0].output_parsed) is Verdict
    (call,) = answers[1].output
    assert (call.type, call.parsed_arguments) == ("function_call", {"city": "Graz"})  # type: ignore[union-attr]


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI, server: Any) -> None:
    include = ["message.output_text.logprobs"]
    asked: dict[str, Any] = {"input": QUESTION, "max_output_tokens": 6, "temperature": 0}
    asked |= {"include": include, "top_logprobs": 2}
    (part,) = ask(server, **asked)["output"][0]["content"]
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].logprobs is not None
    expected = [entry.to_dict() for entry in chat.choices[0].logprobs.content or ()]
    found = events(server, **asked)
    streamed = [entry for e in found if e["type"].endswith("text.delta") for entry in e["logprobs"]]
    for entries in (part["logprobs"], streamed):
        assert [entry["token"] for entry in entries] == [entry["token"] for entry in expected]
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 6
        scores = [entry["logprob"] for entry in expected]  # their prompts are computed in other portions
        assert [entry["logprob"] for entry in entries] == pytest.approx(scores, abs=1e-3)


def test_thoughts_have_no_log_probabilities(serving: Any, scripted: Any) -> None:
    said = "<think>No.</think>\n\nYes, it is."
    for size in (1, 3, 7):
        with serving(scripted(said, size=size)) as server:
            output = ask(server, input="x", include=["message.output_text.logprobs"])["output"]
            assert [item["type"] for item in output] == ["reasoning", "message"]
            logprobs = output[1]["content"][0]["logprobs"]
            first, end = said.index("Yes") // size, -(-len(said) // size)
            assert [-entry["logprob"] for entry in logprobs] == list(range(first, end))


def test_white_space_before_a_text_has_log_probabilities(serving: Any, scripted: Any) -> None:
    with serving(scripted("\n \nYes.", size=1)) as server:
        (item,) = ask(server, input="x", include=["message.output_text.logprobs"])["output"]
        assert [-entry["logprob"] for entry in item["content"][0]["logprobs"]] == list(range(7))


def test_going_on_from_a_response(client: openai.OpenAI, server: Any) -> None:
    sampling: dict[str, Any] = {"model": "demo", "max_output_tokens": 12, "temperature": 0}
    first = client.responses.create(input="Tell me about misses.", **sampling)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(input="And more?", previous_response_id=first.id, **sampling)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    question = {"role": "user", "content": "Tell me about misses."}
    whole = [question, *(item.to_dict() for item in first.output), {"role": "user", "content": "And more?"}]
    assert client.responses.create(input=whole, **sampling).output_text == second.output_text  # type: ignore[call-overload]

    client.responses.delete(first.id)
    third = client.responses.create(input="Yes.", previous_response_id=second.id, **sampling)
    assert third.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as gone:
        client.responses.create(input="Yes.", previous_response_id=first.id, **sampling)
    assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")
    unkept = client.responses.create(input="Hello", store=False, **sampling)
    for name in (first.id, unkept.id):
        with pytest.raises(openai.NotFoundError, match="is kept here"):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError, match="is kept here"):
            client.responses.delete(name)
    streamed = events(server, input="Hello", max_output_tokens=2)[-1]["response"]
    assert client.responses.retrieve(streamed["id"]).to_dict() == streamed


def test_what_a_response_was_made_from(
    serving: Any, scripted: Any, model: moe_local.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole conversation, the newest first, page by page."""
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    with serving(scripted("Yes.")) as server:
        check_input_items(server)


def check_input_items(server: Any) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
    said: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": "Well."},
        {**call, "id": "fc_mine"},
        {"type": "function_call_output", "call_id": "a", "output": "Rain."},
    ]
    first = client.responses.create(model="demo", input=said)
    second = client.responses.create(model="demo", input="And?", previous_response_id=first.id)
    pages = client.responses.input_items.list(second.id, limit=3)
    items = list(pages)
    assert [type(item).__name__ for item in reversed(items)] == [
        "ResponseInputMessageItem",
        "ResponseReasoningItem",
        "ResponseOutputMessage",
        "ResponseFunctionToolCallItem",
        "ResponseFunctionToolCallOutputItem",
        "ResponseOutputMessage",
        "ResponseInputMessageItem",
    ]
    for item in items:
        type(item).model_validate(item.to_dict(), strict=True)
    assert items[1] == first.output[0]
    assert [getattr(items[at], "content")[0].text for at in (0, 4)] == ["And?", "Well."]  # noqa: B009
    assert items[3].id == "fc_mine"
    assert list(client.responses.input_items.list(second.id, order="asc")) == items[::-1]
    assert list(client.responses.input_items.list(first.id)) == items[2:], "they keep their ids"
    url = f"{server.url}/v1/responses/{second.id}/input_items"
    for query, status, param in (
        ("after=x", 400, None),
        ("limit=101", 400, "limit"),
        ("order=x", 400, "order"),
    ):
        reply = server.http.get(f"{url}?{query}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
        assert query.partition("=")[0] in reply.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="is kept here"):
        client.responses.input_items.list("resp_none")


def test_how_many_tokens_a_prompt_has(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "instructions": "Be brief."}
    first = client.responses.create(**asked, max_output_tokens=2)
    counted = client.responses.input_tokens.count(**asked)
    assert first.usage is not None
    assert (counted.input_tokens, counted.object) == (first.usage.input_tokens, "response.input_tokens")
    more = client.responses.input_tokens.count(model="demo", input="And?", previous_response_id=first.id)
    second = client.responses.create(
        model="demo", input="And?", previous_response_id=first.id, max_output_tokens=2
    )
    assert second.usage is not None
    assert more.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="there is nothing to count; give input"):
        client.responses.input_tokens.count(model="demo")


def test_a_long_conversation_is_shortened_if_that_is_asked_for(server: Any) -> None:
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "Yes."}]
    asked: dict[str, Any] = {"max_output_tokens": 4, "temperature": 0, "truncation": "auto"}
    whole = ask(server, input=[*turns * 40, {"role": "user", "content": QUESTION}], **asked)
    left_out = whole["usage"]["input_tokens_details"]["left_out_exchanges"]
    assert 0 < left_out < 40
    by_hand = ask(server, input=[*turns * (40 - left_out), {"role": "user", "content": QUESTION}], **asked)
    assert nameless(by_hand) == nameless(whole)
    more = ask(server, input="And?", previous_response_id=whole["id"], **asked)
    assert more["usage"]["input_tokens_details"]["left_out_exchanges"] >= left_out


def test_how_much_is_kept() -> None:
    def response(name: str) -> dict[str, Any]:
        return {"id": name, "output": [{"text": name * 50}]}

    def names(kept: KeptResponses) -> str:
        return "".join(name for name in "abcdef" if kept.find(name))

    few = KeptResponses(most=3)
    for name in "abcd":
        few.add(response(name), [], None)
        few.find("a")
    assert names(few) == "acd", "the one that was not used for the longest time has gone"
    small = KeptResponses(most_bytes=320)
    for name in "abcdef":
        small.add(
            response(name),
            [{"role": "user", "content": name, "id": name}],
            small.find("b") if name == "c" else None,
        )
    assert names(small) == "ef"
    small.remove("e")
    small.remove("f")
    for name in "ab":
        small.add(response(name), [], None)
    assert names(small) == "ab", "what was removed takes no room"
    small.add(response("c" * 1000), [], None)
    assert not any(small.find(name) for name in ("a", "b", "c" * 1000))


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({}, "input", "input is missing; give it"),
        ({"input": []}, "input", "input is empty"),
        ({"input": [3]}, "input", r"input\[0\] is int; give an object"),
        ({"input": [{"role": "robot", "content": ""}]}, "input", "has the role 'robot'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "takes text only"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", "takes text only"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input", "give the item itself"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", r"input\[0\] has no arguments"),
        ({"input": [{"type": "computer_call"}]}, "input", "message, function_call, .* are understood"),
        ({"input": "x", "background": True}, "background", "ask for a stream"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "'web_search', which nobody can call"),
        ({"input": "x", "tools": [{"type": "function", "function": {}}]}, "tools", "has no name; give it"),
        ({"input": "x", "tools": [{"type": "namespace", "name": "a"}]}, "tools", r"tools\[0\] has no tools"),
        (
            {"input": "x", "tools": [{"type": "namespace", "name": "a", "tools": [3]}]},
            "tools",
            "of type 'int'",
        ),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice", "type 'mcp' is not supported"),
        (
            {
                "input": "x",
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]},
            },
            None,
            "tool_choice allows 'f'; the tools are none",
        ),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text", "has no schema"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text", "'xml' is not supported"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include", "is not supported"),
        ({"input": "x", "top_logprobs": 3}, "top_logprobs", "in include"),
        ({"input": "x", "reasoning": {"effort": 3}}, "reasoning", "give a word"),
        ({"input": "x", "conversation": "c"}, "conversation", "give previous_response_id"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt", "give instructions and input"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "1 or more"),
        ({"input": "x", "max_output_tokens": "5"}, "max_output_tokens", "valid integer"),
        ({"input": "x", "user": "\ud800"}, "user", "has half a character or a number such as NaN"),
        ({"input": "x", "reasoning": {"x": [float("nan")]}}, "reasoning", "or a number such as NaN"),
        ({"input": "x", "text": {"format": {"type": "text", "x": float("inf")}}}, "text", "which no answer"),
        ({"input": "x", "metadata": {"\ud800": ""}}, "metadata", "leave them out"),
        ({"input": "x", "max_tokens": 5}, "max_tokens", "did you mean 'max_output_tokens'"),
        ({"input": "x", "text": {"fromat": 1}}, "text.fromat", "unknown field"),
        ({"input": "word " * 5000}, None, "the context holds 2048"),
    ],
)
def test_what_is_refused(
    client: openai.OpenAI, asked: dict[str, Any], param: str | None, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.post("/responses", content=json.dumps(asked), options={"headers": headers}, cast_to=Response)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_messages_of_items() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "In German."},
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "no thought"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "message", "role": "assistant", "content": "Yes."},
        {"role": "developer", "content": "Shorter."},
    ]
    assert as_messages(items, "Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nIn German."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "Yes."},
        {"role": "system", "content": "Shorter."},
    ]
    with pytest.raises(OptionError, match=r"input\[0\].output is NoneType; give text"):
        as_messages([{"type": "function_call_output", "call_id": "a"}])


def test_who_leaves_gives_the_row_up(server: Any) -> None:
    body = {"input": QUESTION, "temperature": 2.0, "max_output_tokens": 1500, "stream": True}
    with (
        httpx.Client(timeout=60) as gone,
        gone.stream("POST", f"{server.url}/v1/responses", json=body) as reply,
    ):
        assert next(reply.iter_lines()) == "event: response.created"
    server.until_idle()
    assert ask(server, input=QUESTION, max_output_tokens=2)["output"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BusyError("no turn came"), 429, "rate_limit_exceeded"),
        (TransferError("the disk is gone"), 500, "server_error"),
    ],
)
def test_an_answer_that_fails_says_so(
    serving: Any, scripted: Any, error: MoeLocalError, status: int, code: str
) -> None:
    with serving(scripted("Yes", error=error)) as server:
        *_, last = events(server, input=QUESTION)
        assert last["type"] == "response.failed"
        assert last["response"]["error"] == {"code": code, "message": str(error)}
        assert server.http.get(f"{server.url}/v1/responses/{last['response']['id']}").status_code == 404
        whole = server.http.post(f"{server.url}/v1/responses", json={"input": QUESTION})
        assert (whole.status_code, whole.json()["error"]["message"]) == (status, str(error))
