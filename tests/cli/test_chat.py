from __future__ import annotations

import os
import sys
import time

import pexpect
import pytest

from moe_local.cache.errors import MoeLocalError, OptionError


def test_a_conversation_from_a_pipe(invoke, fake):
    """The whole transcript: answers on stdout without decoration, status lines on stderr."""
    result = invoke("chat", input="hello there\n\nand you\n/exit\nnever\n")
    assert result.exit_code == 0
    assert result.stdout == "1: HELLO THERE\n2: AND YOU\n"
    status = "4.0 tok/s | first token 0.25 s | 87.5 % hits | stall 166.7 ms/token | 3 tokens"
    assert result.stderr == f"{status}\n{status}\n"
    assert not fake.open


def test_the_conversation_is_kept(invoke, fake):
    invoke("chat", "--system", "Be brief.", input="one\ntwo\n")
    messages, _ = fake.asked[-1]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1: ONE"},
        {"role": "user", "content": "two"},
    ]


def test_clear_forgets_all_but_the_system_prompt(invoke, fake):
    result = invoke("chat", "--system", "Be brief.", input="one\n/clear\ntwo\n")
    assert result.stdout == "1: ONE\nForgotten.\n1: TWO\n"
    assert [message["role"] for message in fake.asked[-1][0]] == ["system", "user"]


@pytest.mark.parametrize("leave", ["/exit", "/bye", "/quit"])
def test_ways_to_leave(invoke, fake, leave):
    assert invoke("chat", input=f"{leave}\nmore\n").exit_code == 0
    assert fake.asked == []


def test_help_stats_and_unknown_commands(invoke, fake):
    result = invoke("chat", input="/help\n/stats\n/foo bar\n")
    assert result.exit_code == 0
    assert result.stdout == (
        "  /help   this list\n"
        "  /clear  forget the conversation\n"
        "  /stats  what the cache has done and holds; /stats live: while tokens come\n"
        "  /exit   leave, as do /bye, /quit and Ctrl-D\n"
        '  """     begins and ends a message of several lines\n'
        "  Ctrl-C  stops an answer\n"
        "  tokens     10\n"
        "  hits       87.5 % (14 of 16 experts needed)\n"
        "  evictions  3\n"
        "  prefetch   4 issued, 2 used, 1 late, 2.00 KiB wasted; "
        "on, 2 layers ahead: +3.10 ms/token (+2.75 to +3.50) gained by it\n"
        "  read       0 B from disk, 0 B to the GPU\n"
        "  stall      0.50 s\n"
        "  starved    0 experts under 1 % of their layer's tokens\n"
        "   0 ·□··\n"
        "   1 ···▒\n"
        "     · absent □ resident ▒ loading ■ used × missed\n"
        f"         disk {40 * '█'}    50.00 ms\n"
        "unknown command /foo; /help lists the commands\n"
    )
    assert fake.asked == []


@pytest.mark.parametrize(
    ("typed", "content"),
    [
        ('"""one\ntwo"""\n', "one\ntwo"),
        ('"""\none\n\n  two\n"""\n', "one\n\n  two"),
        ('"""one line"""\n', "one line"),
        ('"""never closed\nbut over\n', "never closed\nbut over"),
        ('"""/exit is text here\n"""\n', "/exit is text here"),
    ],
)
def test_messages_of_several_lines(invoke, fake, typed, content):
    invoke("chat", input=typed)
    assert fake.asked[0][0][-1]["content"] == content


def test_an_answer_that_ran_out_of_tokens_says_so(invoke, fake, fake_module):
    fake.finish_reason = fake_module.FinishReason.LENGTH
    result = invoke("chat", "-n", "3", input="hello there\n")
    assert result.stderr.endswith("| 3 tokens | cut off\n")
    assert fake.asked[0][1] == {"max_new_tokens": 3}


def test_a_refused_message_is_not_kept(invoke, fake):
    fake.refusal = OptionError("the prompt has 9000 tokens, the context holds 8192")
    result = invoke("chat", input="long\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "moe-local: the prompt has 9000 tokens, the context holds 8192\n"


def test_an_error_in_an_answer_ends_the_answer_only(invoke, fake):
    fake.failure, fake.fails_at = MoeLocalError("an expert is damaged"), 2
    result = invoke("chat", input="hello there\nagain\n")
    assert result.exit_code == 0
    assert "moe-local: an expert is damaged" in result.stderr
    assert fake.streams[0].closed
    assert fake.asked[1][0][:2] == [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "1: HELLO"},
    ]


def test_ctrl_c_in_a_pipe_ends_everything(invoke, fake):
    fake.failure, fake.fails_at = KeyboardInterrupt(), 1
    result = invoke("chat", input="hello there\nagain\n")
    assert result.exit_code == 130
    assert result.stdout == "1:"
    assert len(fake.asked) == 1
    assert not fake.open


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
class TestOnATerminal:
    """The real command in a pseudo-terminal, with a model that takes 0.2 s for a word."""

    @pytest.fixture
    def spawn(self, tmp_path):
        """spawn(*arguments of python) -> a pseudo-terminal with it."""
        children = []
        environment = {**os.environ, "MOE_LOCAL_HOME": str(tmp_path / "home"), "TERM": "dumb"}

        def start(*arguments: str) -> pexpect.spawn:
            child = pexpect.spawn(
                sys.executable,
                list(arguments),
                timeout=100,
                encoding="utf-8",
                codec_errors="replace",
                env=environment,
                dimensions=(24, 200),
            )
            children.append(child)
            return child

        yield start
        for child in children:
            child.close(force=True)

    def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(self, spawn, fake_model_file):
        terminal = spawn(str(fake_model_file), "chat")
        terminal.expect_exact("fake: /help lists the commands, Ctrl-D leaves.")
        terminal.expect_exact(">>> ")
        terminal.sendline("one two three four five six seven eight nine ten")
        terminal.expect_exact("1: ONE TWO")
        terminal.sendintr()
        terminal.expect(r"\d+ tokens \| stopped")
        terminal.expect_exact(">>> ")
        terminal.sendline("more")
        terminal.expect_exact("2: MORE")  # the stopped answer was kept
        terminal.expect_exact(">>> ")
        terminal.sendintr()
        terminal.expect_exact("Ctrl-D or /exit leaves.")
        terminal.sendline('"""a')
        terminal.expect_exact("... ")
        terminal.sendline('b"""')
        terminal.expect_exact("3: A B")
        terminal.expect_exact(">>> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0

    def test_ctrl_c_in_the_middle_of_a_token_of_a_real_model(self, spawn, tiny_mixtral):
        """Misses, prefetches and reads from disk are under way when it comes; the model stays usable."""
        flags = ["--slots", "2", "--temperature", "0", "-n", "3000", "--ram", "100MiB", "--context", "4000"]
        terminal = spawn("-m", "moe_local.cli", "chat", str(tiny_mixtral), *flags)
        for wait in (0.0, 0.13):
            terminal.expect_exact(">>> ")
            terminal.sendline("hello")
            terminal.expect_exact("hello\r\n")  # the terminal's echo
            terminal.expect(r"[^\s]")  # the answer has begun
            time.sleep(wait)
            terminal.sendintr()
            terminal.expect(r"(\d+) tokens? \| stopped")
            assert int(terminal.match[1]) < 3000
        terminal.expect_exact(">>> ")
        terminal.sendline("/stats")
        terminal.expect(r"hits +\d+\.\d % \(\d+ of \d+ experts needed\)")
        terminal.expect_exact(">>> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
        assert "Traceback" not in terminal.before
