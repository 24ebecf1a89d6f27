"""Saved conversations: one file each below MOE_LOCAL_HOME, in a folder that only its owner may enter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cache.files import parse_json, write_atomically
from moe_local.cli.options import Sampling
from moe_local.cli.parameters import KINDS

VERSION = 1
ROLES = ("user", "assistant")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def private_folder(home: Path) -> Path:
    """`home`/chat, for saved conversations and typed lines; only the owner may enter it. Raises OSError."""
    folder = home / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    return folder


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, with the name of its model and its settings."""

    model: str
    sampling: Sampling
    turns: tuple[Mapping[str, str], ...]
    """Messages of user and assistant, without the system prompt, which is one of the settings."""

    def save(self, home: Path, name: str) -> Path:
        """Save it under this name, replacing an older one. Raises OptionError, MoeLocalError."""
        path = _path(home, name)
        document = {
            "version": VERSION,
            "model": self.model,
            "settings": asdict(self.sampling),
            "messages": [dict(turn) for turn in self.turns],
        }
        try:
            private_folder(home)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, [json.dumps(document, indent=1, ensure_ascii=False), "\n"])
        except OSError as error:
            raise MoeLocalError(f"{path} cannot be written: {error.strerror or error}") from None
        return path

    @classmethod
    def load(cls, home: Path, name: str) -> Conversation:
        """The conversation saved under this name. Raises OptionError for a bad or unknown name, MoeLocalError
        for a file that is damaged or cannot be read."""
        path = _path(home, name)
        try:
            return cls._from(parse_json(path.read_bytes()))
        except FileNotFoundError:
            there = ", ".join(saved_names(home))
            hint = f"there are {there}" if there else "/save NAME saves one"
            raise OptionError(f"no conversation is saved as {name!r}; {hint}") from None
        except OSError as error:
            raise MoeLocalError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise MoeLocalError(f"{path} is not a saved conversation ({error}); remove it") from None

    @classmethod
    def _from(cls, document: Any) -> Conversation:
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        turns = document["messages"]
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise ValueError("its messages are not a list")
        for turn in turns:
            if not isinstance(turn, dict) or turn.get("role") not in ROLES:
                raise ValueError("a message is neither the user's nor the assistant's")
            if not isinstance(turn.get("content"), str):
                raise ValueError("a message is not text")
        return cls(
            str(document["model"]),
            _sampling(document["settings"]),
            tuple({"role": turn["role"], "content": turn["content"]} for turn in turns),
        )


def saved_names(home: Path) -> list[str]:
    """Names of all saved conversations, sorted."""
    return sorted(path.stem for path in (home / "chat" / "saved").glob("*.json") if path.name[0] != ".")


def _path(home: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} cannot name a conversation; use up to 64 letters, digits and any of . _ -"
        )
    return home / "chat" / "saved" / f"{name}.json"


def _sampling(settings: Any) -> Sampling:
    """The settings that this version knows, after checking types and ranges. Raises ValueError,
    OptionError."""
    kinds: dict[str, tuple[type, ...]] = {
        name: (int, float) if kind is float else (int,) for name, kind in KINDS.items()
    }
    kinds |= {"system": (str,), "think": (bool,), "chat_template_kwargs": (dict,)}
    known = {field.name: settings[field.name] for field in fields(Sampling) if field.name in settings}
    for name, value in known.items():
        wrong = isinstance(value, bool) != (name == "think") or not isinstance(value, kinds[name])
        if value is not None and wrong:
            raise ValueError(f"{name} is {value!r}")
    sampling = Sampling(**known)
    sampling.check()
    return sampling
