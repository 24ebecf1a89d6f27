"""README's blocks are run in their order, and what they are said to print is compared.

Stand-ins, only for what a test cannot have: installing (the packaging tests do it), a network and a GPU, so
that `mixtral-8x7b` is a tiny Mixtral in a folder, without --vram, where its weights are needed. The server
has a free port. Figures differ from machine to machine: numbers in what is measured stand for any number.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from moe_local.cli.main import main
from moe_local.offload.checkpoint.registry import ALIASES
from moe_local.offload.modeling.transformers_release import WORKS
from moe_local.offload.quantize.codec import NATIVE, codecs

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROSE = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.M | re.S)


class Block(NamedTuple):
    language: str
    text: str


def blocks() -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.M | re.S)]


BLOCKS = blocks()


def block(start: str) -> str:
    """The one block that begins like this."""
    (found,) = [b.text for b in BLOCKS if b.text.startswith(start)]
    return found


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was ever run, but for the blocks above."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.getbasetemp() / "readme-home"))


def invoke(words: list[str], input: str | None = None) -> Result:
    result = CliRunner().invoke(main, words, input=input)
    assert result.exit_code in (0, 3), result.stderr
    return result


def pattern(shown: str) -> re.Pattern[str]:
    """Of what is shown as output: "..." in a line of its own stands for any lines."""
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\s*\n" for line in shown.splitlines()]
    return re.compile("".join(lines))


def any_number(shown: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "0", shown)


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """Commands behind "$ " and what is shown behind each."""
    text = text.replace("\\\n", "")
    return ((command, shown) for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M))


def test_every_block_is_one_that_is_run() -> None:
    """A new block fails here until a test below runs it."""
    known = (
        *("pip install . &&", "pip install '.[test]' &&", ">>> hello", "$ moe-local fit", "import moe_local"),
        *("moe-local chat mixtral", "$ moe-local serve", "An expert is a small", "$ moe-local bench"),
    )
    assert [b.text.splitlines()[0] for b in BLOCKS if not b.text.startswith(known)] == []
    assert all(any(b.text.startswith(start) for b in BLOCKS) for start in known)


def test_installing_names_a_command_and_a_module_that_are_there() -> None:
    assert block("pip install . &&").strip() == "pip install . && moe-local chat"
    assert main.get_command(main.make_context("moe-local", ["--help"], resilient_parsing=True), "chat")
    assert block("pip install '.[test]'").strip().endswith("&& python -m pytest")


def test_the_conversation() -> None:
    text = block(">>> hello")
    said = re.findall(r"^>>> (.*)\n(.*)\n", text, re.M)
    assert len(said) == text.count(">>> ")
    result = invoke(["chat"], input="".join(f"{question}\n" for question, _ in said))
    answers = [line for line in result.stdout.splitlines() if line]
    assert answers == [answer for _, answer in said]
    status = re.escape(any_number(text.splitlines()[-1]))
    assert re.search(status.replace("0", r"[\d.]+"), result.stderr)


@pytest.mark.parametrize(
    ("command", "shown"),
    [s for b in BLOCKS if b.text.startswith("$ moe-local fit") for s in sessions(b.text)],
)
def test_fit(command: str, shown: str) -> None:
    result = invoke(shlex.split(command)[1:])
    assert pattern(shown).fullmatch(result.stdout + result.stderr), result.output


def test_the_commands(tiny_mixtral: Path) -> None:
    """Line by line; what is piped into a chat is a user who says hello."""
    for line in block("moe-local chat mixtral").splitlines():
        words = shlex.split(line, comments=True)[1:]
        if "mixtral-8x7b" in words:
            words[words.index("mixtral-8x7b")] = str(tiny_mixtral)
            if "--vram" in words:
                at = words.index("--vram")
                words = words[:at] + words[at + 2 :]
        assert invoke(words, input="hello\n").stdout.strip()


def test_python() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(block("import moe_local"), "README.md", "exec"), {"__name__": "__main__"})
    said, shown = (any_number(text).splitlines() for text in (out.getvalue(), block("An expert is a small")))
    assert said[-2] in ("off", "trying", "on"), "what prefetch has found out by then is the machine's"
    said[-2] = shown[-2]
    assert said == shown


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server(tmp_path: Path) -> None:
    (serve, shown), (ask, _) = sessions(block("$ moe-local serve"))
    command = [sys.executable, "-m", "moe_local.cli", *shlex.split(serve)[1:], "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            port = re.findall(r":(\d+)/", line)[0]
            assert line == shown.replace("8000", port)
            words = shlex.split(ask.replace("8000", port))
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
            assert "The router" in done.stdout
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bench() -> None:
    """Heading and tables are as shown; the rows' figures are the machine's."""
    ((command, shown),) = sessions(block("$ moe-local bench"))
    output = invoke(shlex.split(command)[1:]).stdout
    words = {line.split("  ")[0].split(" of ")[0] for line in shown.splitlines() if line != "..."}
    for word in words:
        start = any_number(word)
        assert any(any_number(line).startswith(start) for line in output.splitlines()), word


def test_models_and_formats_are_those_of_the_package() -> None:
    count, families = map(int, re.findall(r"(\d+) by name, of (\d+) families", PROSE)[0])
    rows = re.findall(r"^\| ([^|]+) \| `", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert (count, families) == (len(ALIASES), len(set(rows)))
    (formats,) = re.findall(r"^\| Expert formats \| (.*)$", PROSE, re.M)
    assert set(re.findall(r"`(\w+)`", formats)) == {*codecs(), NATIVE}


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch, transformers = (d for d in project["dependencies"] if re.match(r"torch\b|transformers\b", d))
    lowest, highest = re.fullmatch(r"torch>=([\d.]+),<=([\d.]+)", torch).groups()  # type: ignore[union-attr]
    least = re.match(r"transformers>=([\d.]+)", transformers).group(1)  # type: ignore[union-attr]
    newest = WORKS.split()[-1]
    assert f"(PyTorch {highest} and {lowest}, transformers {newest} and {least})" in PROSE.replace("\n", " ")
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in PROSE


def test_what_was_measured_is_in_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text().replace("**", "")
    found = re.findall(r"(\d+\.\d+) (\(\d+\.\d+ to \d+\.\d+)", PROSE)
    assert found
    for ratio, interval in found:
        assert f"{ratio} {interval}" in page, ratio


def test_no_gpu_has_a_figure_without_a_committed_run() -> None:
    runs = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    unmeasured = "| on any GPU | not measured | not measured |" in PROSE
    assert unmeasured == (not any(name.startswith("gpu") for name in runs))
