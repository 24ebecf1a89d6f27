"""The whole path of a first use: pull, kill, resume, convert, kill, resume, answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from filelock import FileLock
from huggingface_hub import constants

import moe_local
from support import tiny_models

REPO = "mistralai/Mixtral-8x7B-Instruct-v0.1"
PROMPT = "the experts of the text"
CONVERTED_AT_KILL = "layer-00002.safetensors"
HELD = """
import os, sys, time
from moe_local.cli.entry import main
behind, until = sys.argv[1:3]
del sys.argv[1:3]
replace = os.replace
def held(source, target):
    replace(source, target)
    while os.path.basename(target) == behind and not os.path.exists(until):
        time.sleep(0.01)
os.replace = held
main()
"""
"""The command, which goes no further once a file of this name is there, until there is another: whoever is to
end it at that moment may be late."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 bf16 shards of 50 MiB in all: small, but long enough under way to be killed."""
    folder = tmp_path_factory.mktemp("served")
    shape = synthetic.Shape(
        256, 512, layers=8, heads=4, kv_heads=2, vocab=tiny_models.VOCAB, max_context=2048
    )
    synthetic.mixtral_19_shards(folder, shape)
    tiny_models.tiny_tokenizer().save_pretrained(folder)
    return folder


class Machine:
    """A user's machine: folders of its own, on which `moe-local` runs against a Hub."""

    def __init__(self, folder: Path, hub: Any) -> None:
        self.hub = hub
        self.home = folder / "moe-local"
        self.cache = folder / "hf" / "hub"
        self.go_on = folder / "go on"
        self.env = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("HF_", "MOE_LOCAL_"))
            },
            **hub.env(folder / "hf"),
            "MOE_LOCAL_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "MOE_LOCAL_YES": "1",
        }

    def start(
        self, model: str = "mixtral-8x7b", *flags: str, code: Sequence[str] = ("-m", "moe_local.cli")
    ) -> subprocess.Popen[str]:
        """`moe-local run`, with less memory than the published model needs."""
        command = [sys.executable, *code, "run", model, PROMPT, "--max-tokens", "8", "--json"]
        return subprocess.Popen(
            [*command, "--ram", "512MiB", "--context", "256", *flags],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self, model: str = "mixtral-8x7b", *flags: str) -> dict[str, Any]:
        process = self.start(model, *flags)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def end_when(
        self, condition: Callable[[], bool], how: signal.Signals = signal.SIGKILL
    ) -> tuple[int, str]:
        """Start a run and end it where the condition holds, and it is held; its exit code and stderr."""
        self.go_on.unlink(missing_ok=True)
        process = self.start(code=("-c", HELD, CONVERTED_AT_KILL, str(self.go_on)))
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None, f"it ended by itself: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        self.hub.hold(None)
        self.go_on.touch()
        out, err = process.communicate(timeout=200)
        assert out == ""
        return process.returncode, err

    def weights_sent(self) -> Counter[str]:
        return Counter({name: n for name, n in self.hub.sent.items() if name.endswith(".safetensors")})

    def blobs(self) -> dict[str, int]:
        """Sizes of what the Hub cache holds, finished or not, by name."""
        found = {}
        for path in self.cache.glob("models--*/blobs/*"):
            with suppress(FileNotFoundError):  # it has come to its end, under its final name
                found[path.name] = path.stat().st_size
        return found

    def layers(self) -> dict[str, int]:
        """Converted layers and when they were written."""
        return {path.name: path.stat().st_mtime_ns for path in self.home.rglob("layer-*.safetensors")}

    def check_clean(self) -> None:
        """Nothing temporary is left, and every lock can be had.

        huggingface-hub 2 fetches config and tokenizer into files with names of chance, which it does not take
        up again: a kill in the middle of one leaves some hundred bytes of its own.
        """
        files = [path for folder in (self.home, self.cache) for path in folder.rglob("*") if path.is_file()]
        left = [path for path in files if path.suffix in (".tmp", ".incomplete", ".partial")]
        theirs = re.compile(r"[0-9a-f]+\.[0-9a-f]{8}\.incomplete")
        assert [p for p in left if not (theirs.fullmatch(p.name) and p.stat().st_size < 1 << 16)] == []
        for path in files:
            if path.suffix == ".lock":
                with FileLock(path, timeout=0):
                    pass


def same_answer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("text", "token_ids", "finish_reason"))


def answer_of(name: str | Path, **options: Any) -> dict[str, Any]:
    """What `Machine.answer` finds, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the commands, whose sums are to be the same
    with moe_local.load(name, context=256, **options) as model:
        answer = model.generate(PROMPT, max_new_tokens=8)
    torch.set_num_threads(threads)
    return {"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answer of the same model from a folder, in one go and in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LOCAL_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        answer = answer_of(checkpoint, ram="512MiB")
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 8
    return answer


def interrupted_download(machine: Machine, sizes: Collection[int], how: signal.Signals) -> tuple[int, str]:
    """End a run when some shards, of these sizes, are there and others half-way."""
    machine.hub.bytes_per_second = 8_000_000
    machine.hub.hold(sum(sizes) * 2 // 3)

    def some() -> bool:
        there = [size for name, size in machine.blobs().items() if "." not in name]
        return max(there, default=0) >= min(sizes) and sum(machine.weights_sent().values()) > sum(sizes) // 3

    ended = machine.end_when(some, how)
    machine.hub.bytes_per_second = None
    return ended


def converting(machine: Machine) -> bool:
    return CONVERTED_AT_KILL in machine.layers()


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["one kill", "two kills"])
def test_first_use_through_kills(
    undisturbed: Any, checkpoint: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    """Of the command while it converts, or before that while it downloads, too (as test_hub.py has one).
    What it left is taken up by this process."""
    repo = hub.add_repo(REPO, checkpoint)
    machine = Machine(tmp_path, hub)
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    blob_of = {name: repo.etag(name) for name in sizes}

    if twice:
        interrupted_download(machine, sizes.values(), signal.SIGKILL)
        hub.settle()  # before that, what is written to dead connections counts
    sent, blobs = machine.weights_sent(), machine.blobs()
    finished = {name for name in sizes if blobs.get(blob_of[name]) == sizes[name]}
    assert len(finished) in (range(1, len(sizes)) if twice else (0,))

    code, _ = machine.end_when(lambda: converting(machine))
    assert code == -signal.SIGKILL
    assert not list(machine.home.rglob("manifest.json"))
    again = machine.weights_sent() - sent
    for name, size in sizes.items():
        have = size if name in finished else blobs.get(f"{blob_of[name]}.incomplete", 0)
        assert again[name] == size - have, (
            f"{name} was sent again from {size - again[name]}, {have} were there"
        )
    layers = machine.layers()
    whole = {name for name in layers if name <= CONVERTED_AT_KILL}

    # from now on without the Hub, by any of its names, with another share of the experts in memory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MOE_LOCAL_HOME", str(machine.home))
    hub.requests.clear()
    assert answer_of(REPO, slots=2) == undisturbed
    assert not hub.requests
    assert {name: machine.layers()[name] for name in whole} == {name: layers[name] for name in whole}
    assert len(machine.layers()) == 8
    machine.check_clean()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_first_use_through_two_interrupts(
    undisturbed: Any, checkpoint: Path, hub_servers: Callable[[], Any], tmp_path: Path, how: signal.Signals
) -> None:
    hub = hub_servers()
    hub.add_repo(REPO, checkpoint)
    machine = Machine(tmp_path, hub)
    sizes = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    for code, err in (
        interrupted_download(machine, sizes, how),
        machine.end_when(lambda: converting(machine), how),
    ):
        assert code == (130 if how == signal.SIGINT else 143)
        assert len(err.splitlines()) <= 2  # what it takes, and why it ended
        assert "Traceback" not in err
    assert same_answer(machine.answer(), undisturbed)
    machine.check_clean()


@pytest.mark.slow
def test_first_use_through_kills_at_random_moments(
    undisturbed: Any, checkpoint: Path, hub_servers: Callable[[], Any], tmp_path: Path
) -> None:
    """Twelve kills, each a little later into the work than the last."""
    hub = hub_servers()
    hub.add_repo(REPO, checkpoint)
    hub.bytes_per_second = 20_000_000
    machine = Machine(tmp_path, hub)
    for attempt in range(12):
        process = machine.start()
        time.sleep(2.0 + 0.4 * attempt)
        process.kill()
        process.communicate()
    assert same_answer(machine.answer(), undisturbed)
    machine.check_clean()


@pytest.mark.slow
def test_errors_of_the_hub_are_one_line(
    hub_servers: Callable[[], Any], checkpoint: Path, tmp_path: Path
) -> None:
    hub = hub_servers()
    machine = Machine(tmp_path, hub)
    for flags, code, words in (
        (("no/such-repo",), 4, "not found"),
        (("mixtral-8x7",), 4, "did you mean mixtral-8x7b"),
        (("mixtral-8x7b", "--slots", "1"), 2, "slots 1 is below"),
        (("mixtral-8x7b", "--ram", "1MiB"), 3, "does not fit"),
    ):
        if flags[0] == "mixtral-8x7b":
            hub.add_repo(REPO, checkpoint)
        process = machine.start(*flags)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (code, ""), err
        assert len(err.splitlines()) == 1
        assert words in err
