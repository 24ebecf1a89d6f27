from __future__ import annotations

import io
import sys

import pytest

import moe_local
from moe_local.cli import render
from moe_local.cli.doctor import WIDTH, _show
from moe_local.cli.fit import show_plan
from moe_local.cli.render import ProgressBar
from moe_local.offload.doctor.finding import warn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_where_stderr_is_no_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with ProgressBar() as progress:
        progress("converting", 1, 2)
        progress("converting", 2, 2)
    assert out.getvalue() == ""


def test_text_is_not_wrapped_without_a_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does where it was closed
    assert render.wrapped("word " * 40, 2) == ["word " * 40]


def test_a_bar_on_a_terminal(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as progress:
        progress("converting", 1, 256)
        progress("converting", 256, 256)
        progress("loading", 3, 8)
    assert "converting experts" in out.getvalue()
    assert "loading experts" in out.getvalue()
    assert "3/8" in out.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (999_999_999, "1 B"),
        (46_702_792_704, "46.7 B"),
        (1_200_000_000_000, "1.2 T"),
    ],
)
def test_counts(number, text):
    assert render.count(number) == text


def test_tables_line_up(capsys):
    render.print_table(["a", "long name"], [("one", "1"), ("twenty", "")])
    assert capsys.readouterr().out == "A        LONG NAME\none      1\ntwenty\n"


def test_fields_wrap_between_words_on_a_terminal_only(monkeypatch, capsys):
    fields = [("one", "some words that are longer than the line"), ("two", "2")]
    monkeypatch.setenv("COLUMNS", "28")
    render.print_fields(fields)
    assert capsys.readouterr().out == "  one  some words that are longer than the line\n  two  2\n"
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    render.print_fields(fields)
    lines = ["  one  some words that are", "       longer than the line", "  two  2"]
    assert out.getvalue().splitlines() == lines


def test_no_line_of_a_plan_is_cut_by_a_narrow_terminal(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    show_plan(moe_local.fit("mixtral-8x7b", vram="24GiB", ram="64GiB"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0] == "mixtral-8x7b: MixtralForCausalLM, 46.7 B"


def test_findings_wrap_behind_their_names(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", str(6 + WIDTH + 2 + 20))
    monkeypatch.setenv("TERM", "dumb")
    _show(warn("disk", "some words that are longer", "make room, or buy another"))
    name, *others = out.getvalue().splitlines()
    assert name.split() == ["warn", "disk", "some", "words", "that", "are"]
    assert [line.removeprefix(" " * (6 + WIDTH + 2)) for line in others] == [
        "longer",
        "-> make room, or buy",
        "   another",
    ]


def test_fields_are_left_alone_on_a_terminal_of_few_columns(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "22")
    render.print_fields([("one", "some words that are longer than the line")])
    assert out.getvalue() == "  one  some words that are longer than the line\n"


@pytest.mark.parametrize(("out", "lines"), [(Terminal(), 2), (io.StringIO(), 1)])
def test_a_status_wraps_between_words_on_a_terminal_only(monkeypatch, out, lines):
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    render.print_status("242.0 tok/s | first token 0.25 s | stall 4.1 ms/token")
    assert len(out.getvalue().splitlines()) == lines
    assert "0.25 s" in out.getvalue()
