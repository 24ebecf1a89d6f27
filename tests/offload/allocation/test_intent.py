"""A conversion to formats that were chosen goes on with them, whatever they would be chosen by now."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_local
from moe_local.cache.errors import ExpertFileError, MoeLocalError
from moe_local.offload.allocation.allocate import sensitivity_path
from moe_local.offload.allocation.expected import candidates
from moe_local.offload.allocation.intend import OUTDATED
from moe_local.offload.allocation.misses import MissCost
from moe_local.offload.allocation.sensitivity import LayerSensitivity, Sensitivity
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.conversion import begun_conversions, open_experts
from moe_local.offload.expert_file import intent as intent_module
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile
from moe_local.offload.expert_file.intent import INTENT, Intent
from moe_local.offload.expert_file.repair import repair_experts
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan import fit as fit_module
from moe_local.offload.plan.plan import Plan
from moe_local.offload.quantize.mix import Mix
from support import kill_points

NAME = "mixed:6"
OTHERWISE = MissCost(1e-5, 0.5)
"""What another start may find: a slower link, for which seldom used experts take the bits."""
PRINT = "0" * 32


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tiny_mixtral: Path, home: Path) -> Checkpoint:
    """One whose experts have been measured."""
    found = Checkpoint.open(tiny_mixtral)
    measure(found, text=None)
    return found


def measure(checkpoint: Checkpoint, text: str | None, seed: int = 0) -> None:
    """Keep random figures as if a text had been read."""
    chance = random.Random(seed)
    formats = candidates(checkpoint.spec.dtype)
    layers = tuple(
        LayerSensitivity(
            chance.uniform(0.5, 1.5),
            tuple(chance.uniform(0.02, 0.5) for _ in range(layer.num_experts)),
            {
                name: tuple(chance.uniform(0.5, 2) * 0.05 / 4**number for _ in range(layer.num_experts))
                for number, name in enumerate(formats)
            },
        )
        for layer in checkpoint.spec.layers
    )
    Sensitivity(checkpoint.name, checkpoint.fingerprint, text, 512, layers).save(sensitivity_path(checkpoint))


class Reads:
    """The experts that are read from a checkpoint; interrupts at one of them, if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int]] = []
        self.fail_at: tuple[int, int] | None = None
        real = Checkpoint.read_expert

        def read_expert(checkpoint: Checkpoint, layer: Any, expert: int, *args: Any) -> Any:
            if (layer.index, expert) == self.fail_at:
                raise KeyboardInterrupt
            self.read.append((layer.index, expert))
            return real(checkpoint, layer, expert, *args)

        monkeypatch.setattr(Checkpoint, "read_expert", read_expert)

    def layers(self) -> set[int]:
        return {layer for layer, _ in self.read}

    def interrupt(self, work: Callable[[], object], at: tuple[int, int] = (1, 3)) -> None:
        """`work`, of which the layers before `at` are kept."""
        self.fail_at = at
        with pytest.raises(KeyboardInterrupt):
            work()
        self.fail_at, self.read = None, []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def mix_of(file: Any) -> Mix:
    assert isinstance(file, ExpertFile)
    assert find_damage(file) == []
    return file.mix


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


def gone_on(caplog: pytest.LogCaptureFixture, experts: str, times: int = 1) -> None:
    """One line was said each time, which names a folder that is there."""
    found = lines(caplog)
    assert len(found) == times
    for line in found:
        said, _, folder = line.rpartition(" ")
        assert said == f"going on with the {experts} that was chosen when this conversion began; " + (
            "to choose anew, remove"
        )
        assert (Path(folder) / MANIFEST).exists()


def test_an_interrupted_mix_goes_on_whatever_misses_cost_by_now(
    checkpoint: Checkpoint, reads: Reads, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    calm = mix_of(open_experts(checkpoint, NAME, tmp_path / "calm"))
    assert calm != mix_of(open_experts(checkpoint, NAME, tmp_path / "other", misses=OTHERWISE))
    assert lines(caplog) == []
    reads.interrupt(lambda: open_experts(checkpoint, NAME))
    assert mix_of(open_experts(checkpoint, NAME, misses=OTHERWISE)) == calm
    assert reads.layers() == {1, 2}
    gone_on(caplog, NAME)
    assert mix_of(open_experts(checkpoint, NAME, misses=OTHERWISE)) == calm
    assert lines(caplog) == []


def test_other_bits_are_another_choice(checkpoint: Checkpoint, reads: Reads, tmp_path: Path) -> None:
    """Also in a folder of the user's own."""
    reads.interrupt(lambda: open_experts(checkpoint, NAME, tmp_path / "mine"))
    file = open_experts(checkpoint, "mixed:7", tmp_path / "mine")
    assert mix_of(file).name == "mixed:7"
    assert Intent.read(tmp_path / "mine", checkpoint.fingerprint) == Intent(
        checkpoint.name, checkpoint.fingerprint, "mixed:7", file.mix
    )


def test_a_text_that_was_read_since_is_chosen_by(
    checkpoint: Checkpoint, reads: Reads, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    by_weights = mix_of(open_experts(checkpoint, NAME, tmp_path / "calm"))
    reads.interrupt(lambda: open_experts(checkpoint, NAME))
    measure(checkpoint, text="abc", seed=1)
    reads.interrupt(lambda: open_experts(checkpoint, NAME))
    assert lines(caplog) == [OUTDATED % NAME]
    sensitivity_path(checkpoint).unlink()  # what is gone says nothing against what was chosen by it
    found = mix_of(open_experts(checkpoint, NAME))
    assert found != by_weights
    gone_on(caplog, NAME)
    assert reads.layers() == {1, 2}
    folder = Path(open_experts(checkpoint, NAME).folder)
    intent = Intent.read(folder, checkpoint.fingerprint)
    assert intent is not None
    assert (intent.text, intent.mix) == ("abc", found)


def test_a_damaged_intent_is_chosen_anew(
    checkpoint: Checkpoint, reads: Reads, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """With a line. As what it depends on is the same, so is the mix, and what was converted is kept."""
    folder = tmp_path / "f"
    reads.interrupt(lambda: open_experts(checkpoint, NAME, folder))
    (folder / INTENT).write_text((folder / INTENT).read_text().replace("nf4", "int8", 1))
    file = open_experts(checkpoint, NAME, folder)
    assert reads.layers() == {1, 2}
    assert lines(caplog) == [f"{folder / INTENT} is damaged, so formats are chosen anew"]
    intent = Intent.read(folder, checkpoint.fingerprint)
    assert intent is not None
    assert intent.mix == mix_of(file)


def sealed(fields: dict[str, Any]) -> str:
    """With a right checksum."""
    fields = {name: value for name, value in fields.items() if name != "checksum"}
    return json.dumps(fields | {"checksum": intent_module.checksum_of(fields)})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda fields: json.dumps(fields)[:-30], "damaged"),
        (lambda fields: json.dumps(fields).replace("nf4", "int8", 1), "damaged"),
        (lambda fields: sealed(fields | {"version": 2}), "of version 2, not 1"),
        (lambda fields: sealed(fields | {"fingerprint": 32 * "1"}), "of another checkpoint"),
        (lambda fields: sealed(fields | {"formats": [["q99"]]}), "of another version, with formats that are"),
        (lambda fields: sealed(fields | {"experts": "q99", "formats": None}), "of another version, with"),
        (lambda fields: sealed(fields | {"formats": 3}), "damaged"),
        (lambda fields: "[" * 100_000, "damaged"),
    ],
)
def test_what_is_no_intent_is_told_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], str], why: str
) -> None:
    assert Intent.read(tmp_path, PRINT, say=True) is None
    whole = Intent("m", PRINT, NAME, Mix(NAME, (("nf4", "int8"), ("q2",))), "what is free", "abc")
    whole.keep(tmp_path)
    assert Intent.read(tmp_path, PRINT, say=True) == whole
    assert [path.name for path in tmp_path.iterdir()] == [INTENT]
    assert lines(caplog) == []
    (tmp_path / INTENT).write_text(change(json.loads((tmp_path / INTENT).read_text())))
    assert Intent.read(tmp_path, PRINT) is None
    assert lines(caplog) == []
    assert Intent.read(tmp_path, PRINT, say=True) is None
    (line,) = lines(caplog)
    assert line.startswith(f"{tmp_path / INTENT} is {why}")
    assert "\n" not in line


def test_an_intent_contradicts_itself_nowhere() -> None:
    mix = Mix(NAME, (("nf4",),))
    for experts, wrong in ((NAME, None), ("int8", mix), ("mixed:7", mix)):
        with pytest.raises(ExpertFileError):
            Intent("m", PRINT, experts, wrong)


def test_a_folder_that_cannot_be_written_is_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "f" / INTENT).mkdir(parents=True)
    with pytest.raises(MoeLocalError, match=r"cannot write .*intent\.json"):
        open_experts(checkpoint, NAME, tmp_path / "f")


# --- the manifest is gone for a while


def test_a_repair_that_is_interrupted_keeps_the_mix(
    checkpoint: Checkpoint, reads: Reads, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Also of a file that was made before intents were kept."""
    folder = tmp_path / "f"
    mix = mix_of(open_experts(checkpoint, NAME, folder))
    (folder / INTENT).unlink()
    shard = ExpertFile.open(folder).layers[2].path
    shard.write_bytes(bytes(shard.stat().st_size))
    reads.interrupt(lambda: repair_experts(folder, checkpoint), (2, 1))
    assert not (folder / MANIFEST).exists()
    assert mix_of(open_experts(checkpoint, NAME, folder, misses=OTHERWISE)) == mix
    assert reads.layers() == {2}
    (folder / MANIFEST).write_text("{")
    lines(caplog)
    assert mix_of(open_experts(checkpoint, NAME, folder, misses=OTHERWISE)) == mix
    assert reads.layers() == {2}
    gone_on(caplog, NAME)


# --- auto


class Machine:
    """Free RAM that changes from start to start."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.ram = 1 << 30
        monkeypatch.setattr(fit_module, "free_ram", lambda reserve=True: self.ram)
        plan = moe_local.fit(model, experts="nf4", context=64, device="cpu")
        self.fixed, numel = plan.bytes.fixed, plan.request.spec.expert_numel
        self.byte_bits = 8 / numel

    def plan(self, bits: float, **options: Any) -> Plan:
        """What "auto" comes to where so many bits a weight are free for experts."""
        self.ram = self.fixed + int(bits / self.byte_bits)
        return moe_local.fit(self.model, experts="auto", context=64, device="cpu", **options)


@pytest.fixture
def machine(tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tiny_mixtral, monkeypatch)


def convert(machine: Machine, bits: float, out: Path | None = None, **options: Any) -> ExpertFile:
    plan = machine.plan(bits, **options)
    return ExpertFile.open(moe_local.convert(machine.model, out, "auto", plan=plan))


@pytest.mark.parametrize("own_folder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_auto_goes_on_with_what_it_came_to(
    checkpoint: Checkpoint,
    machine: Machine,
    reads: Reads,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    own_folder: bool,
) -> None:
    """More or less is free by now."""
    out = tmp_path / "mine" if own_folder else None
    first = machine.plan(6.2).request.experts
    assert first.startswith("mixed:")
    assert machine.plan(6.0).request.experts != first != machine.plan(7.0).request.experts
    reads.interrupt(lambda: convert(machine, 6.2, out))
    reads.interrupt(lambda: convert(machine, 7.0, out), (2, 0))
    file = convert(machine, 6.0, out)
    assert file.format == first
    assert reads.layers() == {2}
    gone_on(caplog, first, times=2)
    assert begun_conversions(checkpoint, machine.plan(6.2).request.budget, out) == []
    if not own_folder:
        assert [path.name for path in file.folder.parent.iterdir() if path.is_dir()] == [file.folder.name]


def test_another_budget_is_another_choice(
    checkpoint: Checkpoint, machine: Machine, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is asked for, that is. And back to the first one it goes on with the first."""
    first = machine.plan(6.2).request.experts
    reads.interrupt(lambda: convert(machine, 6.2))
    ram = machine.fixed + int(7.0 / machine.byte_bits)
    other = convert(machine, 9.0, ram=ram)
    assert other.format == machine.plan(9.0, ram=ram).request.experts != first
    assert lines(caplog) == []
    assert convert(machine, 6.3).format == first
    gone_on(caplog, first)


def test_what_does_not_fit_any_more_is_left(machine: Machine, checkpoint: Checkpoint, reads: Reads) -> None:
    first = machine.plan(40.0).request.experts
    reads.interrupt(lambda: convert(machine, 40.0))
    budget = machine.plan(40.0).request.budget
    assert begun_conversions(checkpoint, budget) == [first]
    for eighths in range(16, -40, -2):
        plan = machine.plan(eighths / 8)
        if not moe_local.fit(machine.model, experts=first, context=64, device="cpu").fits:
            break
    assert plan.fits
    assert convert(machine, eighths / 8).format == plan.request.experts != first


def test_auto_that_came_to_one_format_goes_on_with_it(
    checkpoint: Checkpoint, machine: Machine, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine.plan(40.0).request.experts
    assert not first.startswith("mixed:")
    reads.interrupt(lambda: convert(machine, 40.0))
    assert machine.plan(6.2).request.experts.startswith("mixed:")
    file = convert(machine, 6.2)
    assert file.format == first
    assert reads.layers() == {1, 2}
    gone_on(caplog, first)


@pytest.mark.slow
def test_load_goes_on_with_what_was_begun(
    checkpoint: Checkpoint, machine: Machine, reads: Reads, tiny_mixtral: Path
) -> None:
    options = {"experts": "auto", "context": 64, "device": "cpu"}
    first = machine.plan(6.2).request.experts
    reads.interrupt(lambda: moe_local.load(tiny_mixtral, **options))
    machine.plan(7.0)
    with moe_local.load(tiny_mixtral, **options) as model:
        assert model.plan.request.experts == first
        assert model.generate([5, 6, 7], max_new_tokens=2).token_ids
    assert reads.layers() == {1, 2}


def test_budgets_in_words() -> None:
    assert LoadOptions().budget == LoadOptions(experts="auto", policy="lru").budget == "what is free"
    assert LoadOptions(ram="1GiB", dense="int8").budget == "ram=1073741824, dense=int8"
    assert LoadOptions(ram="1024MiB").budget == LoadOptions(ram="1GiB").budget


# --- killed


class Choosing:
    """A conversion to a chosen mix that dies, and goes on where another mix would be chosen."""

    def __init__(self, checkpoint: Checkpoint, kills: Any, root: Path) -> None:
        self.checkpoint = checkpoint
        self.kills = kills
        self.root = root
        self.calm = self.contents(self.convert("calm"))
        self.otherwise = self.contents(self.convert("otherwise", OTHERWISE))
        assert self.calm != self.otherwise
        self.moments = kills.effects(lambda: self.convert("counted"))

    def convert(self, name: str, misses: MissCost | None = None) -> Path:
        return open_experts(self.checkpoint, NAME, self.root / name, misses=misses).folder

    @staticmethod
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def kill(self, effect: int) -> bool:
        """Whether the choice had been kept; nothing was converted if not."""
        name = f"killed{effect}"
        folder = self.root / name
        assert self.kills.killed_at(lambda: self.convert(name), effect)
        kept = (folder / INTENT).exists()
        if kept:
            intent = Intent.read(folder, self.checkpoint.fingerprint)
            assert intent is not None
            assert intent.mix == ExpertFile.open(self.root / "calm").mix
        elif folder.exists():
            assert not any("layer" in path.name for path in folder.iterdir())
        self.convert(name, OTHERWISE)
        assert self.contents(folder) == (self.calm if kept else self.otherwise)
        shutil.rmtree(folder)
        return kept


@pytest.fixture
def choosing(checkpoint: Checkpoint, tmp_path: Path) -> Choosing:
    return Choosing(checkpoint, kill_points, tmp_path / "killed")


def test_killed_while_converting(choosing: Choosing) -> None:
    first = choosing.moments.index("replace")  # of the intent
    assert not choosing.kill(first)
    assert choosing.kill(first + 1)
    assert choosing.kill(len(choosing.moments) - 5)


@pytest.mark.slow
def test_killed_at_many_effects(choosing: Choosing) -> None:
    """At every one around the choice, and at a third of the others."""
    renamed = choosing.moments.index("replace")
    effects = [*range(renamed + 6), *range(renamed + 6, len(choosing.moments), 3)]
    kept = [choosing.kill(effect) for effect in effects]
    assert kept == [effect > renamed for effect in effects]


@pytest.mark.slow
def test_auto_is_killed_at_many_moments(checkpoint: Checkpoint, machine: Machine, home: Path) -> None:
    """With other memory free each time: what is made in the end is what was chosen first, and that alone."""
    bits = [6.2, 5.8, 7.0, 6.5, 7.4]
    moments = kill_points.Moments(5, kill_points.duration(lambda: convert(machine, 6.2, home / "timed")))
    experts = sensitivity_path(checkpoint).parent
    killed = 0
    while killed < 12:
        first, finished = None, False
        while not finished:
            free = moments.random.choice(bits)
            killed += moments.kill(lambda free=free: convert(machine, free))
            made = [path.parent for path in experts.glob(f"*/{INTENT}")]
            finished = bool(made) and (made[0] / MANIFEST).exists()
            first = first or (made[0] if made else None)
            assert made == ([first] if first else [])
        assert first is not None
        assert find_damage(ExpertFile.open(first)) == []
        shutil.rmtree(first)
