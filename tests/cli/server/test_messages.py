"""`/v1/messages` over real sockets, as the anthropic package asks for them and takes them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Literal

import anthropic
import httpx
import openai
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent

import moe_local
from moe_local.cache.errors import BusyError, MoeLocalError, TransferError
from moe_local.cli.server import app
from moe_local.cli.server.blocks import as_items
from moe_local.cli.server.items import as_messages

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
QUESTION = "What is a router?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
ANSWER = "<think>Where? Graz.</think>\n\nI look.\n" + CALL % "Graz" + "\n" + CALL % "Linz"
TEMPLATE = (
    "{% if enable_thinking is defined %}[thinking: {{ enable_thinking }}]{% endif %}"
    "{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}"
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}|"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}{{ f.name }} {{ f.arguments.city }},"
    "{% endfor %}{% endfor %}"
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Graz"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
TOOL: dict[str, Any] = {"name": "weather", "description": "Of a city.", "input_schema": CITY}
SEARCH: dict[str, Any] = {"type": "web_search_20250305", "name": "web_search"}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
PLAIN = {"type": "text", "media_type": "text/plain", "data": "Some text."}
NOTE = {"type": "document", "title": "A title", "source": PLAIN, "citations": {"enabled": False}}
CACHED = {"cache_control": {"type": "ephemeral"}}
GREEDY = {"temperature": 0}
"""Which the package has no argument for any more."""


class Verdict(pydantic.BaseModel):
    topic: Literal["cache", "router"]
    sure: bool


def claude(server: Any, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"api_key": "any", "base_url": server.url, "max_retries": 0, **options})


@pytest.fixture(scope="module")
def anthropics(server: Any) -> anthropic.Anthropic:
    return claude(server)


@pytest.fixture
def with_tools(model: moe_local.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)


@pytest.fixture
def says(serving: Any, scripted: Any, with_tools: None) -> Iterator[Callable[..., Any]]:
    """says(text): a server that answers so, and the script."""
    with ExitStack() as stack:

        def serve(text: str, **options: Any) -> tuple[Any, Any]:
            script = scripted(text, **options)
            return stack.enter_context(serving(script)), script

        yield serve


def post(server: Any, path: str = "", **body: Any) -> httpx.Response:
    reply: httpx.Response = server.http.post(f"{server.url}/v1/messages{path}", json=body_of(body))
    return reply


def body_of(changed: dict[str, Any]) -> dict[str, Any]:
    return {"max_tokens": 40, "messages": ASKED, **changed}


def ask(server: Any, **body: Any) -> dict[str, Any]:
    """A whole message; of the anthropic package's type to the last field."""
    reply = post(server, **body)
    assert reply.status_code == 200, reply.text
    Message.model_validate(reply.json(), strict=True)
    whole: dict[str, Any] = reply.json()
    return whole


def events(server: Any, **body: Any) -> list[dict[str, Any]]:
    """Those of a stream; each of the anthropic package's type."""
    found: list[dict[str, Any]] = server.events("/v1/messages", body_of(body))
    for event in found:
        if event["type"] not in ("ping", "error"):  # which the package takes apart by itself
            EVENT.validate_python(event)
    return found


def nameless(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is made anew each time, and without how much was computed before."""
    blocks = [
        {k: v for k, v in block.items() if k not in ("id", "signature")} for block in message["content"]
    ]
    usage = message["usage"]
    tokens = usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]
    said = {name: value for name, value in message.items() if value is not None}
    return {**said, "id": None, "content": blocks, "usage": tokens}


def test_a_text(
    anthropics: anthropic.Anthropic, client: openai.OpenAI, server: Any, model: moe_local.Model
) -> None:
    expected = model.generate(QUESTION, max_new_tokens=40, do_sample=False)
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 40, "temperature": 0}
    answer = anthropics.messages.create(model="demo", max_tokens=40, messages=ASKED, extra_body=GREEDY)
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == expected.text
    assert (answer.type, answer.role, answer.model, answer.stop_sequence) == (
        "message",
        "assistant",
        "demo",
        None,
    )
    chat = client.chat.completions.create(messages=ASKED, **asked)
    assert answer.stop_reason == {"stop": "end_turn", "length": "max_tokens"}[chat.choices[0].finish_reason]
    assert chat.usage is not None
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    counted = anthropics.messages.count_tokens(model="demo", messages=ASKED).input_tokens
    blocks = [{"role": "user", "content": [{"type": "text", "text": QUESTION, **CACHED}]}]
    again = ask(server, **{**asked, "messages": blocks, "metadata": {"user_id": "a"}, **CACHED})
    assert nameless(again) == nameless(answer.to_dict())
    assert again["usage"]["cache_read_input_tokens"] > 0
    assert nameless(again)["usage"][0] == counted == chat.usage.prompt_tokens


def test_a_stream_is_the_whole_in_parts(anthropics: anthropic.Anthropic, server: Any) -> None:
    whole = ask(server, max_tokens=6, temperature=0)
    assert whole["stop_reason"] == "max_tokens"
    found = events(server, max_tokens=6, temperature=0)
    kinds = [event["type"].removeprefix("content_block_") for event in found]
    assert kinds == [
        "message_start",
        "ping",
        "start",
        *["delta"] * 6,
        "stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert start["usage"]["input_tokens"] == nameless(whole)["usage"][0]
    text = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    with anthropics.messages.stream(model="demo", messages=ASKED, max_tokens=6, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == text
        assert nameless(stream.get_final_message().to_dict()) == nameless(whole)


def test_thoughts_text_and_calls(says: Any) -> None:
    server, script = says(ANSWER)
    asked: dict[str, Any] = {"tools": [TOOL, {**SEARCH, **CACHED}], "system": "Be brief."}
    whole = ask(server, **asked)
    assert whole["stop_reason"] == "tool_use"
    thought, text, *calls = whole["content"]
    assert (thought["thinking"], text["text"]) == ("Where? Graz.", "I look.\n")
    assert [(call["name"], call["input"]) for call in calls] == [
        ("weather", {"city": "Graz"}),
        ("weather", {"city": "Linz"}),
    ]
    assert len({call["id"] for call in calls}) == 2
    thoughts = whole["usage"]["output_tokens_details"]["thinking_tokens"]
    assert thoughts == pytest.approx(len("<think>Where? Graz.</think>\n\n") / script.size, abs=1)

    found = events(server, **asked)
    assert [e["index"] for e in found if e["type"] == "content_block_start"] == [0, 1, 2, 3]
    with claude(server).messages.stream(model="demo", max_tokens=40, messages=ASKED, **asked) as stream:
        final = stream.get_final_message()
    assert nameless(final.to_dict()) == nameless(whole)

    results = [
        {"type": "tool_result", "tool_use_id": calls[0]["id"], "content": "rain"},
        {"type": "tool_result", "tool_use_id": calls[1]["id"], "content": [{"type": "text", "text": "sun"}]},
        {"type": "text", "text": "So?", **CACHED},
    ]
    messages = [
        *ASKED,
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": results},
    ]
    again = ask(server, **{**asked, "messages": messages})
    shown = f"[weather]<system>|Be brief.|<user>|{QUESTION}|<assistant>Where? Graz.|I look.\n"
    shown += "|weather Graz,weather Linz,"
    assert script.prompts[-1] == shown + "<tool>|rain|<tool>|sun|<user>|So?|"
    counted = post(server, "/count_tokens", **{**asked, "messages": messages}).json()
    assert counted == {"input_tokens": again["usage"]["input_tokens"]}


@pytest.mark.parametrize("arguments", ['"Graz"', "[]", '{"a": 1e999}', '{"a": NaN}'])
def test_arguments_that_are_no_object(says: Any, arguments: str) -> None:
    server, _ = says((CALL % "x").replace('{"city": "x"}', arguments))
    (call,) = ask(server, tools=[TOOL])["content"]
    assert call["input"] == {}
    assert events(server, tools=[TOOL])[3]["delta"]["partial_json"] == "{}"


def test_a_silent_stream_shows_that_the_server_lives(says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENCE_SECONDS", 0.01)
    server, script = says("One, two.", size=5, hold=1)
    kinds = []
    body = {"max_tokens": 40, "messages": ASKED, "stream": True}
    with server.http.stream("POST", f"{server.url}/v1/messages", json=body) as reply:
        for line in reply.iter_lines():
            kinds += [line.removeprefix("event: ")] if line.startswith("event: ") else []
            if kinds[-3:] == ["content_block_delta", "ping", "ping"]:
                script.go.set()
    others = [kind.removeprefix("content_block_") for kind in kinds if kind != "ping"]
    assert others == ["message_start", "start", "delta", "delta", "stop", "message_delta", "message_stop"]
    assert len(kinds) - len(others) >= 3


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_one_call_at_most(says: Any, size: int) -> None:
    server, script = says(ANSWER + " Now wait.", size=size)
    one = {"type": "auto", "disable_parallel_tool_use": True}
    whole = ask(server, tools=[TOOL], tool_choice=one)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert (whole["content"][-1]["input"], whole["stop_reason"]) == ({"city": "Graz"}, "tool_use")
    assert script.tickets[-1].cancelled
    called = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    function = {"name": "weather", "parameters": CITY}
    chat = called.chat.completions.create(
        model="demo",
        messages=ASKED,
        tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
        parallel_tool_calls=False,
    )
    assert len(chat.choices[0].message.tool_calls or ()) == 1
    assert chat.choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_demanded(anthropics: anthropic.Anthropic, with_tools: None) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
        (call,) = anthropics.messages.create(model="demo", messages=ASKED, **asked).content
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("weather", {"city": "Graz"})
    asked = {"tools": [TOOL], "tool_choice": {"type": "none"}, "max_tokens": 2}
    answer = anthropics.messages.create(model="demo", messages=ASKED, **asked)
    assert [block.type for block in answer.content] == ["text"]


def test_an_answer_that_is_parsed_into_a_class(anthropics: anthropic.Anthropic) -> None:
    answer = anthropics.messages.parse(model="demo", messages=ASKED, output_format=Verdict, max_tokens=200)
    assert type(answer.parsed_output) is Verdict


@pytest.mark.parametrize(("size", "said"), [(1, "One, two, three."), (5, "One, two, three."), (3, "")])
def test_stop_sequences(says: Any, size: int, said: str) -> None:
    server, _ = says(said, size=size)
    whole = ask(server, stop_sequences=["five", ", t"])
    stop = ("stop_sequence", ", t") if said else ("end_turn", None)
    assert (whole["stop_reason"], whole["stop_sequence"]) == stop
    assert whole["content"] == [{"type": "text", "text": "One" if said else ""}]
    assert events(server, stop_sequences=["five", ", t"])[-2]["delta"] == {
        "stop_reason": stop[0],
        "stop_sequence": stop[1],
    }


def test_a_header_for_billing_is_not_shown(says: Any) -> None:
    server, script = says("Yes.")
    blocks = ["x-anthropic-billing-header: cc_version=2.1; cch=fa690;", "Be brief.", "Be kind."]
    ask(server, system=[{"type": "text", "text": text, **CACHED} for text in blocks])
    assert script.prompts[-1] == f"<system>|Be brief.\nBe kind.|<user>|{QUESTION}|"


def test_whether_and_how_hard_it_thinks(says: Any) -> None:
    server, script = says("Yes.")
    for thinking, shown in (
        ({"type": "enabled", "budget_tokens": 1024}, "[thinking: True]"),
        ({"type": "disabled"}, "[thinking: False]"),
        ({"type": "adaptive", "display": "omitted"}, ""),
        (None, ""),
    ):
        ask(server, thinking=thinking)
        assert script.prompts[-1] == f"{shown}<user>|{QUESTION}|"
    ask(server, output_config={"effort": "low", "format": None}, chat_template_kwargs={"enable_thinking": 3})
    assert script.prompts[-1] == f"[thinking: 3][low]<user>|{QUESTION}|"


def test_what_the_server_was_told_holds_where_a_request_says_nothing(
    serving: Any, scripted: Any, with_tools: None
) -> None:
    script = scripted("Yes.")
    with serving(script, variables={"enable_thinking": False, "reasoning_effort": "low"}) as server:
        ask(server)
        assert script.prompts[-1] == f"[thinking: False][low]<user>|{QUESTION}|"
        ask(server, thinking={"type": "enabled", "budget_tokens": 1024})
        assert script.prompts[-1] == f"[thinking: True][low]<user>|{QUESTION}|"


def test_an_answer_that_is_begun_is_continued(server: Any, model: moe_local.Model) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "The router is"}]
    (block,) = ask(server, messages=begun, temperature=0)["content"]
    assert block["text"] == model.generate(begun, max_new_tokens=40, do_sample=False).text


def test_a_full_context_is_told_from_a_limit(server: Any, model: moe_local.Model) -> None:
    def said(words: int) -> list[Any]:
        return [{"role": "user", "content": " and" * words}]

    def count(words: int) -> int:
        return int(post(server, "/count_tokens", messages=said(words)).json()["input_tokens"])

    context = model.plan.request.context
    words = context - count(0) - 8
    room = context - count(words) + 1  # the last token is computed from a full context
    assert 4 < room < 12
    endless = {str(model.tokenizer.eos_token_id): -100}
    for limit, reason in [
        (room - 1, "max_tokens"),
        (room, "max_tokens"),
        (room + 1, "model_context_window_exceeded"),
    ]:
        whole = ask(server, messages=said(words), max_tokens=limit, logit_bias=endless)
        assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == (reason, min(limit, room))


def test_fields_of_a_beta_are_passed_over(anthropics: anthropic.Anthropic, server: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 2, "messages": ASKED}
    edits = {"edits": [{"type": "clear_tool_uses_20250919"}]}
    assert anthropics.beta.messages.create(**asked, context_management=edits, betas=["x-2026"]).content
    assert anthropics.beta.messages.count_tokens(
        model="demo", messages=ASKED, extra_body={"tomorrows": 1}
    ).input_tokens
    for path in ("", "/count_tokens"):
        reply = post(server, path, tomorrows=1)
        assert (reply.status_code, reply.json()["error"]["message"]) == (
            400,
            "unknown field 'tomorrows'; leave it out",
        )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": None}, "max_tokens is missing; give it"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number, 1 or more"),
        ({"max_tokens": "5"}, 'max_tokens is "5"; it should be a valid integer'),
        ({"stop_sequence": ["x"]}, "unknown field 'stop_sequence'; did you mean 'stop_sequences'"),
        ({"stop_sequences": [""]}, "a stop string is empty"),
        ({"top_p": 2}, "top_p is 2"),
        ({"messages": []}, "messages is empty; give at least 1"),
        ({"messages": ["x"]}, r"messages\[0\] is str; give an object with role"),
        ({"messages": [{"role": "tool", "content": ""}]}, r"messages\[0\] has the role 'tool'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is NoneType; give text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"content has a part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "this model takes text only"),
        (
            {"messages": [{"role": "user", "content": [PDF]}]},
            r"messages\[0\].content has a document of type 'base64'; this model takes text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{**NOTE, "citations": {"enabled": True}}]}]},
            "citations, which are not supported; leave them out",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}, "without input"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            r"messages\[0\].content has no tool_use_id",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]},
                        ],
                    }
                ]
            },
            r"messages\[0\].content.content has a part of type 'image'",
        ),
        ({"system": [{"type": "image"}]}, "system has a part of type 'image'"),
        ({"tools": [TOOL]}, "this model knows no tools"),
        ({"tools": [SEARCH]}, "'web_search_20250305', which Anthropic defines or runs"),
        ({"tools": [SEARCH, {"name": "weather"}]}, r"tools\[1\] has no name or no input_schema"),
        ({"tool_choice": {"type": "required"}}, "tool_choice of type 'required' is not supported"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": ["enabled"]}}, "thinking of type .* is not supported"),
        ({"output_config": {"effort": 3}}, "output_config.effort is 3; give a word"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format is no json_schema"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "prompt is too long: .* holds 2048"),
    ],
)
def test_what_is_refused(server: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as refused:
        body = {"max_tokens": 40, "messages": ASKED, **asked}
        claude(server).post("/v1/messages", body=body, cast_to=Message)
    assert refused.value.type == "invalid_request_error"
    assert "\n" not in str(refused.value.api_message)


def test_documents_of_text_are_shown() -> None:
    inner = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "B"}]}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [NOTE, inner]}
    said = [NOTE, {"type": "text", "text": "What does it say?"}]
    messages = [{"role": "user", "content": said}, {"role": "user", "content": [result]}]
    assert as_messages(as_items(messages)) == [
        {"role": "user", "content": "A title\nSome text.\nWhat does it say?"},
        {"role": "tool", "tool_call_id": "a", "content": "A title\nSome text.\nB"},
    ]


def test_the_list_of_models(anthropics: anthropic.Anthropic) -> None:
    """Beside OpenAI's: which one is wanted, a header says."""
    found = anthropics.models.list(limit=20)
    assert [(model.id, model.display_name, model.type) for model in found] == [
        ("demo", "demo", "model"),
        ("small-1", "small-1", "model"),
    ]
    assert (found.first_id, found.last_id, found.has_more) == ("demo", "small-1", False)
    one = anthropics.models.retrieve("small-1")
    assert one.model_dump() == found.data[1].model_dump()
    assert one.lifecycle == "active"
    assert abs((datetime.now(UTC) - one.created_at).total_seconds()) < 3600
    with pytest.raises(anthropic.NotFoundError, match="no model 'claude-5' here"):
        anthropics.models.retrieve("claude-5")


def test_errors_have_anthropics_shape_on_its_paths_only(
    serving: Any, server: Any, anthropics: anthropic.Anthropic
) -> None:
    with pytest.raises(
        anthropic.NotFoundError, match="no model 'claude-5' here; this server has 'demo'"
    ) as none:
        anthropics.messages.create(model="claude-5", max_tokens=2, messages=ASKED)
    assert none.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": none.value.api_message},
    }
    with pytest.raises(anthropic.NotFoundError, match="base URLs end in /v1, Anthropic's before it"):
        anthropics.with_options(base_url=f"{server.url}/v1").messages.create(
            model="demo", max_tokens=2, messages=ASKED
        )
    with serving(api_key="s3cret", body_bytes=2000) as guarded:
        for options in ({"api_key": "s3cret"}, {"api_key": None, "auth_token": "s3cret"}):
            known = claude(guarded, **options)
            assert known.messages.count_tokens(model="demo", messages=ASKED).input_tokens
        stranger = claude(guarded, api_key="s3crets")
        with pytest.raises(anthropic.AuthenticationError, match="or X-Api-Key: KEY") as unknown:
            stranger.messages.create(model="demo", max_tokens=2, messages=ASKED)
        assert unknown.value.type == "authentication_error"
        with pytest.raises(anthropic.RequestTooLargeError):
            known.messages.create(model="demo", max_tokens=2, system="x" * 3000, messages=ASKED)
        elsewhere = guarded.http.post(f"{guarded.url}/v1/chat/completions", json={})
        assert "type" not in elsewhere.json()


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BusyError("no turn came"), 429, "rate_limit_error"),
        (TransferError("the disk is gone"), 500, "api_error"),
    ],
)
def test_an_answer_that_fails_says_so(says: Any, error: MoeLocalError, status: int, kind: str) -> None:
    server, _ = says("Yes", error=error)
    expected = {"type": "error", "error": {"type": kind, "message": str(error)}}
    assert events(server)[-1] == expected
    whole = post(server)
    assert (whole.status_code, whole.json()) == (status, expected)
    with pytest.raises(anthropic.APIStatusError, match=str(error)):
        for _event in claude(server).messages.create(model="demo", max_tokens=2, messages=ASKED, stream=True):
            pass


def test_messages_of_blocks() -> None:
    def said(role: str, *blocks: Any) -> dict[str, Any]:
        return {"role": role, "content": list(blocks)}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    messages = [
        said("system", text("In German.")),
        said("user", text("Hi"), text("you")),
        {"role": "user", "content": "there"},
        said("assistant", {"type": "redacted_thinking", "data": "x"}, text("Yes.")),
        said("user", {"type": "tool_result", "tool_use_id": "a", "is_error": True}),
        said("assistant", {"type": "tool_use", "id": "b", "name": "f", "input": {"x": "ä"}}),
    ]
    call = {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"x": "ä"}'}}
    assert as_messages(as_items(messages), "Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nIn German."},
        {"role": "user", "content": "Hi\nyou\nthere"},
        {"role": "assistant", "content": "Yes."},
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
