"""The commands of a chat, which begin with a slash."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

import click

from moe_local.cache.errors import OptionError
from moe_local.cache.keys import format_bytes
from moe_local.cli.answer import printable
from moe_local.cli.conversations import Conversation, saved_names
from moe_local.cli.fit import show_plan
from moe_local.cli.live import draw, draw_stalls
from moe_local.cli.parameters import DEFAULT, KINDS, settings, with_setting
from moe_local.cli.prompt import QUOTES
from moe_local.cli.render import on_stdout, prefetch_worth, print_fields
from moe_local.offload.checkpoint.registry import ALIASES, DEMO
from moe_local.offload.system.home import moe_local_home

if TYPE_CHECKING:
    from moe_local.cli.chat import Chat

LEAVE = ("/bye", "/exit", "/quit")
SWITCHES = {"verbose": "quiet", "history": "nohistory", "markdown": "nomarkdown"}
"""Switches of `/set`: the word that turns each on, and the word that turns it off."""
THOUGHTS = {"think": True, "nothink": False}
"""Words of `/set` that turn thoughts on and off."""
KEYS = (
    (QUOTES, "begins and ends a message of several lines; Alt-Enter begins a new one, too"),
    ("Ctrl-C", "stops an answer; clears what is typed, and leaves at the second time"),
    ("Ctrl-D", "leaves"),
    ("Ctrl-R", "looks for what was typed before, as the arrows do; Ctrl-X Ctrl-E opens $EDITOR"),
)


class Command(NamedTuple):
    """One command."""

    usage: str
    """Its name and arguments, as /help shows them."""
    meaning: str
    do: Callable[[str], None]
    """Called with the rest of the line after the name."""


class Commands:
    """The commands of one chat."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        table = (
            Command("/retry", "answer the last message anew; a seed that is set counts up", self._retry),
            Command("/clear", "forget the conversation", self._clear),
            Command("/history", "what was said", self._history),
            Command("/system [TEXT]", 'show or set the system prompt; "" removes it', self._system),
            Command("/set [NAME VALUE]", "show or set temperature, seed and the like", self._set),
            Command("/show", "the model, and what lies where", self._show),
            Command("/save NAME", "keep the conversation and its settings", self._save),
            Command("/load [NAME]", "go back to one that was saved; without a name, list them", self._load),
            Command("/model [NAME]", "go on with another model; without a name, which it is", self._model),
            Command("/cache [live]", "where each expert is; live: while tokens come", self._cache),
            Command("/stats", "what the cache has done", self._stats),
            Command("/multiline", "let Enter begin a new line, and Alt-Enter send", self._multiline),
            Command("/help", "this list, as is /?", self._help),
            Command("/bye", "leave, as do /exit and /quit", lambda rest: None),
        )
        self._table = {command.usage.split()[0]: command for command in table}

    def do(self, line: str) -> bool:
        """Run the command in a line; False if it ends the chat. Raises MoeLocalError if it fails."""
        name, _, rest = line.partition(" ")
        name, rest = name.lower(), rest.strip()
        if name in LEAVE:
            return False
        command = self._table.get("/help" if name == "/?" else name)
        if command is None:
            # compared without the slash, which would make all names look alike
            near = difflib.get_close_matches(name[1:], [known[1:] for known in self._table], n=2, cutoff=0.5)
            hint = f"did you mean /{' or /'.join(near)}?" if near else f"there are {', '.join(self._table)}"
            raise OptionError(f"unknown command {name}; {hint}")
        command.do(rest)
        return True

    def words(self, before: str) -> Iterator[tuple[str, str]]:
        """Completions for the next word of a line, given the text before it: (word, meaning)."""
        match before.split():
            case []:
                yield from ((name, command.meaning) for name, command in self._table.items())
            case ["/set"]:
                yield from ((name, f"{kind.__name__}, or {DEFAULT}") for name, kind in KINDS.items())
                yield "system", "the system prompt"
                yield from ((word, "") for pair in SWITCHES.items() for word in pair)
                yield from ((word, "") for word in THOUGHTS)
            case ["/load" | "/save"]:
                yield from ((name, "") for name in saved_names(moe_local_home()))
            case ["/model"]:
                yield from ((name, "") for name in (DEMO, *ALIASES))
            case ["/cache"]:
                yield "live", "while tokens come"

    def _help(self, rest: str) -> None:
        print_fields([*((command.usage, command.meaning) for command in self._table.values()), *KEYS])

    def _retry(self, rest: str) -> None:
        if not self._chat.retry():
            click.echo("nothing was asked yet")

    def _clear(self, rest: str) -> None:
        chat = self._chat
        chat.turns, chat.asked, chat.answered = [], None, False
        click.echo("Forgotten.")

    def _history(self, rest: str) -> None:
        for turn in [*self._chat.sampling.conversation(), *self._chat.turns]:
            click.echo(f"{turn['role']}: {printable(turn['content'])}")

    def _system(self, rest: str) -> None:
        chat = self._chat
        if rest:
            text = _unquoted(rest)
            chat.sampling = replace(chat.sampling, system=text or None)
            click.echo("System prompt set." if text else "No system prompt.")
        else:
            click.echo(printable(chat.sampling.system or "no system prompt; /system TEXT sets one"))

    def _set(self, rest: str) -> None:
        chat = self._chat
        name, _, value = rest.partition(" ")
        if name == "parameter":  # `/set parameter NAME VALUE`, as in other programs
            name, _, value = value.strip().partition(" ")
        value = value.strip()
        off = {word: on for on, word in SWITCHES.items()}
        if not name:
            system = printable(chat.sampling.system or "none")
            thinks = {True: "on", False: "off", None: f"{DEFAULT} (the model's own)"}[chat.sampling.think]
            shown = [(key, printable(text)) for key, text in settings(chat.sampling)]
            print_fields([*shown, ("think", thinks), ("system", system)])
        elif name in SWITCHES or name in off:
            on, attribute = name in SWITCHES, off.get(name, name)
            setattr(chat, "keeps" if attribute == "history" else attribute, on)
            click.echo(_SAID[name])
        elif name in THOUGHTS:
            self._think(None if value == DEFAULT else THOUGHTS[name])
        elif name == "system":
            self._system(value)
        else:
            chat.sampling = with_setting(chat.sampling, name, value)
            click.echo(f"{name} is {value}.")

    def _think(self, on: bool | None) -> None:
        chat = self._chat
        if on is not None:
            chat.model.answers.thinking(on)  # refuses what the model cannot be told
        chat.sampling = replace(chat.sampling, think=on)
        click.echo(_THINKING[on])

    def _show(self, rest: str) -> None:
        show_plan(self._chat.model.plan)
        self._set("")

    def _save(self, rest: str) -> None:
        chat = self._chat
        if not rest:
            raise OptionError("/save needs a name")
        saved = Conversation(chat.model.name, chat.sampling, tuple(chat.turns))
        saved.save(moe_local_home(), rest)
        click.echo(f"Saved {_messages(chat.turns)} as {rest}; /load {rest} goes on from here.")

    def _load(self, rest: str) -> None:
        chat = self._chat
        if not rest:
            names = saved_names(moe_local_home())
            click.echo("\n".join(names) if names else "nothing is saved; /save NAME saves")
            return
        loaded = Conversation.load(moe_local_home(), rest)
        chat.turns = [dict(turn) for turn in loaded.turns]
        chat.sampling = loaded.sampling
        chat.answered = [turn["role"] for turn in chat.turns[-2:]] == ["user", "assistant"]
        chat.asked = chat.turns[-2]["content"] if chat.answered else None
        other = (
            ""
            if loaded.model == chat.model.name
            else f" of {printable(loaded.model)}; {chat.model.name} goes on"
        )
        click.echo(f"Loaded {_messages(chat.turns)}{other}.")

    def _model(self, rest: str) -> None:
        chat = self._chat
        if rest:
            chat.switch(rest)
        click.echo(f"{chat.model.name}{', with the conversation so far' if rest and chat.turns else ''}")

    def _cache(self, rest: str) -> None:
        chat = self._chat
        if rest == "live":
            if not chat.live and not sys.stdout.isatty():
                raise OptionError("/cache live draws on a terminal, and stdout is not one")
            chat.live = not chat.live
            click.echo(f"The cache is {'' if chat.live else 'not '}shown while tokens come.")
        elif rest:
            raise OptionError(f"/cache {rest} is unknown; there are /cache and /cache live")
        else:
            on_stdout().print(draw(chat.model.cache_view().look(), self._stalls(), None))

    def _stats(self, rest: str) -> None:
        if rest == "live":
            self._cache(rest)
            return
        stats = self._chat.model.stats()
        prefetch, moved = stats.prefetch, stats.bytes
        rate = "-" if stats.hit_rate is None else f"{100 * stats.hit_rate:.1f} %"
        print_fields(
            [
                ("tokens", str(stats.tokens)),
                ("hits", f"{rate} ({stats.hits} of {stats.hits + stats.misses} experts needed)"),
                ("evictions", str(stats.evictions)),
                (
                    "prefetch",
                    f"{prefetch.issued} issued, {prefetch.used} used, {prefetch.late} late, "
                    f"{format_bytes(prefetch.wasted_bytes)} wasted; {prefetch_worth(prefetch)}",
                ),
                (
                    "read",
                    f"{format_bytes(moved.disk)} from disk, {format_bytes(moved.h2d)} to the GPU",
                ),
                ("stall", f"{stats.stall.total:.2f} s"),
                ("starved", f"{len(stats.starved)} experts under 1 % of their layer's tokens"),
            ]
        )
        on_stdout().print(draw_stalls(self._stalls()))

    def _stalls(self) -> dict[str, float]:
        """Stalls in milliseconds per token, by cause."""
        stats = self._chat.model.stats()
        return {cause: 1000 * s / max(1, stats.tokens) for cause, s in asdict(stats.stall).items()}

    def _multiline(self, rest: str) -> None:
        editor = self._chat.editor
        if editor is None:
            raise OptionError(
                f"/multiline needs a terminal that can edit; {QUOTES} begins and ends several lines"
            )
        editor.multiline = not editor.multiline
        click.echo(
            "Enter begins a new line, Alt-Enter sends; /multiline turns that off."
            if editor.multiline
            else "Enter sends."
        )


_SAID = {
    "verbose": "Figures are shown below an answer.",
    "quiet": "Figures are not shown.",
    "history": "Answers know what was said.",
    "nohistory": "Each message is answered on its own.",
    "markdown": "Answers are formatted.",
    "nomarkdown": "Answers are shown as they are written.",
}


_THINKING = {
    True: "The model is told to think; /set think default leaves it to the model.",
    False: "The model is told not to think; /set think default leaves it to the model.",
    None: "Whether it thinks is the model's own choice.",
}


def _messages(turns: Iterable[object]) -> str:
    number = len(list(turns))
    return f"{number} message{'' if number == 1 else 's'}"


def _unquoted(text: str) -> str:
    """Remove the double or triple quotes around the text, if there are any."""
    for quotes in (QUOTES, '"'):
        if len(text) >= 2 * len(quotes) and text.startswith(quotes) and text.endswith(quotes):
            return text[len(quotes) : -len(quotes)].strip()
    return text
