"""What only POSIX has stands behind a question whether it is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"fcntl", "resource", "termios", "tty", "pwd", "grp", "syslog", "readline", "curses", "pty"}
NAMES = {
    "os": {
        *("fork", "forkpty", "preadv", "pread", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate"),
        *("O_DIRECT", "POSIX_FADV_DONTNEED", "geteuid", "getuid", "setsid", "killpg", "nice", "sysconf"),
        *("getloadavg", "sched_getaffinity", "sched_setaffinity", "statvfs", "mkfifo"),
    },
    "signal": {
        "SIGKILL",
        "SIGHUP",
        "SIGQUIT",
        "SIGUSR1",
        "SIGUSR2",
        "SIGALRM",
        "SIGPIPE",
        "SIGWINCH",
        "alarm",
    },
    "mmap": {"MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE", "PROT_READ"},
}


def unguarded(path: Path) -> Iterator[str]:
    """Uses of what POSIX alone has that no try, hasattr, platform test or getattr stands around."""
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    questions = ("hasattr(", "sys.platform", "os.name", "TYPE_CHECKING", *(f"{name} is " for name in MODULES))

    def guarded(node: ast.AST) -> bool:
        while (parent := parents.get(node)) is not None:
            if isinstance(parent, ast.Try):
                caught = " ".join(ast.unparse(handler.type or handler) for handler in parent.handlers)
                if "ImportError" in caught or "ModuleNotFoundError" in caught or "AttributeError" in caught:
                    return True
            if isinstance(parent, ast.With) and "suppress(ImportError)" in ast.unparse(parent.items[0]):
                return True
            if isinstance(parent, ast.If | ast.IfExp) and node is not parent.test:  # noqa: SIM102
                if any(question in ast.unparse(parent.test) for question in questions):
                    return True
            if isinstance(parent, ast.FunctionDef):
                first = [s for s in parent.body if isinstance(s, ast.If)][:1]
                if any(q in ast.unparse(s.test) for s in first for q in questions) and isinstance(
                    first[0].body[-1], ast.Return | ast.Raise
                ):
                    return True
            node = parent
        return False

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module] if node.module in MODULES else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = [ast.unparse(node)] if node.attr in NAMES.get(node.value.id, set()) else []
        else:
            found = []
        for name in found:
            if not guarded(node):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {name}"


@pytest.mark.parametrize("room", ["cache", "offload", "cli", "demo", "src"])
def test_posix_only_calls_are_guarded(room: str) -> None:
    found = [use for path in sorted((ROOT / room).rglob("*.py")) for use in unguarded(path)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import fcntl", 1),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", 0),
        ("import os\nos.fork()", 1),
        ("import os\nif hasattr(os, 'fork'):\n    os.fork()", 0),
        ("import os\nif hasattr(os, 'fork'):\n    pass\nos.fork()", 1),
        ("import signal\nsignal.SIGKILL", 1),
        ("import os, sys\ndef f():\n    if sys.platform == 'win32':\n        return\n    os.nice(1)", 0),
    ],
)
def test_the_scan_finds_what_it_is_for(
    source: str, uses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(source)
    assert len([*unguarded(tmp_path / "module.py")]) == uses
