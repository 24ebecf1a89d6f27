"""The first use of a model that is not here: what is missing is said, one question is asked, then it chats.

Against a Hub on 127.0.0.1 with a tiny model. Kills in the middle are in tests/test_end_to_end.py.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from moe_local.offload.checkpoint.hub import cached_folder
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import first_use as module
from moe_local.offload.plan.first_use import first_use

REPO = "someone/tiny-moe"
CHAT = ("chat", REPO, "--ram", "2GiB", "-n", "4", "--temperature", "0")


@pytest.fixture(autouse=True)
def served(hub: Any, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MOE_LOCAL_YES", raising=False)
    hub.add_repo(REPO, tiny_mixtral)
    return hub


def weights_sent(hub: Any) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(2**40, 0, free))


def test_downloads_converts_and_chats_when_told_to(invoke: Any, served: Any, tmp_path: Path) -> None:
    result = invoke(*CHAT, "--yes", input="the experts\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert f"{REPO} takes " in result.stderr
    assert weights_sent(served) > 0
    assert [*(tmp_path / "home").rglob("manifest.json")]

    served.sent.clear()
    again = invoke(*CHAT, input="the experts\n")  # all is here: no question, no --yes
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert "takes" not in again.stderr
    assert weights_sent(served) == 0


@pytest.mark.parametrize(
    "command",
    [CHAT, ("run", REPO, "hi"), ("serve", REPO, "--port", "0"), ("bench", REPO), ("calibrate", REPO)],
)
def test_where_nobody_can_be_asked_it_needs_yes(command: tuple[str, ...], invoke: Any, served: Any) -> None:
    result = invoke(*command, input="")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "of download" in result.stderr
    assert "add --yes" in result.stderr
    assert weights_sent(served) == 0


@pytest.mark.parametrize("answer", ["y", "n"])
def test_asks_once_at_a_terminal(
    answer: str, invoke: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe_local.cli.first_use as asking

    terminal = namedtuple("terminal", "isatty")(lambda: True)
    monkeypatch.setattr(asking, "sys", namedtuple("sys", "stdin")(terminal))
    result = invoke("run", *CHAT[1:2], "the experts", *CHAT[2:], input=f"{answer}\n")
    assert result.stderr.count("Go on?") == 1
    assert result.exit_code == (0 if answer == "y" else 1)
    assert (weights_sent(served) > 0) == (cached_folder(REPO) is not None) == (answer == "y")


def test_too_little_disk_is_said_before_anything_comes(
    invoke: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, 600_000)
    result = invoke(*CHAT, "--yes")
    assert result.exit_code == 3
    assert "of converted experts, and 586 KiB are free" in result.stderr
    assert weights_sent(served) == 0


def test_download_and_experts_share_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for either, not for both."""
    use = first_use(REPO, LoadOptions(ram="2GiB"))
    assert use is not None
    assert use.convert_bytes > 0
    disk(monkeypatch, module.MARGIN_BYTES + use.download_bytes + use.convert_bytes)
    use.check()
    disk(monkeypatch, module.MARGIN_BYTES + use.download_bytes + use.convert_bytes - 1)
    with pytest.raises(module.DoesNotFitError, match="make room"):
        use.check()


def test_too_little_memory_is_said_before_anything_comes(invoke: Any, served: Any) -> None:
    result = invoke("chat", REPO, "--ram", "1MiB", "--yes")
    assert result.exit_code == 3
    assert "RAM" in result.stderr
    assert weights_sent(served) == 0


def test_memory_that_another_model_has_may_be_left_out(served: Any) -> None:
    with pytest.raises(module.DoesNotFitError, match="RAM"):
        first_use(REPO, LoadOptions(ram="1MiB"))
    assert first_use(REPO, LoadOptions(ram="1MiB"), memory=False) == first_use(REPO, LoadOptions(ram="2GiB"))


def test_no_more_than_what_is_missing_is_told(served: Any) -> None:
    options = LoadOptions(ram="2GiB")
    use = first_use(REPO, options)
    assert use is not None
    sizes = [path.stat().st_size for path in served.repos[REPO].folder.iterdir() if path.suffix != ".md"]
    assert 0 < use.download_bytes <= sum(sizes)
    native = first_use(REPO, LoadOptions(ram="2GiB", experts="native"))
    assert native is not None
    assert native.convert_bytes == 0
    assert "converted" not in str(native)
