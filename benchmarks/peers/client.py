"""The benchmark's end of the pipe to a peer: starts the peer and measures it (serve.py has the protocol)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

from contenders import Answer, Contender, Weights
from peers import install

from moe_local.offload.system.home import moe_local_home

HERE = Path(__file__).resolve().parent
PEERS = ("llama.cpp", "transformers")


class Peer(Contender):
    """A process that holds a model and answers prompts. A context manager, whose exit ends the process."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start the process and wait until the model is loaded. If it fails, raises SystemExit with its last
        lines on stderr."""
        self._command = command
        with contextlib.ExitStack() as undo:
            self._log = undo.enter_context(tempfile.TemporaryFile("w+"))
            self._process = undo.enter_context(
                subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=self._log, text=True)
            )
            undo.callback(self._process.terminate)
            self.hello = self._receive()
            self._open = undo.pop_all()
        super().__init__(self.hello["name"], Weights(**self.hello["weights"]))
        self.last: dict[str, Any] = {}
        """The peer's record of its last answer, figures included (serve.py)."""

    def answer(self, prompt: Sequence[int], tokens: int, *, keep: bool) -> None:
        record = self.ask(list(prompt), tokens)
        if keep:
            ids = tuple(record["ids"])
            self.answers.append(Answer(len(prompt), record["prefill_s"], record["decode_s"], ids))

    def ask(
        self, prompt: list[int] | list[list[int]], tokens: int, *, review: bool = False
    ) -> dict[str, Any]:
        """The peer's record of its answer (serve.py), to several prompts if it was started for as many."""
        assert self._process.stdin is not None
        request = {"prompt": prompt, "tokens": tokens, "review": review}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        self.last = self._receive()
        return self.last

    def summary(self, *arguments: Any) -> dict[str, Any]:
        about = {name: self.hello[name] for name in ("version", "detail", "threads")}
        return {**super().summary(*arguments), **about}

    def close(self) -> None:
        """End the process. Idempotent."""
        self._open.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            record: dict[str, Any] = json.loads(line)
            return record
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read().splitlines()[-5:]
        raise SystemExit("\n".join([f"the peer ended with {code}: {' '.join(self._command)}", *words]))


@dataclass(frozen=True)
class Setup:
    """How a peer holds the model."""

    context: int
    vram: int | None = None
    """Bytes of VRAM that transformers may fill; None: no peer uses a GPU."""
    n_cpu_moe: int = 0
    """On a GPU, the number of layers whose experts llama.cpp keeps in RAM; all the rest must fit the GPU."""
    flash_attention: str = "auto"
    """The value of llama.cpp's option of this name: auto, on or off."""
    sequences: int = 1
    """How many llama.cpp continues together, each with a context of `context` tokens."""
    random: bool = False
    """Whether peers make random weights in the checkpoint's shapes; it then needs only a config."""
    isa: str = "native"
    """For which processor llama.cpp is compiled; see PROCESSORS in install.py."""


def start(name: str, folder: Path, fingerprint: str, setup: Setup) -> Peer:
    """Start the peer `name` with the checkpoint in `folder`, after installing it and converting the
    checkpoint as needed.

    `fingerprint` identifies the checkpoint's weights. Raises SystemExit.
    """
    random = ["--random"] if setup.random else []
    if name == "transformers":
        vram = [] if setup.vram is None else ["--vram", str(setup.vram)]
        return Peer([sys.executable, str(HERE / "transformers_peer.py"), str(folder), *vram, *random])
    python = str(install.install(install.default_folder(setup.isa), setup.isa))
    file = gguf_of(folder, fingerprint, python, random=setup.random)
    on_gpu = [] if setup.vram is None else ["--n-cpu-moe", str(setup.n_cpu_moe)]
    peer = str(HERE / "llama_cpp_peer.py")
    attention = ["--flash-attention", setup.flash_attention]
    sequences = [] if setup.sequences == 1 else ["--parallel", str(setup.sequences)]
    return Peer([python, peer, str(file), "--context", str(setup.context), *attention, *on_gpu, *sequences])


def gguf_of(folder: Path, fingerprint: str, python: str, *, random: bool = False) -> Path:
    """The checkpoint in `folder` as a GGUF file, written by `python` first if need be. Raises SystemExit."""
    file = moe_local_home() / "benchmarks" / f"{folder.name}-{fingerprint[:16]}-q4_0.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [
            python,
            str(HERE / "gguf_file.py"),
            str(folder),
            str(file),
            *(["--random"] if random else []),
        ]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"{folder} could not be written as {file}; see above")
    return file
