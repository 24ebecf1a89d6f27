"""A line editor for chats: history, multi-line messages, completion of commands. Needs a real terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from moe_local.cli.conversations import private_folder
from moe_local.cli.prompt import QUOTES

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

Words = Callable[[str], Iterable[tuple[str, str]]]
"""Returns the completions of a word, given the text before it: (completion, its meaning)."""


class CommandCompleter(Completer):
    """Completes lines that begin with a slash: commands and their arguments."""

    def __init__(self, words: Words) -> None:
        self._words = words

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        before, space, word = line.rpartition(" ")
        for name, meaning in self._words(before + space):
            if name.startswith(word):
                yield Completion(name, -len(word), display_meta=meaning)


class PrivateHistory(FileHistory):
    """Typed lines, in a file that only its owner can read. If writing fails, as on a full disk, the line is
    dropped and the chat goes on."""

    def __init__(self, home: Path) -> None:
        """Raises OSError if the file cannot be made."""
        path = private_folder(home) / "history"
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def history(home: Path) -> History:
    """The history kept in `home`, or one in memory if that cannot be written."""
    try:
        return PrivateHistory(home)
    except OSError:
        return InMemoryHistory()


class Editor:
    """Reads a message: Enter sends it, Alt-Enter begins a new line, as does Enter between triple quotes."""

    def __init__(
        self,
        home: Path,
        words: Words,
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        """`words`: completions. `input` and `output`: the terminal, if not the process's own."""
        self.multiline = False
        """Whether Enter begins a new line and Alt-Enter sends, instead of the reverse."""
        self._session: PromptSession[str] = PromptSession(
            history=history(home),
            completer=CommandCompleter(words),
            complete_while_typing=Condition(_is_command),
            complete_style=CompleteStyle.COLUMN,
            key_bindings=self._keys(),
            multiline=True,
            enable_open_in_editor=True,
            enable_suspend=True,
            reserve_space_for_menu=6,
            input=input,
            output=output,
        )

    def read(self, prompt: str, continued: str) -> str:
        """The typed message. Raises EOFError for Ctrl-D on an empty line, KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt(prompt, prompt_continuation=continued)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if (self.multiline and not _is_command()) or _has_open_quotes(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            if self.multiline:
                event.current_buffer.validate_and_handle()
            else:
                event.current_buffer.insert_text("\n")

        return keys


def _is_command() -> bool:
    text: Any = get_app().current_buffer.text
    return str(text).startswith("/") and "\n" not in text


def _has_open_quotes(text: str) -> bool:
    text = text.lstrip()
    return text.startswith(QUOTES) and not text.removeprefix(QUOTES).rstrip().endswith(QUOTES)
