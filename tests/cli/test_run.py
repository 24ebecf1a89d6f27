from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import moe_local
from moe_local.cache.errors import ModelNotFoundError, OptionError
from moe_local.cli import text_file
from support.chat_templates import DIALECTS, THINKING, tokenizer_of


def test_the_answer_is_all_of_stdout(invoke, fake, loads):
    result = invoke("run", "demo", "hello there", "--slots", "3", "--vram", "2GiB")
    assert result.exit_code == 0
    assert result.stdout == "1: HELLO THERE\n"
    assert result.stderr == ""
    assert loads == [("demo", {"vram": "2GiB", "slots": 3})]
    assert not fake.open


def test_json_is_one_document(invoke, fake):
    result = invoke("run", "demo", "hello there", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["text"] == "1: HELLO THERE"
    assert document["token_ids"] == [0, 1, 2]
    assert document["finish_reason"] == "stop"
    stats = document["stats"]
    assert {"ttft_s", "tokens_per_s", "hits", "misses", "stall_s", "prefetch"} <= set(stats)
    assert stats["prefetch"].items() >= {"issued": 4, "used": 2, "late": 1, "wasted_bytes": 2048}.items()
    assert (stats["hits"], stats["misses"], stats["stall_s"]) == (14, 2, 0.5)


THOUGHT = ["<thi", "nk>let me", " see</think>\n\n", "{", "}"]
MARKS = ["<|channel|>analysis<|message|>", "let me", " see<|end|><|start|>", "assistant<|channel|>final"]
MARKS += ["<|message|>", "{", "}", "<|return|>"]


@pytest.mark.parametrize(("dialect", "words"), [("hermes", THOUGHT), ("harmony", MARKS)])
def test_thoughts_are_kept_from_the_answer(invoke, fake, dialect, words):
    fake.tokenizer, fake.says = tokenizer_of(DIALECTS[dialect]), words
    result = invoke("run", "demo", "what?")
    assert result.stdout == "{}\n"
    assert "Thinking...\nlet me see\n...done thinking.\n" in result.stderr
    document = json.loads(invoke("run", "demo", "what?", "--json").stdout)
    assert (document["text"], document["reasoning"]) == ("{}", "let me see")
    assert invoke("run", "demo", "what?", "--raw").stdout == "".join(words) + "\n"
    assert "marks" not in fake.asked[-1][1]


def test_thoughts_and_other_variables_of_the_template(invoke, fake):
    fake.tokenizer = tokenizer_of(THINKING)
    for flags, given in (
        (["--no-think"], {"enable_thinking": False}),
        (["--think"], {"enable_thinking": True}),
        (["--chat-template-kwargs", '{"effort": "low"}'], {"effort": "low"}),
        (["--no-think", "--chat-template-kwargs", '{"enable_thinking": 1}'], {"enable_thinking": 1}),
    ):
        assert invoke("run", "demo", "what?", *flags).exit_code == 0
        assert fake.asked[-1][1]["chat_template_kwargs"] == given
    invoke("run", "demo", "what?")
    assert "chat_template_kwargs" not in fake.asked[-1][1]
    fake.tokenizer = tokenizer_of(DIALECTS["hermes"])
    result = invoke("run", "demo", "what?", "--no-think")
    assert result.exit_code == 2
    assert result.stderr == (
        "moe-local: thoughts cannot be turned off: this model's chat template has no enable_thinking, "
        "thinking or reasoning_effort that does; leave it to the model\n"
    )


@pytest.mark.parametrize(("given", "said"), [("[1]", "is no object of JSON"), ("{", "is not JSON")])
def test_variables_that_are_no_object(invoke, fake, given, said):
    result = invoke("run", "demo", "what?", "--chat-template-kwargs", given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize("arguments", [["run", "demo"], ["run", "demo", "-"]])
def test_the_prompt_from_stdin(invoke, fake, arguments):
    assert invoke(*arguments, input="two\nlines\n").stdout == "1: TWO LINES\n"
    assert fake.asked[0][0] == "two\nlines"


@pytest.mark.parametrize("command", ["run", "chat"])
def test_what_is_no_utf8_on_stdin_is_refused(invoke, fake, command):
    result = invoke(command, "demo", input=b"caf\xe9\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("moe-local: stdin is not text in UTF-8; encode it as UTF-8\n")
    assert not fake.asked


def test_what_the_locale_takes_for_utf8_is_refused_too(monkeypatch):
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(OptionError, match="not text in UTF-8"):
            text_file.read_stdin()


@pytest.mark.parametrize("command", ["run", "chat"])
def test_stdin_without_an_end_is_refused(invoke, fake, command, monkeypatch):
    monkeypatch.setattr(text_file, "LONGEST", 2 << 20)
    result = invoke(command, "demo", input="a" * (3 << 20))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "stdin has 2 MiB or more" in result.stderr
    assert not fake.asked


@pytest.mark.parametrize(
    ("prompt", "piped", "what"),
    [
        ([], "", "the prompt on stdin"),
        ([], " \n", "the prompt on stdin"),
        (["-"], "", "the prompt on stdin"),
        ([""], "piped", "PROMPT"),
        (["  "], "piped", "PROMPT"),
        (["\n", "--raw"], "piped", "PROMPT"),
    ],
)
def test_no_prompt(invoke, fake, prompt, piped, what):
    result = invoke("run", "demo", *prompt, input=piped)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"moe-local: {what} is empty" in result.stderr
    assert not fake.asked


def test_sampling_flags_reach_the_model(invoke, fake):
    invoke(
        *["run", "demo", "hi", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1"],
        *["--seed", "7", "--max-tokens", "3"],
    )
    assert fake.asked == [
        (
            "hi",
            {
                "template": True,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.1,
                "seed": 7,
                "max_new_tokens": 3,
            },
        )
    ]


@pytest.mark.parametrize("command", [["run", "no-such-model", "hi"], ["chat", "no-such-model"]])
@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--temperature", "-1", "--temperature is -1.0; it must be a number, 0 or more"),
        ("--temperature", "nan", "--temperature is nan; it must be a number, 0 or more"),
        ("--top-p", "1.5", "--top-p is 1.5; it must be a number, from 0 to 1"),
        ("--top-k", "-1", "--top-k is -1; it must be a whole number, 0 or more"),
        ("--min-p", "2", "--min-p is 2.0; it must be a number, from 0 to 1"),
        ("--max-tokens", "0", "--max-tokens is 0; it must be a whole number, 1 or more"),
        (
            "--seed",
            str(10**23),
            f"--seed is {10**23}; it must be a whole number, from {-(2**63)} to {2**63 - 1}",
        ),
    ],
)
def test_sampling_is_checked_before_the_model_is_looked_for(invoke, command, flag, value, said):
    result = invoke(*command, flag, value)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"moe-local: {said}\n")


def test_what_is_not_given_is_left_to_the_model(invoke, fake, loads):
    invoke("run", "demo", "hi")
    assert fake.asked == [("hi", {"template": True})]
    assert loads == [("demo", {})]


def test_system_and_raw(invoke, fake):
    invoke("run", "demo", "hi", "--system", "Be brief.")
    invoke("run", "demo", "hi", "--raw")
    system = {"role": "system", "content": "Be brief."}
    assert fake.asked[0][0] == [system, {"role": "user", "content": "hi"}]
    assert fake.asked[1] == ("hi", {"template": False})


def test_ctrl_c_keeps_what_was_said(invoke, fake):
    fake.failure, fake.fails_at = KeyboardInterrupt(), 2
    result = invoke("run", "demo", "hello there")
    assert result.exit_code == 130
    assert result.stdout == "1: HELLO\n"
    assert not fake.open


def test_ctrl_c_prints_no_half_document(invoke, fake):
    fake.failure, fake.fails_at = KeyboardInterrupt(), 2
    result = invoke("run", "demo", "hello there", "--json")
    assert result.exit_code == 130
    assert result.stdout == ""


def test_an_unknown_model_offers_near_ones(invoke, home):
    result = invoke("run", "mixtrl-8x7b", "hi")
    assert result.exit_code == ModelNotFoundError.exit_code == 4
    assert result.stderr.startswith("moe-local: model 'mixtrl-8x7b' not found")
    assert "did you mean mixtral-8x7b" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--vram", "8GiB", "--device", "cpu"], 2, "vram is given but the device is cpu"),
        (["--ram", "lots"], 2, "ram 'lots' is not a size"),
        (["--slots", "1"], 2, "slots 1 is below the 2 experts"),
        (["--policy", "best"], 2, "use one of lru"),
        (["--ram", "200KiB"], 3, "does not fit"),
    ],
)
def test_bad_values_with_a_real_model(invoke, home, tiny_mixtral, flags, code, said):
    result = invoke("run", str(tiny_mixtral), "hi", *flags)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert result.stderr.startswith("moe-local: ")


def test_a_real_model_from_conversion_to_answer(invoke, home, tiny_mixtral):
    arguments = ["run", str(tiny_mixtral), "hello", "-n", "12", "--temperature", "0", "--json"]
    whole = json.loads(invoke(*arguments).stdout)
    assert len(whole["token_ids"]) == 12 or whole["finish_reason"] == "stop"
    assert whole["stats"]["misses"] == 0
    few = json.loads(invoke(*arguments, "--slots", "2", "--prefetch", "off").stdout)
    assert few["token_ids"] == whole["token_ids"]
    assert few["stats"]["misses"] > 0
    assert few["stats"]["bytes"]["disk"] > 0


def test_an_answer_that_the_context_cuts_off_says_so(invoke, home, tiny_mixtral):
    arguments = ["run", str(tiny_mixtral), "a b c d", "--raw", "--temperature", "0", "--context", "16"]
    for flags in ([], ["--json"], ["-n", "100"]):
        result = invoke(*arguments, *flags)
        assert result.exit_code == 0
        assert len(result.stderr.splitlines()) == 1
        assert re.fullmatch(
            r"the answer is cut off: \d+ tokens of prompt and \d+ of answer fill the context of 16; "
            r"raise --context, \d+ at most\n",
            result.stderr,
        )
    assert invoke(*arguments, "-n", "1").stderr == ""


def test_a_prompt_longer_than_the_tokenizer_knows_is_one_line(invoke, home, tiny_mixtral, tmp_path, caplog):
    folder = shutil.copytree(tiny_mixtral, tmp_path / "short")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 32}))
    result = invoke("run", str(folder), "word " * 500, "--context", "64")
    assert result.exit_code == 2
    assert "the context holds 64" in result.stderr
    assert "sequence length" not in result.stderr + caplog.text


def test_a_damaged_checkpoint_is_one_line(invoke, home, tiny_mixtral, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_mixtral, folder)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    result = invoke("run", str(folder), "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("moe-local: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_sigint_to_the_real_command(long_mixtral, endless, tmp_path):
    """Exit code 130 and no trace, wherever in start-up or answer it comes."""
    environment = {**os.environ, "MOE_LOCAL_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "moe_local.cli", "run", str(long_mixtral), "hi", *endless]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(1)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 130
    assert b"Traceback" not in errors


def test_json_of_a_schema(invoke, tmp_path):
    file = tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"topic": {"enum": ["cache", "router"]}}, "required": ["topic"]}
    file.write_text(json.dumps({**schema, "additionalProperties": False}))
    result = invoke("run", "demo", "What is a router?", "--json-schema", str(file), "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["topic"] in ("cache", "router")
    file.write_text('{"type": "objekt"}')
    result = invoke("run", "demo", "What is a router?", "--json-schema", str(file), "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "moe-local: this schema or grammar cannot be enforced: Invalid type: objekt\n"


@pytest.mark.parametrize(
    ("says", "shown", "message"),
    [
        (
            ["<think>", "Hm, it"],
            "",
            "the thought is cut off after 512 tokens, and there is no whole JSON; raise --max-tokens, or "
            "turn thoughts off with --no-think where the model can\n",
        ),
        (
            ["<think>", "Hm.", "</think>", '{"a"'],
            '{"a"\n',
            "the JSON is cut off after 512 tokens, and there is no whole JSON; raise --max-tokens\n",
        ),
    ],
)
def test_json_that_a_limit_cuts_off_says_so(invoke, fake, tmp_path, says, shown, message):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}')
    fake.says, fake.finish_reason = says, "length"
    result = invoke("run", "demo", "hello", "--json-schema", str(file))
    assert (result.exit_code, result.stdout) == (0, shown)
    assert result.stderr.endswith(f"\n{message}")
    result = invoke("run", "demo", "hello", "--json-schema", str(file), "--json")
    assert json.loads(result.stdout)["finish_reason"] == "length"
    assert result.stderr == message
    assert not invoke("run", "demo", "hello", "--json").stderr


def test_a_chat_template_of_ones_own(invoke, tmp_path, monkeypatch):
    """With a mark at its beginning, as some editors write it; the demo has learned its own template only."""
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ eos_token }}\n", encoding="utf-8-sig")
    monkeypatch.setenv("MOE_LOCAL_CHAT_TEMPLATE", str(file))
    result = invoke("run", "demo", "What is", "--json", "-n", "1", "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    with moe_local.load("demo", device="cpu") as model:
        prompt = [*model.tokenizer("What is")["input_ids"], model.tokenizer.eos_token_id]
    assert json.loads(result.stdout)["stats"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("command", [("run", "demo", "hello"), ("chat",), ("serve", "demo")])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n{% for m in messages %}", "mine.jinja is no template in Jinja: line 2: Unexpected end of"),
        (b" \n", "the chat template is empty: "),
        (b"# Read me\n", "mine.jinja has no place for messages: '# Read me"),
        (b"\xff{{ messages }}", "mine.jinja cannot be read as text: it is not UTF-8; save it as UTF-8"),
        (None, "mine.jinja' does not exist"),
    ],
)
def test_files_that_hold_no_chat_template(invoke, fake, loads, tmp_path, command, content, message):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    result = invoke(*command, "--chat-template", str(file))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not loads


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "schema.json is not valid JSON: "),
        ("[]", 'schema.json holds no JSON schema; give an object, such as {"type": "object"}'),
        (" \n", "the JSON schema is empty: "),
        (b"\xff\xfe", "schema.json cannot be read as text: it is not UTF-8"),
    ],
)
def test_files_that_hold_no_schema(invoke, fake, tmp_path, content, message):
    file = tmp_path / "schema.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("run", "demo", "hello", "--json-schema", str(file))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not fake.asked
