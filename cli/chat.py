"""`moe-local chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

import moe_local
from moe_local.cache.errors import MoeLocalError
from moe_local.cli.answer import AnswerView
from moe_local.cli.completion import model_argument
from moe_local.cli.exchanges import answer_room, shorten
from moe_local.cli.first_use import ready, yes_flag
from moe_local.cli.live import LiveAnswer
from moe_local.cli.options import CHAT_FLAGS, Sampling, debug_flag, load_flags, sampling_flags
from moe_local.cli.prompt import Messages, can_edit
from moe_local.cli.render import ProgressBar, is_of_output, print_status, status_line
from moe_local.offload.answer_format.piece import Piece
from moe_local.offload.ranges import nth_seed
from moe_local.offload.system.home import moe_local_home

if TYPE_CHECKING:
    from moe_local import Model
    from moe_local.cli.editor import Editor
    from moe_local.offload.stream import TokenStream


@click.command()
@model_argument(default="demo")
@yes_flag
@load_flags(*CHAT_FLAGS)
@sampling_flags
@debug_flag
def chat(model: str, options: dict[str, Any], sampling: Sampling) -> None:
    """Talk with MODEL, by default the demo in the package.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. If stdin is not a terminal, each line is
    a message; if stdout is not one, it gets the answers as plain text, and everything else goes to stderr.
    Without a terminal the exit code is 1 if any message or command failed; the others are answered all the
    same.

    A conversation that outgrows the context goes on: the model is shown as many of the latest exchanges as
    leave room for an answer, and a line says how many are left out. The rest is then read again after each
    message, which takes a while; a larger --context avoids that.

    \b
    Examples:
      moe-local chat
      moe-local chat mixtral-8x7b --vram 20GiB
      echo 'Why is the sky blue?' | moe-local chat demo
    """

    def options_of(name: str) -> dict[str, Any]:
        """For another model those that do not concern MODEL alone."""
        return {key: value for key, value in options.items() if key != "chat_template" or name == model}

    def load(name: str) -> Model:
        with ProgressBar() as progress:
            return moe_local.load(name, **options_of(name), progress=progress)

    def ask(name: str) -> None:
        ready(name, options_of(name), replacing=True)

    ready(model, options)
    talk = Chat(load(model), sampling, load, ask)
    with contextlib.closing(talk):
        talk.run()
    if talk.failed:
        click.get_current_context().exit(1)


class Chat:
    """A conversation with a model: reads messages, streams answers, and keeps both. Owns the model."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        load: Callable[[str], Model],
        ask: Callable[[str], None],
    ) -> None:
        """`load` loads another model by its name, for `switch`; `ask`, called first, raises if that model
        is not available or the user declines the download."""
        from moe_local.cli.chat_commands import Commands  # imports torch, which --help does not need

        self.model = model
        self.sampling = sampling
        self.turns: list[dict[str, str]] = []
        """The conversation so far as messages for the chat template, without the system prompt."""
        self.asked: str | None = None
        """The user's last message, for `retry`."""
        self.answered = False
        """Whether the last two turns are the message in `asked` and an answer to it."""
        self.keeps = True
        """Whether the model is shown the earlier turns with each message."""
        self.live = False
        """Whether the cache is shown while an answer is generated."""
        self.markdown = True
        """Whether answers are formatted, on a terminal that supports it."""
        self.verbose = True
        """Whether speed and hit rate are shown below an answer."""
        self.editor: Editor | None = None
        self.failed = False
        """Whether a message or command ended with an error that nobody at a terminal has seen."""
        self._load = load
        self._ask = ask
        self._retries = 0
        self._commands = Commands(self)
        self._interactive = False

    def run(self) -> None:
        """Chat until the input ends or /bye. If not on a terminal, Ctrl-C raises KeyboardInterrupt."""
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            if can_edit():
                from moe_local.cli.editor import Editor

                self.editor = Editor(moe_local_home(), self._commands.words)
            print_status(f"{self.model.name}: /help lists the commands, Ctrl-D leaves.")
        for message in Messages(self._interactive, self.editor):
            if message.is_command:
                if not self.do(message.text):
                    return
            elif message.text:
                self.answer(message.text)

    def do(self, command: str) -> bool:
        """Run a command; False if it ends the chat. Errors are printed, and the chat continues."""
        try:
            return self._commands.do(command)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            click.echo("\nstopped")
        except click.Abort:
            click.echo("not loaded")
        except Exception as error:
            self._fail(error)
        return True

    def answer(self, message: str) -> None:
        """Stream the answer. If the message is refused, or the answer is stopped before its first word, no
        turns are added."""
        self._retries = 0
        self._answer(message, self.sampling)

    def retry(self) -> bool:
        """Answer the last message again, with another seed if one is set; False if there is no message."""
        if self.asked is None:
            return False
        before = self.turns[-2:] if self.answered else []
        del self.turns[len(self.turns) - len(before) :]
        self._retries += 1
        seed = self.sampling.seed
        sampling = (
            self.sampling if seed is None else replace(self.sampling, seed=nth_seed(seed, self._retries))
        )
        self._answer(self.asked, sampling)
        if before and not self.answered:
            self.turns, self.answered = self.turns + before, True
        return True

    def _answer(self, message: str, sampling: Sampling) -> None:
        self.asked, self.answered = message, False
        question = {"role": "user", "content": message}
        try:
            stream = self._ask_model(question, sampling)
        except Exception as error:
            self._fail(error)
            return
        text, failure = self._stream(stream)
        if failure is not None:
            self._fail(failure)
        if text:
            self.turns += [question, {"role": "assistant", "content": text}]
            self.answered = True
        full = ": the context is full" if stream.filled_context else " at max_tokens"
        cut = {None: " | stopped", "length": f" | cut off{full}"}.get(stream.finish_reason, "")
        if self.verbose:
            print_status(status_line(stream.stats) + cut)

    def _ask_model(self, question: dict[str, str], sampling: Sampling) -> TokenStream:
        """Start an answer to as much of the conversation as leaves room for it. Prints what is left out."""
        context = self.model.plan.request.context

        def stream(messages: list[Mapping[str, str]]) -> TokenStream:
            answers = self.model.answers
            options = {**sampling.generation(), **sampling.template(answers), **answers.options}
            return self.model.stream(messages, **options)

        def fits(stream: TokenStream) -> bool:
            return len(stream.prompt_ids) + answer_room(context, stream.max_new_tokens) <= context

        said = [*self.sampling.conversation(), *(self.turns if self.keeps else []), question]
        shown = shorten(said, stream, fits)
        if shown.left_out:
            print_status(
                f"left out the oldest exchanges, {shown.left_out} of {shown.earlier}: "
                f"the context holds {context} tokens"
            )
        return shown.prompt

    def _stream(self, stream: TokenStream) -> tuple[str, Exception | None]:
        """Show an answer as it arrives. Returns its text without thoughts, and the error that ended it, if
        any."""
        parser = self.model.answers.parser(stream.prompt_ids)
        text, later = "", list[Piece]()
        failure: Exception | None = None
        with AnswerView(markdown=self.markdown) as view:
            try:
                with contextlib.closing(stream), self._picture() as picture:
                    for token in stream:
                        pieces = [*parser.add(token.text)]
                        if picture is None:
                            text += view.show(pieces)
                        else:
                            later += pieces
                            picture.show(
                                "".join(piece.reasoning or piece.content for piece in pieces), token.ms
                            )
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
            except Exception as error:
                failure = error
            text += view.show([*later, *parser.flush(cut=stream.finish_reason != "stop")])
        return text, failure

    def _picture(self) -> contextlib.AbstractContextManager[LiveAnswer | None]:
        """What shows an answer while it is generated, instead of the view; None: nothing but that does."""
        return LiveAnswer(self.model) if self.live else contextlib.nullcontext()

    def switch(self, name: str) -> None:
        """Continue with another model. The current one is freed first, so memory need not hold both.

        If the other model is unknown or the user declines it, nothing changes. If it cannot be loaded, the
        previous model is loaded again. Raises MoeLocalError, or click's Abort if the user declines.
        """
        moe_local.fit(name)  # raises if there is no such model
        self._ask(name)
        before = self.model.name
        self.model.close()
        try:
            self.model = self._load(name)
        except BaseException as error:
            print_status(f"going on with {before}")
            try:
                self.model = self._load(before)
            except MoeLocalError as again:
                raise MoeLocalError(f"{error}; and {before} cannot be loaded again: {again}") from error
            raise

    def _fail(self, error: Exception) -> None:
        """Print an error, after which the chat goes on; raise one of printing: no answer would be seen."""
        if is_of_output(error):
            raise error
        self.failed = self.failed or not self._interactive
        _say(error)

    def close(self) -> None:
        """Free the model. Idempotent."""
        self.model.close()


def _say(error: Exception) -> None:
    """Print an error as one line, as `cli/main.py` does for commands; with --debug, after its trace."""
    context = click.get_current_context(silent=True)
    if context is not None and getattr(context.find_root().command, "debug", False):
        traceback.print_exception(error)
    text = str(error) if isinstance(error, MoeLocalError) else f"{type(error).__name__}: {error}"
    click.echo(f"moe-local: {' '.join(text.split())}", err=True)
