from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from moe_local.cli import markdown
from moe_local.cli.answer import printable
from moe_local.cli.markdown import MarkdownStream, split_blocks

TEXT = """\
# Heading

A paragraph with *emphasis*
over two lines.

1. one
2. two
   - nested

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):

    return x
```
> quote

the end"""


def test_blocks_end_where_the_next_begins():
    blocks, tail = split_blocks(TEXT)
    assert [block.split("\n")[0] for block in blocks] == [
        *("# Heading", "A paragraph with *emphasis*", "1. one", "| a | b |", "```python")
    ]
    assert tail == "> quote\n\nthe end"
    assert "".join(blocks) + tail == TEXT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "one\ntwo",
        "```\n# no heading\n\nno paragraph\n",
        "- one\n\n2",  # may become another item
        "1. one\n\n2",
        "Title\n=",
    ],
)
def test_a_block_that_may_go_on_is_kept(text):
    assert split_blocks(text) == ([], text)


@pytest.mark.parametrize("seed", range(20))
def test_however_it_is_cut_the_blocks_are_the_same(seed):
    chance = random.Random(seed)
    expected, rest = split_blocks(TEXT)
    blocks, tail = [], ""
    at = 0
    while at < len(TEXT):
        step = chance.randint(1, 9)
        found, tail = split_blocks(tail + TEXT[at : at + step])
        blocks += found
        at += step
    found, tail = split_blocks(tail)
    assert ([block.strip() for block in blocks + found], tail) == ([b.strip() for b in expected], rest)


class Screen:
    """Enough of a terminal to see what stands on it: text, lines, moves up, erased lines."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        import re

        for escape, code, char in re.findall(r"(\x1b\[([0-9;?]*)[A-Za-z])|([\s\S])", text):
            if escape.endswith("A"):
                self.row -= int(code or 1)
                assert self.row >= 0
            elif escape.endswith("K"):
                self.lines[self.row] = ""
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append("")
            elif char == "\r":
                self.column = 0
            elif char:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n")


def streamed(pieces: list[str], height: int = 30) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=60, height=height, color_system=None, soft_wrap=True
    )
    with MarkdownStream(console) as stream:
        for piece in pieces:
            stream.add(piece)
    screen = Screen()
    screen.write(out.getvalue())
    return screen.text


@pytest.fixture(autouse=True)
def unthrottled(monkeypatch):
    """Draw after every piece."""
    monkeypatch.setattr(markdown, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "SHARE", 0)


@pytest.mark.parametrize("height", [30, 8])
def test_what_stands_at_the_end_is_what_one_piece_gives(height):
    pieces = [TEXT[at : at + 5] for at in range(0, len(TEXT), 5)]
    whole = streamed([TEXT])
    assert streamed(pieces, height) == whole
    for words in ("Heading", "emphasis", " 2 two", "return x", "quote", "the end"):
        assert whole.count(words) == 1
    assert "*" not in whole
    assert "```" not in whole


def test_a_code_block_longer_than_the_screen_is_there_once_and_whole():
    code = "```\n" + "".join(f"line {number}\n" for number in range(40)) + "```\n"
    pieces = [code[at : at + 7] for at in range(0, len(code), 7)]
    lines = [line.strip() for line in streamed(pieces, height=10).splitlines()]
    assert lines == [f"line {number}" for number in range(40)]


def test_no_line_is_filled_up_with_spaces():
    """They would be copied with the text."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=30, color_system=None)
    with MarkdownStream(console) as stream:
        for at in range(0, len(TEXT), 50):
            stream.add(TEXT[at : at + 50])
    assert not [line for line in re.split(r"[\r\n]", out.getvalue()) if line.endswith(" ")]


def test_html_is_text(unthrottled):
    text = "a vector<int> and a <b>tag</b>\n\n<div>\nnot hidden\n</div>\n\n<!-- nor this -->"
    shown = streamed(list(text))
    for part in ("vector<int>", "<b>tag</b>", "<div>", "not hidden", "</div>", "<!-- nor this -->"):
        assert part in shown


def test_an_error_in_between_leaves_what_was_said():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    with pytest.raises(KeyboardInterrupt), MarkdownStream(console) as stream:
        stream.add("some **words**")
        raise KeyboardInterrupt
    screen = Screen()
    screen.write(out.getvalue())
    assert screen.text == "some words"
    assert "\x1b[?25h" in out.getvalue()  # cursor is back


def test_an_answer_cannot_drive_the_terminal():
    assert printable("a\x1b[31mred\x1b]0;title\x07\r\x9b2J b\tc\n") == "ared]0;title2J b\tc\n"
