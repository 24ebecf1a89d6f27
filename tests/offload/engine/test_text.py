"""Prompts into ids, and ids into text that is final piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.text import Detokenizer, encode_prompt
from moe_local.offload.engine.token_bytes import TokenBytes
from support import tiny_models
from support.small_tokenizers import BYTES, PIECES, sentencepiece_like

TEXTS = [
    "plain words, with  two spaces ",
    "  leading spaces",
    "emoji 😀👩‍👩‍👧‍👦 and 你好,世界 and é, नमस्ते",
    "🇩🇪🏳️‍🌈",
    "tab\tand\nline\r\n\n",
    "",
    " ",
]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return tiny_models.tiny_tokenizer()


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, byte_level: Any) -> Any:
    return byte_level if request.param == "byte-level" else sentencepiece_like(request.param == "metaspace")


def pieces_of(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token) for token in ids], detokenizer.flush()


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    """The text as one token a byte."""
    ids: list[int] = tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in text.encode()])
    return ids


def test_marks_stand_in_the_text(tokenizer: Any) -> None:
    """Others of the special tokens do not. Behind each a new text begins, whatever stood before it."""
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>"))
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ids = [token for part in parts for token in (*part, start, end)]
    detokenizer = Detokenizer(tokenizer, ["</s>"])
    text = "".join(map(detokenizer.add, ids)) + detokenizer.flush()
    assert text == "".join(f"{tokenizer.decode(part, skip_special_tokens=True)}</s>" for part in parts)
    with pytest.raises(OptionError, match="'the' of marks is no special token"):
        Detokenizer(tokenizer, ["the"])
    for wrong in ("</s>", 2):
        with pytest.raises(OptionError, match=f"marks is {wrong!r}; give a list of special tokens"):
            Detokenizer(tokenizer, wrong)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_whole(tokenizer: Any, data: st.DataObject) -> None:
    """Any ids at all: broken bytes, special tokens, lone spaces."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=25))
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_text_comes_through_whole(byte_level: Any, text: str) -> None:
    ids = byte_level(text)["input_ids"]
    pieces, rest = pieces_of(byte_level, ids)
    assert "".join(pieces) + rest == byte_level.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces), "half a character was given out"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_byte_tokens_between_words(data: st.DataObject) -> None:
    """Runs of byte tokens, valid or not, cut by words and by special tokens."""
    fallback = sentencepiece_like(metaspace=False)
    words = [fallback.convert_tokens_to_ids(piece) for piece in PIECES]
    part = st.one_of(
        st.sampled_from(["é", "你", "😀", "a"]).map(lambda text: byte_ids(fallback, text)),
        st.sampled_from(words).map(lambda token: [token]),
        st.sampled_from([[2], [3 + 0xFF], [3 + 0xE4]]),
    )
    ids = [token for run in data.draw(st.lists(part, max_size=12)) for token in run]
    pieces, rest = pieces_of(fallback, ids)
    assert "".join(pieces) + rest == fallback.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(byte_level: Any, text: str) -> None:
    ids = byte_level(text)["input_ids"]
    pieces, rest = pieces_of(byte_level, ids)
    assert "".join(pieces) + rest == text
    assert "\ufffd" not in "".join(pieces)
    assert rest == ""


def test_text_is_not_held_back_without_need(byte_level: Any) -> None:
    pieces, _ = pieces_of(byte_level, byte_level("the expert router 😀 learned")["input_ids"])
    emoji = next(index for index, piece in enumerate(pieces) if "😀" in piece)
    assert all(pieces[:emoji][:-3]), "every word came at once"
    assert all(pieces[emoji:])


def test_an_unfinished_character_comes_with_the_flush(byte_level: Any) -> None:
    ids = byte_level("ok 😀")["input_ids"][:-1]
    pieces, rest = pieces_of(byte_level, ids)
    assert "".join(pieces) == "ok "
    assert rest == byte_level.decode(ids)[3:]
    assert set(rest) == {"\ufffd"}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bytes_of_tokens_add_up_to_the_whole(tokenizer: Any, data: st.DataObject) -> None:
    """Of any tokens that are whole characters together, special ones and halves of characters among them."""
    known = TokenBytes(tokenizer)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=25))
    try:
        joined = b"".join(known.of(token) for token in ids).decode()
    except UnicodeDecodeError:
        return
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert joined in (decoded, f" {decoded}")


@pytest.mark.parametrize("text", TEXTS)
def test_every_byte_of_a_text_is_some_tokens(tokenizer: Any, text: str) -> None:
    known = TokenBytes(tokenizer)
    ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        if BYTES[0] not in tokenizer.get_vocab()
        else (byte_ids(tokenizer, text))
    )
    assert b"".join(known.of(token) for token in ids) == text.encode()


def test_bytes_of_one_token(byte_level: Any) -> None:
    llama = TokenBytes(sentencepiece_like(False))
    named = llama._tokenizer.convert_tokens_to_ids
    for name, expected in {"▁the": " the", "s": "s", "▁": " ", "▁▁": "  ", "</s>": "</s>", "é": "é"}.items():
        assert llama.of(named(name)) == expected.encode()
    assert llama.of(named("<0xE4>")) == b"\xe4"
    assert llama.of(named("\ufffd")) == "\ufffd".encode()
    half = TokenBytes(byte_level)
    assert [half.of(token) for token in byte_level("😀")["input_ids"]] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert half.of(byte_level.convert_tokens_to_ids("<|end|>")) == b"<|end|>"
    assert (
        half.of(len(byte_level) + 3) == llama.of(9999) == b""
    )  # a matrix has more rows than there are names


def test_a_flushed_detokenizer_starts_anew(byte_level: Any) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level("the 😀")["input_ids"]
    for _ in range(2):
        assert "".join(detokenizer.add(token) for token in ids) == "the 😀"
        assert detokenizer.flush() == ""


def test_the_window_does_not_grow(byte_level: Any) -> None:
    detokenizer = Detokenizer(byte_level)
    for token in byte_level("the experts that the model has learned to trust " * 20)["input_ids"]:
        detokenizer.add(token)
        assert len(detokenizer._window) <= 8


@pytest.mark.parametrize("run", ["special", "broken", "broken after a word", "no name", "between", "words"])
def test_the_cost_of_a_token_does_not_grow(tokenizer: Any, run: str) -> None:
    """Whatever it is, and however many are alike."""
    byte = (
        byte_ids(tokenizer, "é")[1] if BYTES[0] in tokenizer.get_vocab() else tokenizer("é")["input_ids"][1]
    )
    special, word = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("s")
    ids = {
        "special": [special] * 100,
        "broken": [byte] * 100,
        "broken after a word": [word, *[byte] * 100],
        "no name": [9999] * 100,
        "between": [byte, special] * 50,
        "words": [word] * 100,
    }[run]
    decoded: list[int] = []

    class Counting:
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids: list[int], **options: Any) -> Any:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **options)

    pieces, rest = pieces_of(Counting(), ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(decoded) <= 12 * len(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_long_runs_of_broken_characters_add_up_to_the_whole(tokenizer: Any, data: st.DataObject) -> None:
    """Of bytes that begin and go on with characters, and of replacement characters."""
    if BYTES[0] in tokenizer.get_vocab():
        several = [*byte_ids(tokenizer, "é你😀"), *tokenizer.convert_tokens_to_ids(["\ufffd", "▁", "s"])]
    else:
        several = [*tokenizer("é你😀\ufffds")["input_ids"], tokenizer.eos_token_id]
    ids = data.draw(st.lists(st.sampled_from(several), max_size=60))
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_not_shown(byte_level: Any) -> None:
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.add(byte_level.eos_token_id) + detokenizer.flush() == ""


def test_a_string_is_one_user_turn(byte_level: Any) -> None:
    text = "<|user|>hi<|end|><|assistant|>"
    assert byte_level.decode(encode_prompt(byte_level, "hi")) == text
    assert byte_level.decode(encode_prompt(byte_level, "hi", template=False)) == "hi"


def test_conversations(byte_level: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    brief = {"role": "system", "content": "be brief"}
    assert byte_level.decode(encode_prompt(byte_level, [brief, *messages])) == (
        "<|system|>be brief<|end|><|user|>a<|end|><|assistant|>b"
    )
    assert byte_level.decode(encode_prompt(byte_level, [*messages, {"role": "user", "content": "c"}])) == (
        "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    )
    assert byte_level.decode(encode_prompt(byte_level, messages)) == "<|user|>a<|end|><|assistant|>b"


def test_a_content_of_parts_is_their_text(byte_level: Any) -> None:
    parts = [{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}]
    messages = [{"role": "user", "content": parts, "name": "x"}]
    assert byte_level.decode(encode_prompt(byte_level, messages)) == "<|user|>Why so?<|end|><|assistant|>"
    assert messages[0]["content"] is parts, "what was given stays as it is"


def test_ids_pass_unchanged(byte_level: Any) -> None:
    assert encode_prompt(None, [5, 6, 7]) == [5, 6, 7]
    assert encode_prompt(None, torch.tensor([5, 6])) == [5, 6]
    assert encode_prompt(byte_level, torch.tensor([[5, 6]])) == [5, 6]


def test_a_tokenizer_without_a_template_continues_text() -> None:
    plain = sentencepiece_like(metaspace=False)
    assert encode_prompt(plain, "é") == plain("é")["input_ids"]
    with pytest.raises(
        OptionError, match="a conversation needs a chat template, and this tokenizer has none"
    ):
        encode_prompt(plain, [{"role": "user", "content": "hi"}])


MIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)


def test_what_a_template_refuses_is_one_line() -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.chat_template = MIXTRAL_TEMPLATE
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "<s>hi"
    with pytest.raises(
        OptionError, match=r"refuses a conversation of system, user: .*must alternate"
    ) as caught:
        encode_prompt(tokenizer, [{"role": "system", "content": "b"}, {"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([{"role": "user"}], {}, "message 0 has no content; give text"),
        ([{"content": "a"}], {}, "message 0 has no role"),
        ([{"role": "user", "content": 5}], {}, "the content of message 0 is 5; give text"),
        (["hi"], {}, "0 of the prompt is 'hi'"),
        ([{"role": "user", "content": "a"}, 5], {}, "1 of the prompt is 5"),
        ([{"role": "user", "content": "a"}], {"template": False}, "template=False turns it off"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {},
            "0 has a part of type 'image' without text; this",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "of type 'text' without text"),
        ([{"role": "user", "content": ["a"]}], {}, "message 0 has a part of type 'str'"),
        (torch.tensor([[1], [2]]), {}, r"shape \[2, 1\]"),
        (torch.tensor([0.5]), {}, "float32"),
    ],
)
def test_bad_prompts(byte_level: Any, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        encode_prompt(byte_level, prompt, **options)


QUESTION = {"role": "user", "content": "Rain?"}
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools is 'weather'; give a list of"),
        (TOOL, "tools is {'type': 'function', .*; give a list of"),
        (iter([TOOL]), "tools is <list_iterator .*; give a list of"),
        ([print], r"tools\[0\] is <built-in function print>; tools are functions here, as {\"type\""),
        ([TOOL, {"name": "f"}], r"tools\[1\] is {'name': 'f'}; tools are"),
        ([{"type": "web_search", "function": {"name": "f"}}], r"tools\[0\] is {'type': 'web_search', "),
        ([{"type": "function", "function": {}}], r"function of tools\[0\] has no name; give it one"),
        ([{"function": {"name": ""}}], r"function of tools\[0\] has no name; give it one"),
        (
            [{"function": {"name": "f", "parameters": [1]}}],
            r"parameters of tools\[0\] are \[1\]; give a JSON",
        ),
        ([TOOL], "knows no tools: its chat template has no place for them; leave them out"),
    ],
)
def test_tools_that_a_model_cannot_be_told_of(byte_level: Any, tools: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        encode_prompt(byte_level, [QUESTION], tools=tools)
    assert "\n" not in str(caught.value)


def test_tools_of_a_tokenizer_with_several_templates() -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    plain, knowing = "{{ messages[0].content }}", "{{ tools[0].function.name }}"
    tokenizer.chat_template = {"default": plain, "tool_use": knowing}
    assert tokenizer.decode(encode_prompt(tokenizer, [QUESTION], tools=[TOOL])) == "weather"
    tokenizer.chat_template = {"default": plain, "rag": knowing}
    with pytest.raises(OptionError, match="knows no tools"):
        encode_prompt(tokenizer, [QUESTION], tools=[TOOL])
    tokenizer.chat_template = {"rag": plain}
    with pytest.raises(
        OptionError, match=r"refuses a conversation of user: .* multiple chat templates"
    ) as caught:
        encode_prompt(tokenizer, [QUESTION], tools=[TOOL])
    assert "\n" not in str(caught.value)


def test_no_tools_are_as_good_as_none(byte_level: Any) -> None:
    assert encode_prompt(byte_level, [QUESTION], tools=[]) == encode_prompt(byte_level, [QUESTION])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([{"name": "f", "arguments": "{}"}], "1 has the tool call {'name': 'f', .*; give calls as {\"id\""),
        (["f"], "message 1 has the tool call 'f'; give calls as"),
        ([{"function": {"arguments": "{}"}}], "message 1 has the tool call .*; give calls as"),
        ({"function": {"name": "f"}}, "the tool_calls of message 1 are {'function': .*; give a list of"),
        ([{"function": {"name": "f", "arguments": 3}}], "message 1 has the arguments 3; give an object"),
    ],
)
def test_earlier_calls_that_are_none(byte_level: Any, calls: Any, message: str) -> None:
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(OptionError, match=message):
        encode_prompt(byte_level, [QUESTION, said, QUESTION])


def test_calls_at_the_end_want_results(byte_level: Any) -> None:
    """Continuing such a message would drop its calls, which templates write behind the content."""
    said = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(OptionError, match="ends with calls of tools; give their results"):
        encode_prompt(byte_level, [QUESTION, said])


@pytest.mark.parametrize("variables", [["enable_thinking"], "x", {1: True}])
def test_variables_have_names(byte_level: Any, variables: Any) -> None:
    with pytest.raises(OptionError, match=r"chat_template_kwargs is .*; give a dict of variables by their"):
        encode_prompt(byte_level, [QUESTION], variables=variables)


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
def test_text_needs_a_tokenizer(prompt: Any) -> None:
    with pytest.raises(
        OptionError, match=r"has no tokenizer; put its tokenizer\.json there, or give the prompt as"
    ):
        encode_prompt(None, prompt)
