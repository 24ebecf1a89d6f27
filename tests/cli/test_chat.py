from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import click
import pexpect
import pytest

import moe_local
from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.chat import Chat
from moe_local.cli.options import Sampling
from support import fake_model
from support.chat_templates import DIALECTS, THINKING, tokenizer_of


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


def test_stats_and_cache(invoke, fake, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("chat", input="/stats\n/cache\n")
    assert result.exit_code == 0
    assert result.stdout == (
        "  tokens     10\n"
        "  hits       87.5 % (14 of 16 experts needed)\n"
        "  evictions  3\n"
        "  prefetch   4 issued, 2 used, 1 late, 2.00 KiB wasted; "
        "on, 2 layers ahead: +3.10 ms/token (+2.75 to +3.50) gained by it\n"
        "  read       0 B from disk, 0 B to the GPU\n"
        "  stall      0.50 s\n"
        "  starved    0 experts under 1 % of their layer's tokens\n"
        f"         disk {40 * '█'}    50.00 ms\n"
        "   0 ·□··\n"
        "   1 ···▒\n"
        "     · absent □ resident ▒ loading ■ used × missed\n"
        f"         disk {40 * '█'}    50.00 ms\n"
    )
    assert fake.asked == []


def test_help_names_every_command_and_key(invoke, fake):
    lines = invoke("chat", input="/?\n").stdout.splitlines()
    assert all(line.startswith("  ") for line in lines)
    named = {line.split()[0] for line in lines}
    commands = ("retry", "clear", "history", "system", "set", "show", "save", "load", "model", "cache")
    commands += ("stats", "multiline", "help", "bye")
    assert named == {*(f"/{name}" for name in commands), '"""', "Ctrl-C", "Ctrl-D", "Ctrl-R"}


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


def test_an_answer_that_ran_out_of_tokens_says_so(invoke, fake):
    fake.finish_reason = "length"
    result = invoke("chat", "-n", "3", input="hello there\n")
    assert result.stderr.endswith("| 3 tokens | cut off at max_tokens\n")
    fake.fills_context = True
    result = invoke("chat", input="hello there\n")
    assert "cut off: the context is full" in " ".join(result.stderr.split())
    assert fake.asked[0][1] == {"max_new_tokens": 3}


def test_a_refused_message_is_not_kept(invoke, fake):
    fake.refusal = OptionError("the prompt has 9000 tokens, the context holds 8192")
    result = invoke("chat", input="long\n")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "moe-local: the prompt has 9000 tokens, the context holds 8192\n"


def shown(fake) -> list[str]:
    """What was said in the last prompt."""
    return [message["content"] for message in fake.asked[-1][0]]


def test_a_conversation_beyond_the_context_goes_on_without_its_oldest_exchanges(fake, capsys):
    chat = a_chat(fake, system="Be brief.")
    chat.verbose = False
    fake.plan.request.context = 20  # 5 of them for the answer
    for message in ("one", "two"):  # each is one word, and its answer two
        chat.answer(message)
    assert shown(fake) == ["Be brief.", "one", "1: ONE", "two"]
    chat.answer("a message of nine words, which fills the rest")
    assert shown(fake)[:2] == ["Be brief.", "two"]
    left_out = "left out the oldest exchanges, {}: the context holds 20 tokens\n"
    assert capsys.readouterr().err == left_out.format("1 of 2")
    chat.retry()
    assert shown(fake)[:2] == ["Be brief.", "two"]
    assert capsys.readouterr().err == left_out.format("1 of 2")
    chat.answer("on")
    assert shown(fake) == ["Be brief.", "on"]
    assert capsys.readouterr().err == left_out.format("3 of 3")
    assert [turn["content"] for turn in chat.turns if turn["role"] == "user"] == [
        *("one", "two", "a message of nine words, which fills the rest", "on")
    ]


def test_as_few_exchanges_as_needed_are_left_out(fake):
    chat = a_chat(fake)
    fake.plan.request.context = 60  # 15 of them for the answer
    for number in range(30):
        chat.answer(f"{number}")
        exchanges = min(number, (60 - 15 - 1) // 3)
        assert len(shown(fake)) == 2 * exchanges + 1
    chat.sampling = Sampling(max_tokens=3)  # an answer of which no more is asked for needs no more room
    chat.answer("last")
    assert len(shown(fake)) == 2 * ((60 - 3 - 1) // 3) + 1


def test_a_message_that_does_not_fit_by_itself_is_an_error(fake, capsys):
    chat = a_chat(fake)
    chat.verbose = False
    chat.answer("one")
    fake.plan.request.context = 4
    capsys.readouterr()
    chat.answer("five words are too many")
    assert capsys.readouterr().err == "moe-local: the prompt has 5 tokens, the context holds 4\n"
    assert [turn["content"] for turn in chat.turns] == ["one", "1: ONE"]
    chat.answer("four words just fit")  # with less room than there should be
    assert shown(fake) == ["four words just fit"]


def test_a_saved_conversation_beyond_the_context_is_kept_whole(invoke, fake, home):
    fake.plan.request.context = 8
    invoke("chat", input="one\ntwo\nthree\n/save long\n")
    result = invoke("chat", input="/load long\n/history\nfour\n")
    assert result.stdout.startswith("Loaded 6 messages.\nuser: one\nassistant: 1: ONE\nuser: two\n")
    assert shown(fake) == ["three", "2: THREE", "four"]


def test_an_error_in_an_answer_ends_the_answer_only(invoke, fake):
    fake.failure, fake.fails_at = MoeLocalError("an expert is damaged"), 2
    result = invoke("chat", input="hello there\nagain\n")
    assert result.exit_code == 1
    assert "moe-local: an expert is damaged" in result.stderr
    assert fake.streams[0].closed
    assert fake.asked[1][0][:2] == [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "1: HELLO"},
    ]


def test_one_message_that_failed_is_told_by_the_exit_code(invoke, fake):
    """The others are answered all the same."""
    fake.plan.request.context = 8
    result = invoke("chat", input="one\na b c d e f g h i\ntwo\n")
    assert result.exit_code == 1
    assert result.stdout == "1: ONE\n2: TWO\n"
    assert result.stderr.count("moe-local: the prompt has") == 1


def test_ctrl_c_in_a_pipe_ends_everything(invoke, fake):
    fake.failure, fake.fails_at = KeyboardInterrupt(), 1
    result = invoke("chat", input="hello there\nagain\n")
    assert result.exit_code == 130
    assert result.stdout == "1:\n"
    assert len(fake.asked) == 1
    assert not fake.open


def test_retry_asks_the_same_again_in_place_of_the_answer(invoke, fake):
    result = invoke("chat", "--seed", "7", input="/retry\none\ntwo\n/retry\n/retry\n")
    assert result.stdout == "nothing was asked yet\n1: ONE\n2: TWO\n2: TWO\n2: TWO\n"
    assert [options["seed"] for _, options in fake.asked] == [7, 7, 8, 9]
    assert len({str(messages) for messages, _ in fake.asked[1:]}) == 1


def test_the_lowest_seed_follows_the_highest(invoke, fake):
    invoke("chat", "--seed", str(2**63 - 1), input="one\n/retry\n")
    assert [options["seed"] for _, options in fake.asked] == [2**63 - 1, -(2**63)]


def test_a_retry_that_fails_leaves_the_answer_there_was(fake, capsys):
    chat = a_chat(fake)
    chat.answer("one")
    fake.failure = MoeLocalError("the disk is gone")
    assert chat.retry()
    assert [turn["content"] for turn in chat.turns] == ["one", "1: ONE"]
    fake.failure = None
    assert chat.retry()
    assert [turn["content"] for turn in chat.turns] == ["one", "1: ONE"]


def test_a_message_refused_before_is_what_retry_asks(invoke, fake):
    fake.failure = MoeLocalError("the disk is gone")
    result = invoke("chat", input="one\n/retry\n")
    assert result.stderr.count("the disk is gone") == 2
    assert fake.asked[0] == fake.asked[1]


def test_settings(invoke, fake):
    typed = "/set temperature 0.5\n/set parameter num_predict 9\n/set seed default\nhi\n"
    invoke("chat", "--seed", "1", input=typed)
    assert fake.asked[-1][1] == {"temperature": 0.5, "max_new_tokens": 9}


def test_thoughts_are_turned_off_and_on(invoke, fake, home):
    fake.tokenizer = tokenizer_of(THINKING)
    invoke("chat", input="/set nothink\nhi\n/save mine\n")
    assert fake.asked[-1][1] == {"chat_template_kwargs": {"enable_thinking": False}}
    invoke("chat", input="/load mine\nhi\n")
    assert fake.asked[-1][1] == {"chat_template_kwargs": {"enable_thinking": False}}
    result = invoke("chat", "--no-think", input="/set think\nhi\n/set think default\n/set\nhi\n")
    assert [options for _, options in fake.asked[-2:]] == [
        {"chat_template_kwargs": {"enable_thinking": True}},
        {},
    ]
    assert "Whether it thinks is the model's own choice." in result.output
    assert re.search(r"think +default \(the model's own\)", result.output)
    fake.tokenizer = None
    result = invoke("chat", input="/set nothink\nhi\n")
    assert "thoughts cannot be turned off" in result.stderr
    assert fake.asked[-1][1] == {}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set temperature hot", "temperature is 'hot'; give a number, or default"),
        ("/set seed 1.5", "seed is '1.5'; give a whole number, or default"),
        ("/set temprature 1", "unknown parameter 'temprature'; did you mean temperature?"),
        ("/set seed", "seed needs a value; default leaves it to the model"),
        ("/set temprature", "unknown parameter 'temprature'; did you mean temperature?"),
        ("/save", "/save needs a name"),
        ("/save ../up", "'../up' cannot name a conversation"),
        ("/load nothing", "no conversation is saved as 'nothing'; /save NAME saves one"),
        ("/cache fast", "/cache fast is unknown; there are /cache and /cache live"),
        ("/cache live", "/cache live draws on a terminal, and stdout is not one"),
        ("/multiline", "/multiline needs a terminal that can edit"),
        ("/model nosuch", "nosuch"),
        ("/foo bar", "unknown command /foo; there are /retry, /clear, /history, /system, /set, /show"),
        ("/cach", "unknown command /cach; did you mean /cache?"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(invoke, fake, home, typed, said):
    result = invoke("chat", input=f"{typed}\nstill there\n")
    assert result.exit_code == 1
    first = result.stderr.splitlines()[0]
    assert first.startswith("moe-local: ")
    assert said in first
    assert result.stdout.endswith("1: STILL THERE\n")
    assert fake.asked[-1][1] == {}


def test_variables_of_the_template_are_shown(invoke, fake):
    result = invoke("chat", "--chat-template-kwargs", '{"effort": "größer"}', input="/set\n")
    assert re.search(r'chat_template_kwargs +{"effort": "größer"}\n', result.stdout)


def test_a_setting_out_of_range_is_not_kept(fake, capsys):
    chat = a_chat(fake)
    chat.do("/set num_predict 0")
    assert capsys.readouterr().err == "moe-local: max_tokens is 0; it must be a whole number, 1 or more\n"
    assert chat.sampling.max_tokens is None


def test_the_system_prompt_can_be_changed_and_removed(invoke, fake):
    result = invoke(
        "chat", input='/system\n/system "Be brief."\none\n/set system Be long.\ntwo\n/system ""\nx\n'
    )
    assert result.stdout.startswith("no system prompt; /system TEXT sets one\nSystem prompt set.\n1: ONE\n")
    systems = [messages[0] for messages, _ in fake.asked]
    assert [message["content"] for message in systems] == ["Be brief.", "Be long.", "one"]


def test_switches(invoke, fake):
    result = invoke(
        "chat", input="/set quiet\none\n/set nohistory\ntwo\n/set history\nthree\n/set verbose\nx\n"
    )
    assert result.stderr.count("tok/s") == 1
    assert [len(messages) for messages, _ in fake.asked] == [1, 1, 5, 7]


def test_show_says_what_lies_where(invoke, fake):
    fake.plan = moe_local.fit("demo", ram="4GiB", device="cpu")
    result = invoke("chat", "--temperature", "0.5", input="/show\n")
    assert "MoE layers" in result.stdout
    assert "temperature  0.5\n" in result.stdout


def test_saved_conversations_go_on(invoke, fake, home):
    invoke("chat", "--system", "Be brief.", "--top-k", "5", input="one\n/save mine\n/save other\n")
    result = invoke("chat", input="/load\n/load mine\n/history\n/retry\ntwo\n")
    assert result.stdout == (
        "mine\nother\nLoaded 2 messages.\nsystem: Be brief.\nuser: one\nassistant: 1: ONE\n1: ONE\n2: TWO\n"
    )
    messages, options = fake.asked[-1]
    assert [message["content"] for message in messages] == ["Be brief.", "one", "1: ONE", "two"]
    assert options == {"top_k": 5}


def wanted(name):
    """A model that is here, so that nobody is asked."""


class TestSwitchingModels:
    def test_frees_the_old_one_first(self, fake, home):
        new = fake_model.FakeModel()
        chat = Chat(
            fake, Sampling(), lambda name: new if not fake.open else pytest.fail("both at once"), wanted
        )
        chat.answer("one")
        chat.do("/model demo")
        chat.answer("two")
        assert [message["content"] for message in new.asked[0][0]] == ["one", "1: ONE", "two"]

    def test_an_unknown_one_leaves_it(self, fake, home, capsys):
        chat = a_chat(fake)
        chat.do("/model no-such-model")
        assert fake.open
        assert "no-such-model" in capsys.readouterr().err

    def test_a_chat_template_is_for_the_model_it_came_with(
        self, invoke, fake, loads, home, tmp_path, tiny_mixtral
    ):
        (tmp_path / "mine.jinja").write_text("{{ messages }}")
        folder, flags = str(tiny_mixtral), ("--chat-template", str(tmp_path / "mine.jinja"), "--slots", "2")
        result = invoke("chat", folder, *flags, input=f"/model demo\n/model {folder}\n")
        assert result.exit_code == 0, result.stderr
        mine, other = {"chat_template": "{{ messages }}", "slots": 2}, {"slots": 2}
        assert loads == [(folder, mine), ("demo", other), (folder, mine)]

    def test_one_that_is_not_wanted_after_all_leaves_it(self, fake, home, capsys):
        def no(name):
            assert name == "demo"
            raise click.Abort

        chat = Chat(fake, Sampling(), lambda name: pytest.fail(f"loads {name}"), no)
        assert chat.do("/model demo")
        assert chat.model is fake
        assert fake.open
        assert capsys.readouterr().out == "not loaded\n"

    def test_one_that_cannot_be_loaded_brings_the_old_one_back(self, fake, home, capsys):
        again = fake_model.FakeModel()

        def load(name):
            if name == "demo":
                raise MoeLocalError("no room for demo")
            assert name == "fake"
            return again

        chat = Chat(fake, Sampling(), load, wanted)
        chat.do("/model demo")
        assert chat.model is again
        assert "moe-local: no room for demo" in capsys.readouterr().err

    def test_even_if_neither_can_be_loaded_the_chat_lives_on(self, fake, home, capsys):
        def load(name):
            raise MoeLocalError(f"no room for {name}")

        chat = Chat(fake, Sampling(), load, wanted)
        assert chat.do("/model demo")
        said = capsys.readouterr().err
        assert "no room for demo; and fake cannot be loaded again: no room for fake" in said


THOUGHT = ["<thi", "nk>\nlet me", " see</th", "ink>\n\n", "forty", " two"]
MARKS = ["<|channel|>", "analysis", "<|message|>", "let me", " see", "<|end|>", "<|start|>", "assistant"]
MARKS += ["<|channel|>", "final", "<|message|>", "forty", " two", "<|return|>"]


@pytest.mark.parametrize(("dialect", "words"), [("hermes", THOUGHT), ("harmony", MARKS)])
def test_thoughts_are_kept_from_the_answer(invoke, fake, dialect, words):
    fake.tokenizer, fake.says = tokenizer_of(DIALECTS[dialect]), words
    result = invoke("chat", input="what?\nagain?\n")
    assert result.stdout == "forty two\nforty two\n"
    assert "Thinking...\nlet me see\n...done thinking.\n" in result.stderr
    assert fake.asked[1][0][1] == {"role": "assistant", "content": "forty two"}
    assert set(words) & set(DIALECTS[dialect].special) == {*fake.asked[0][1].get("marks", ())} & set(words)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/dev/full", "moe-local: the output cannot be written: its disk is full; free some of it\n"),
        (None, ""),
    ],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full")
def test_output_that_cannot_be_written_ends_the_chat(out, said):
    """Otherwise `yes | moe-local chat | head` would go on for ever."""
    if out is None:
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(out, os.O_WRONLY)
    with open(writing, "wb") as stdout:
        command = [sys.executable, fake_model.__file__, "chat"]
        done = subprocess.run(
            command, input="one\ntwo\n", stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100
        )
    assert (done.returncode, done.stderr) == (1, said)


def test_an_unforeseen_error_is_a_line_too(invoke, fake):
    fake.failure = RuntimeError("CUDA error:\n  out of memory")
    result = invoke("chat", input="one\ntwo\n")
    assert result.exit_code == 1
    assert result.stderr.count("moe-local: RuntimeError: CUDA error: out of memory\n") == 2


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/hi", {"/history"}),
        ("/set te", {"temperature"}),
        ("/load m", {"mine"}),
        ("/model dem", {"demo"}),
        ("/cache ", {"live"}),
        ("no /hi", set()),
        ("/hi\nthere", set()),
        ("/system b", set()),
    ],
)
def test_commands_and_what_follows_them_are_completed(fake, home, capsys, typed, offered):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from moe_local.cli.chat_commands import Commands
    from moe_local.cli.editor import CommandCompleter

    chat = a_chat(fake)
    chat.do("/save mine")
    found = CommandCompleter(Commands(chat).words).get_completions(Document(typed), CompleteEvent())
    assert {completion.text for completion in found} == offered


def a_chat(model, **settings):
    """A conversation with a model that cannot be had a second time."""
    return Chat(model, Sampling(**settings), lambda name: pytest.fail(f"loads {name}"), wanted)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
class TestOnATerminal:
    """The real command in a pseudo-terminal, with a model that takes 0.2 s for a word."""

    @pytest.fixture
    def spawn(self, tmp_path):
        """spawn(*arguments of python) -> a pseudo-terminal with it."""
        children = []
        environment = {**os.environ, "MOE_LOCAL_HOME": str(tmp_path / "home"), "TERM": "dumb"}

        def start(*arguments: str, **variables: str) -> pexpect.spawn:
            child = pexpect.spawn(
                sys.executable,
                list(arguments),
                timeout=100,
                encoding="utf-8",
                codec_errors="replace",
                env={**environment, **variables},
                dimensions=(24, 200),
            )
            children.append(child)
            return child

        yield start
        for child in children:
            child.close(force=True)

    @pytest.mark.slow
    def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(self, spawn):
        terminal = spawn(fake_model.__file__, "chat")
        terminal.expect_exact("fake: /help lists the commands, Ctrl-D leaves.")
        terminal.expect_exact(">>> ")
        terminal.sendline("one two endlessly")
        terminal.expect_exact("1: ONE TWO")
        terminal.sendintr()
        terminal.expect(r"\d+\s+tokens\s+\|\s+stopped")
        terminal.expect_exact(">>> ")
        terminal.sendline("more")
        terminal.expect_exact("2: MORE")  # the stopped answer was kept
        terminal.expect_exact(">>> ")
        terminal.sendintr()
        terminal.expect_exact("Ctrl-D or /bye leaves, and so does Ctrl-C once more.")
        terminal.sendline('"""a')
        terminal.expect_exact("... ")
        terminal.sendline('b"""')
        terminal.expect_exact("3: A B")
        terminal.expect_exact(">>> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0

    def test_a_real_terminal_edits_and_remembers(self, spawn, tmp_path):
        terminal = spawn(fake_model.__file__, "chat", TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
        terminal.expect_exact(">>>")
        terminal.send("on\x1b[Do\x1b[F two\x1b\rthree\r")  # o-on, then to the end; Alt-Enter
        terminal.expect_exact("1: OON TWO THREE")
        terminal.expect_exact(">>>")
        terminal.send("/history\r")
        terminal.expect_exact("assistant: 1: OON TWO THREE")
        terminal.expect_exact(">>>")
        terminal.send("one two endlessly\r")
        terminal.expect_exact("2: ONE TWO")
        terminal.sendintr()
        terminal.expect_exact("stopped")
        terminal.expect_exact(">>>")
        terminal.send("three\x1a\r")  # Ctrl-Z stops the process, where a shell is there to do it
        terminal.expect_exact("3: THREE")
        terminal.expect_exact(">>>")
        terminal.sendintr()
        terminal.expect_exact("Ctrl-C once more")
        terminal.expect_exact(">>>")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
        history = tmp_path / "home" / "chat" / "history"
        assert history.stat().st_mode & 0o777 == 0o600
        assert "+oon two\n+three\n" in history.read_text()
        assert "\x1a" not in history.read_text()

    @pytest.mark.slow
    def test_what_is_typed_beside_an_answer_does_not_stand_in_it(self, spawn):
        """And is what the next prompt begins with. A Ctrl-C is not shown, either."""
        terminal = spawn(fake_model.__file__, "chat", TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
        terminal.expect_exact(">>>")
        terminal.send("one two three four\r")
        terminal.expect_exact("1: ONE")
        terminal.send("typed endlessly\r")
        terminal.expect_exact("tokens")
        assert "typed" not in terminal.before
        terminal.expect_exact("2: TYPED")
        terminal.sendintr()
        terminal.expect_exact("stopped")
        assert "^C" not in terminal.before
        terminal.expect_exact(">>>")
        terminal.send("/bye\r")
        terminal.expect(pexpect.EOF)

    @pytest.mark.slow
    def test_ctrl_c_in_the_middle_of_a_token_of_a_real_model(self, spawn, long_mixtral, endless):
        """Misses, prefetches and reads from disk are under way when it comes; the model stays usable."""
        flags = ["--slots", "2", "--temperature", "0", "--ram", "200MiB", *endless]
        terminal = spawn("-m", "moe_local.cli", "chat", str(long_mixtral), *flags)
        for wait in (0.0, 0.13):
            terminal.expect_exact(">>> ")
            terminal.sendline("hello")
            terminal.expect_exact("hello\r\n")  # the terminal's echo
            terminal.expect(r"[^\s]")  # the answer has begun
            time.sleep(wait)
            terminal.sendintr()
            terminal.expect(r"(\d+)\s+tokens?\s+\|\s+stopped")
            assert int(terminal.match[1]) < 60000
        terminal.expect_exact(">>> ")
        terminal.sendline("/stats")
        terminal.expect(r"hits +\d+\.\d % \(\d+ of \d+ experts needed\)")
        terminal.expect_exact(">>> ")
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert terminal.exitstatus == 0
        assert "Traceback" not in terminal.before
