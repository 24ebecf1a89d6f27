"""Fixtures for all tests. What tests import from one another is in support/."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings

# Set before anything imports torch, and for the commands that tests start: tiny models gain nothing from a
# second thread, and threads that spin for each other on a busy machine make them ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Output must not depend on the terminal settings of whoever runs the tests. And a script that runs the suite
# in its background makes it ignore SIGINT, which the commands that tests start must not inherit.
for _name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, so that no change fails for code that it did not touch; FUZZ=anew tries others.
# No deadline (hypothesis's default is 0.2 s), since the machine may pause during an example.
settings.register_profile(
    "moe_local",
    derandomize=os.environ.get("FUZZ") != "anew",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("moe_local")

# click before 8.2 mixes stderr into stdout by default.
if "mix_stderr" in inspect.signature(CliRunner).parameters:
    CliRunner.__init__ = functools.partialmethod(CliRunner.__init__, mix_stderr=False)  # type: ignore[assignment]


LOOKED_UP = {"nf4", "q3", "mxfp4"}
"""Formats whose kernels for AVX-512 without VBMI differ from those with it."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On a machine with VBMI, skip tests of the kernels without it for formats whose kernels are the same."""
    from moe_local.offload.native.library import ISAS, library

    callspec = getattr(item, "callspec", None)
    given = {value for value in callspec.params.values() if isinstance(value, str)} if callspec else set()
    lib = library() if "avx512_vnni" in given and not given & LOOKED_UP else None
    if lib is not None and ISAS[lib.moe_best_isa()] == "avx512":
        pytest.skip("as avx512")


def pytest_configure(config: pytest.Config) -> None:
    """Distribute files to workers in the order of `pytest_collection_modifyitems`, not by number of tests."""
    config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Freeze all imported and collected objects, which live to the end, so that the garbage collector skips
    them: that took a tenth of the time, most of it in tests that check that everything is freed."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Unfreeze, so that Python frees everything at exit: else Triton's bindings print a page about leaks."""
    gc.unfreeze()


SLOW_S = 900
"""Default time limit of slow tests in seconds: several times what any takes, since machines differ."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set slow tests' time limits. Run this folder's long tests first: last, they would idle a worker."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def home_of_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MOE_LOCAL_HOME, a separate folder for each test file, so that tests neither see nor change the user's.
    Tests that need an empty one set another."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LOCAL_HOME", str(folder))
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """A set for tests to fill with files whose disks count as hung after 0.3 seconds.

    Only time in which nothing but these files is being read counts, since other reads may take long on a busy
    machine; pauses of the whole machine hardly count.
    """
    from moe_local.offload.system import hung, patience

    gone: set[Path] = set()

    class Impatient(patience.Patience):
        def __init__(self, crew: Any) -> None:
            super().__init__()
            self._crew = crew

        def wait(self, changed: Any, seconds: float) -> None:
            before = self._waited
            super().wait(changed, seconds)
            doing = set(self._crew._doing.values())
            if not doing or doing - gone:
                self._waited = before

    make = hung._Crew.__init__

    def made(crew: Any, *jobs: Any) -> None:
        make(crew, *jobs)
        crew._patience = Impatient(crew)

    monkeypatch.setattr(hung._Crew, "__init__", made)
    monkeypatch.setenv(patience.VARIABLE, "0.3")
    for module in (hung, patience):
        monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.02)
    return gone


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_checkpoint("mixtral", shards=1, dtype=torch.float32, tokenizer=False, seed=0, **config) -> folder.

    The same arguments give the same folder during the whole session: copy it before changing it.
    """
    from support import tiny_models

    made: dict[str, Path] = {}

    def make(model_type: str, **options: Any) -> Path:
        key = repr((model_type, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny_{model_type}")
            made[key] = tiny_models.write_checkpoint(folder, model_type, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_mixtral(make_checkpoint: Callable[..., Path]) -> Path:
    """A Mixtral checkpoint folder, fp32: 3 layers of 8 experts, top-2, hidden 64, with a tokenizer."""
    return make_checkpoint("mixtral", tokenizer=True)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(make_checkpoint: Callable[..., Path]) -> Path:
    """A Qwen3-MoE checkpoint folder, fp32: 3 layers of 8 experts, top-2, hidden 64, with a tokenizer."""
    return make_checkpoint("qwen3_moe", tokenizer=True)


@pytest.fixture(scope="session")
def mixtral_19(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral in the published layout: 19 bf16 shards and their index, 3 layers, with a tokenizer."""
    import synthetic

    from support import tiny_models

    folder = tmp_path_factory.mktemp("mixtral_19")
    shape = synthetic.Shape(64, 96, layers=3, heads=4, kv_heads=2, vocab=tiny_models.VOCAB, max_context=4096)
    synthetic.mixtral_19_shards(folder, shape)
    tiny_models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def publish(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """publish("mixtral", **options of support/published.py) -> the quantized folder and its twin, once."""
    from support import published

    made: dict[str, tuple[Path, Path]] = {}

    def publish(model_type: str, **options: Any) -> tuple[Path, Path]:
        key = repr((model_type, options))
        if key not in made:
            source = make_checkpoint(model_type, tokenizer=True)
            quantize = published.mxfp4 if model_type == "gpt_oss" else published.fp8
            made[key] = quantize(source, tmp_path_factory.mktemp(model_type), **options)
        return made[key]

    return publish


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Makes Triton's interpreter patch its language once per launch, not per call."""
    from support.quick_interpreter import quicken

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(scope="session")
def hub_servers() -> Iterator[Callable[[], Any]]:
    """hub_servers() -> a Hub like `hub_server`; any number of them, which run until the session ends."""
    from support import hub_server

    with contextlib.ExitStack() as servers:
        yield lambda: servers.enter_context(hub_server.running())


@pytest.fixture
def hub_server() -> Iterator[Any]:
    """A Hub on 127.0.0.1 (support/hub_server.py): `.url`, `.env(home)`, `.add_repo(id, folder)`, `.sent`.

    The Hub library reads HF_ENDPOINT when it is imported, so pass `.env(home)` to a subprocess, or use the
    `hub` fixture to reach it from this process.
    """
    from support import hub_server

    with hub_server.running() as server:
        yield server


@pytest.fixture
def hub(hub_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub_server`, with this process's Hub library set to use it, and an empty cache in `tmp_path`."""
    from huggingface_hub import constants

    for name, value in hub_server.env(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, int(os.environ[name]))
    return hub_server


@pytest.fixture(scope="session")
def make_device() -> Callable[..., Any]:
    """make_device(seed=0, luck=0.3, lazy=False) -> a Device with late copies (support/fake_device.py)."""
    from support.fake_device import FakeDevice

    return FakeDevice


@pytest.fixture(scope="session")
def any_scheduler() -> Callable[..., Any]:
    """any_scheduler(seed=0, mode="auto") -> a MissScheduler that decides at random (support/store_rig.py)."""
    from support.store_rig import AnyScheduler

    return AnyScheduler


@pytest.fixture
def make_rig(tmp_path: Path, make_device: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """make_rig("ram+disk", slots=3, seed=0, ...) -> a store with known experts (support/store_rig.py).

    It is closed at the end of the test, which fails if the rig's device has recorded a fault.
    """
    from support.store_rig import Rig

    rigs: list[Any] = []

    def make(mode: str = "disk", *, device: Any = None, device_seed: int = 0, **options: Any) -> Any:
        if mode != "disk" and device is None:
            device = make_device(device_seed)
        rig = Rig(tmp_path, mode, device=device, **options)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def read_gate(make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A ReadGate that replaces os.preadv (support/store_rig.py); it is opened before rigs are closed."""
    from support.store_rig import ReadGate

    gate = ReadGate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    yield gate
    gate.open()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: small tensors gain nothing by more, and forked children must not wait
    for threads that were not forked with them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
