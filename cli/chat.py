"""`moe-local chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.cache.keys import format_bytes
from moe_local.cli.completion import model_argument
from moe_local.cli.live import LiveAnswer, draw
from moe_local.cli.options import Sampling, debug_flag, load_flags, sampling_flags
from moe_local.cli.prompt import QUOTES, Messages
from moe_local.cli.render import (
    ProgressBar,
    on_stdout,
    prefetch_worth,
    print_fields,
    print_status,
    status_line,
)

if TYPE_CHECKING:
    from moe_local import Model
    from moe_local.offload.records import Token

HELP = (
    ("/help", "this list"),
    ("/clear", "forget the conversation"),
    ("/stats", "what the cache has done and holds; /stats live: while tokens come"),
    ("/exit", "leave, as do /bye, /quit and Ctrl-D"),
    (QUOTES, "begins and ends a message of several lines"),
    ("Ctrl-C", "stops an answer"),
)


@click.command()
@model_argument(default="demo")
@load_flags()
@sampling_flags
@debug_flag
def chat(model: str, options: dict[str, Any], sampling: Sampling) -> None:
    """Talk with MODEL; without one, with the demo in the package.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. Where stdin is no terminal, each line is
    a message.

    \b
    Examples:
      moe-local chat
      moe-local chat mixtral-8x7b --vram 20GiB
      echo 'Why is the sky blue?' | moe-local chat demo
    """
    with ProgressBar() as progress:
        loaded = moe_local.load(model, **options, progress=progress)
    with loaded:
        Chat(loaded, sampling).run()


class Chat:
    """A conversation with a model: reads messages, streams answers, and keeps both."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._model = model
        self._sampling = sampling
        self.messages = sampling.conversation()
        """What was said, as the chat template takes it."""
        self.live = False
        """Whether the cache is shown while an answer comes."""

    def run(self) -> None:
        """Until the input ends or /exit. Raises KeyboardInterrupt for a Ctrl-C away from a terminal."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            print_status(f"{self._model.name}: /help lists the commands, Ctrl-D leaves.")
        for message in Messages(interactive):
            if message.is_command:
                if not self._command(message.text):
                    return
            elif message.text:
                self._answer(message.text, stoppable=interactive)

    def _command(self, command: str) -> bool:
        """Do what it says; False if that is to leave."""
        match command.split()[0]:
            case "/exit" | "/bye" | "/quit":
                return False
            case "/help" | "/?":
                print_fields(HELP)
            case "/clear":
                self.messages = self._sampling.conversation()
                click.echo("Forgotten.")
            case "/stats" if command.split()[1:] == ["live"]:
                self._toggle_live()
            case "/stats":
                self._stats()
            case unknown:
                click.echo(f"unknown command {unknown}; /help lists the commands")
        return True

    def _answer(self, message: str, *, stoppable: bool) -> None:
        """Stream the answer. One that was refused, or stopped before its first word, is as if never asked."""
        question = {"role": "user", "content": message}
        try:
            stream = self._model.stream([*self.messages, question], **self._sampling.generation())
        except MoeLocalError as error:
            click.echo(f"moe-local: {error}", err=True)
            return
        try:
            with contextlib.closing(stream), self._shown() as show:
                for token in stream:
                    show(token)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        except MoeLocalError as error:
            click.echo(err=True)
            click.echo(f"moe-local: {error}", err=True)
        click.echo()
        if stream.text:
            self.messages += [question, {"role": "assistant", "content": stream.text}]
        cut = {None: " | stopped", "length": " | cut off"}.get(stream.finish_reason, "")
        print_status(status_line(stream.stats) + cut)

    def _toggle_live(self) -> None:
        if not self.live and not sys.stdout.isatty():
            click.echo("/stats live draws on a terminal, and stdout is none")
            return
        self.live = not self.live
        click.echo(f"The cache is {'' if self.live else 'not '}shown while tokens come.")

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Callable[[Token], None]]:
        """How tokens get to the screen: as they come, or above a picture of the cache."""
        if self.live:
            with LiveAnswer(self._model) as answer:
                yield answer.show
            click.echo(answer.text, nl=False)
        else:
            yield lambda token: click.echo(token.text, nl=False)

    def _stats(self) -> None:
        stats = self._model.stats()
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
        stalls = {cause: 1000 * s / max(1, stats.tokens) for cause, s in asdict(stats.stall).items()}
        on_stdout().print(draw(self._model.cache_view().look(), stalls, None))
