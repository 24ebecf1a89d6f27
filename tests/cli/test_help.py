"""The help of every command has examples, and they can be typed as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moe_local.cli.main import COMMANDS, main

CONTEXT = click.Context(main, info_name="moe-local", **main.context_settings)
CHEAP = {"list", "show", "completion"}
"""Commands whose examples are run, too: they need no weights. (What fit says is in test_fit.py.)"""


def command(name: str) -> click.Command:
    found = main.get_command(CONTEXT, name)
    assert found is not None
    return found


def examples(help: str) -> list[list[str]]:
    """The words behind "moe-local" in each example, without what is the shell's."""
    block = re.search(r"\n *Examples?:\n((?: {2,}\S.*\n?)+)", help)
    lines = re.sub(r"\\\n\s*", "", block[1]).splitlines() if block else []
    shell = re.compile(r"^.*\| *(?=moe-local)| *[|<>].*$")
    return [shlex.split(shell.sub("", line))[1:] for line in lines if "moe-local" in line]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_typed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("A text file that examples name.")
    (tmp_path / "person.json").write_text('{"type": "object"}')
    found = examples(command(name).help or "")
    assert found, f"add an example to the help of {name}"
    for words in found:
        assert words[0] == name
        command(name).make_context(name, words[1:], parent=CONTEXT)


def test_examples_of_the_whole_can_be_typed() -> None:
    found = examples(main.help or "")
    assert found
    for first, *rest in found:
        command(first).make_context(first, rest, parent=CONTEXT)


@pytest.mark.parametrize("name", sorted(CHEAP))
def test_cheap_examples_do_something(name: str, invoke, home: Path) -> None:
    for words in examples(command(name).help or ""):
        result = invoke(*words)
        assert result.exit_code == 0, result.stderr
        assert result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_are_the_first_sentence_of_the_help(name: str) -> None:
    assert (command(name).help or "").split("\n\n")[0].replace("\n", " ") == COMMANDS[name][1]


def test_help_imports_no_command_and_nothing_slow() -> None:
    slow = "{'torch', 'transformers', 'rich', 'huggingface_hub', 'moe_local.cli.chat'}"
    code = f"""
import sys
from moe_local.cli.main import main
try: main(["--help"])
except SystemExit: print({slow} & {{*sys.modules}})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
    assert done.stdout.endswith("set()\n")
