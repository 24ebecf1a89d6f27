from __future__ import annotations

import subprocess
import sys

import click
import pytest

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.cli import other_names
from moe_local.cli.main import COMMANDS, EXIT_CODES, main


def test_version(invoke):
    assert invoke("--version").stdout == f"moe-local {moe_local.__version__}\n"


def test_without_arguments_it_is_the_help(invoke):
    result, help = invoke(), invoke("--help").stdout
    assert result.output == help
    assert help.count("\n") > len(COMMANDS)
    assert result.exit_code in (0, 2)  # by the release of click


def test_an_unknown_command_offers_the_nearest(invoke):
    result = invoke("chta")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "moe-local: no command 'chta'; did you mean chat?\n"


def test_an_unknown_command_like_no_other(invoke):
    result = invoke("xyzzy")
    assert result.exit_code == 2
    assert "there are bench, calibrate, chat, completion, convert, " in result.stderr


def test_help_is_a_command_too(invoke):
    assert invoke("help").stdout == invoke("--help").stdout
    assert invoke("help", "run").stdout == invoke("run", "--help").stdout
    assert "did you mean run" in invoke("help", "rnu").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ps"], "no command 'ps'; did you mean list?"),
        (["version"], "no command 'version'; did you mean --version?"),
        (["serve", "--model", "demo"], "no option --model; MODEL is given without a flag; see "),
        (["run", "demo", "-p", "hi"], "no option -p; PROMPT is given without a flag, behind MODEL; see "),
        (["chat", "--n-gpu-layers=9"], "no option --n-gpu-layers; experts are placed by themselves, in as "),
        (["chat", "--temp", "1"], "no option --temp; it is --temperature here; see "),
        (["list", "--temp", "1"], "no option --temp; see "),
        (["chat", "--json"], "no option --json; see "),
        (["chat", "--modle", "demo"], "no option --modle; see "),
        (["chat", "--no-thinking"], "no option --no-thinking; did you mean --no-think?; see "),
        (["bench", "--repeat", "9"], "no option --repeat; did you mean --repeats?; see "),
    ],
)
def test_what_is_typed_in_other_programs_is_understood(invoke, arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert ("here" in result.stderr) == ("here" in said)


def test_every_name_of_another_program_stands_for_one_of_ours():
    assert {*other_names.COMMANDS.values()} <= {*COMMANDS, "--version"}
    context = click.Context(main)
    known = {param.name for name in COMMANDS for param in main.get_command(context, name).params}
    assert {name for _, name, _ in other_names._FLAGS} <= known


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "demo", "--no-such"], ["chat", "--slots", "many"], ["fit"], ["--no-such"]]
)
def test_wrong_usage_is_one_line_and_2(invoke, arguments):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("moe-local: ")
    assert result.stderr.count("\n") == 1
    assert "--help" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MoeLocalError("it broke\nbadly"), 1, "moe-local: it broke badly\n"),
        (RuntimeError("a bug"), 1, "moe-local: RuntimeError: a bug (--debug shows where)\n"),
        (OSError(5, "I/O error"), 1, "moe-local: OSError: [Errno 5] I/O error (--debug shows where)\n"),
        (
            OSError(28, "No space left"),
            1,
            "moe-local: the output cannot be written: its disk is full; free some of it\n",
        ),
    ],
)
def test_errors_are_one_line(invoke, monkeypatch, error, code, line):
    def load(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(moe_local, "load", load, raising=False)
    result = invoke("run", "demo", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)


@pytest.mark.parametrize("arguments", [["--debug", "run", "demo", "hi"], ["run", "demo", "hi", "--debug"]])
def test_debug_shows_the_trace_of_this_call_only(invoke, monkeypatch, arguments):
    def load(*arguments: object, **options: object) -> None:
        raise MoeLocalError("it broke")

    monkeypatch.setattr(moe_local, "load", load, raising=False)
    result = invoke(*arguments)
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("moe-local: it broke\n")
    assert invoke("run", "demo", "hi").stderr == "moe-local: it broke\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [("80x", "'80x' is not a valid whole number; see "), ("99999", "99999 is not in the range 0<=x<=")],
)
def test_whole_numbers(invoke, given, said):
    assert said in invoke("serve", "demo", "--port", given).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a folder that is in use")
def test_a_current_folder_that_was_removed(tmp_path):
    shell = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m moe_local.cli run demo hello'
    command = ["sh", "-c", shell, sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    said = "moe-local: the current folder: No such file or directory; change to one that is there\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_ctrl_c_is_130(invoke, monkeypatch):
    def load(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moe_local, "load", load, raising=False)
    result = invoke("run", "demo", "hi")
    assert (result.exit_code, result.stderr.strip()) == (130, "")


def test_every_error_class_has_a_documented_exit_code():
    codes = {code for code, _ in EXIT_CODES}
    for error in [MoeLocalError, *MoeLocalError.__subclasses__()]:
        assert error.exit_code in codes


def test_every_flag_that_is_no_switch_has_a_variable():
    context = click.Context(main)
    for name in main.list_commands(context):
        for parameter in main.get_command(context, name).params:
            if not isinstance(parameter, click.Option) or parameter.is_flag or parameter.name == "out":
                continue
            assert parameter.envvar == f"MOE_LOCAL_{str(parameter.name).upper()}", (name, parameter.name)
            assert parameter.show_envvar


def test_a_variable_sets_a_flag_and_the_flag_wins(invoke, fake, loads, monkeypatch):
    monkeypatch.setenv("MOE_LOCAL_RAM", "3GiB")
    monkeypatch.setenv("MOE_LOCAL_SEED", "5")
    invoke("run", "demo", "hi")
    invoke("run", "demo", "hi", "--ram", "4GiB")
    assert [options for _, options in loads] == [{"ram": "3GiB"}, {"ram": "4GiB"}]
    assert fake.asked[0][1]["seed"] == 5


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['chat', '--help']\nfrom moe_local.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
