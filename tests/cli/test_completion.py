"""Completion: the shells' scripts, and what they are answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from moe_local.cli.completion import PROGRAM, SHELLS, VARIABLE
from moe_local.cli.main import COMMANDS, main


def complete(*words: str) -> list[str]:
    """What is offered for the last of the words."""
    shell = ShellComplete(main, {}, PROGRAM, VARIABLE)
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def test_commands_and_flags() -> None:
    assert complete("c") == [name for name in sorted(COMMANDS) if name.startswith("c")]
    assert complete("--v") == ["--version"]
    assert "--vram" in complete("chat", "--v")
    assert complete("completion", "") == list(SHELLS)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"completion", "list"}))
def test_every_model_is_completed(name: str) -> None:
    parameters = {p.name for p in main.get_command(click.Context(main), name).params}
    if "model" in parameters:
        assert complete(name, "DEM") == ["demo"]
        assert complete(name, "mixtral-8x7") == ["mixtral-8x7b"]


def test_a_model_in_the_hub_cache_is_completed(home: Path) -> None:
    hub = home.parent / "hub"
    for repo, config in (
        ("some--moe-model", '{"num_experts": 8}'),
        ("some--dense", '{"hidden_size": 8}'),
        ("some--broken", "{"),
        ("mistralai--Mixtral-8x7B-Instruct-v0.1", '{"num_local_experts": 8}'),  # has an alias
    ):
        folder = hub / f"models--{repo}" / "snapshots" / "0"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
    assert complete("run", "some") == ["some/moe-model"]
    assert complete("run", "mistralai") == ["mistralai"]  # left to the shell, which completes files


def test_what_no_name_begins_with_is_a_file() -> None:
    shell = ShellComplete(main, {}, PROGRAM, VARIABLE)
    assert [item.type for item in shell.get_completions(["chat"], "./models/m")] == ["file"]


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts(shell: str, invoke) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert f"{VARIABLE}={shell}_complete" in result.stdout.replace("_COMPLETE ", "_COMPLETE=")
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_a_model(tmp_path: Path, invoke) -> None:
    """The script and the command together, as at a press of Tab."""
    command = tmp_path / PROGRAM
    command.write_text(f"#!{sys.executable}\nfrom moe_local.cli.main import main\nmain()\n")
    command.chmod(0o755)
    (tmp_path / "script").write_text(invoke("completion", "bash").stdout)
    pressed = "source script; COMP_WORDS=(moe-local chat mixtral-8x7); COMP_CWORD=2; "
    pressed += '_moe_local_completion moe-local; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", pressed], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "mixtral-8x7b\n", done.stderr


def test_completing_a_model_imports_nothing_slow() -> None:
    code = """
import sys
from moe_local.cli.main import main
from click.shell_completion import ShellComplete
found = ShellComplete(main, {}, "moe-local", "").get_completions(["chat"], "mixtral-8x7")
print(found[0].value, {"torch", "transformers"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "mixtral-8x7b set()\n"
