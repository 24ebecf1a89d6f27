from __future__ import annotations

import json
import stat
import sys

import pytest

from moe_local.cache.errors import MoeLocalError, OptionError
from moe_local.cli.conversations import Conversation, saved_names
from moe_local.cli.options import Sampling

SAVED = Conversation(
    "demo",
    Sampling(temperature=0.5, seed=3, system="Be brief."),
    ({"role": "user", "content": "hé"}, {"role": "assistant", "content": "ho"}),
)


def test_what_is_saved_comes_back(tmp_path):
    SAVED.save(tmp_path, "mine")
    assert Conversation.load(tmp_path, "mine") == SAVED
    assert saved_names(tmp_path) == ["mine"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_nobody_else_can_look(tmp_path):
    SAVED.save(tmp_path, "mine")
    assert stat.S_IMODE((tmp_path / "chat").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_names_are_names(tmp_path, name):
    with pytest.raises(OptionError, match="cannot name a conversation"):
        SAVED.save(tmp_path, name)
    with pytest.raises(OptionError, match="cannot name a conversation"):
        Conversation.load(tmp_path, name)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"messages": "hello"},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": ["x"]},
        {"settings": None},
        {"settings": {"temperature": "hot"}},
        {"settings": {"seed": True}},
        {"settings": {"seed": 1.5}},
        {"settings": {"max_tokens": 0}},
    ],
)
def test_damaged_files_are_refused_in_a_line(tmp_path, change):
    path = SAVED.save(tmp_path, "mine")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(MoeLocalError, match="is not a saved conversation") as refused:
        Conversation.load(tmp_path, "mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_files_that_are_no_json_are_refused(tmp_path, text):
    SAVED.save(tmp_path, "mine").write_text(text)
    with pytest.raises(MoeLocalError, match="is not a saved conversation"):
        Conversation.load(tmp_path, "mine")


def test_a_home_that_is_no_folder_is_said(tmp_path):
    home = tmp_path / "file"
    home.write_text("")
    with pytest.raises(MoeLocalError, match="cannot be written"):
        SAVED.save(home, "mine")
