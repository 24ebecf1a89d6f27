"""SIGKILL at any moment of a conversion, a repair, a download, a generation.

Afterwards what is there opens or goes on, no byte is wrong, no orphan is larger than a shard and no lock
is held. Children are forked and really killed: before an effect on the disk that is named by its number, or
after some time.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

import moe_local
from moe_local.offload.checkpoint.hub import cached_folder, resolve
from moe_local.offload.checkpoint.sha256 import known_sha256
from moe_local.offload.expert_file.convert import convert_experts
from moe_local.offload.expert_file.expert_file import MANIFEST, ExpertFile, read_manifest
from moe_local.offload.expert_file.expert_shard import TEMPORARY, ShardPlan
from moe_local.offload.expert_file.usage import FILE_NAME, read_usage
from moe_local.offload.expert_file.verify import damaged_frame, find_damage
from moe_local.offload.quantize.codec import codec_for
from support import kill_points, random_experts

BF16 = codec_for("bf16")
PROMPT = [5, 6, 7, 9, 4]


pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unlocked(*roots: Path) -> None:
    """No lock below these folders is held."""
    for root in roots:
        for path in root.rglob("*.lock"):
            filelock.FileLock(path).acquire(timeout=0).lock.release()


def sound(folder: Path, plans: list[ShardPlan], calm: dict[str, bytes]) -> None:
    """What a killed conversion leaves: finished shards without a wrong byte, one begun at most."""
    if not folder.exists():
        return
    found = contents(folder)
    begun = [name for name in found if name.endswith(TEMPORARY)]
    assert len(begun) <= 1
    assert all(len(found[name]) <= plans[0].nbytes for name in begun)
    for plan in plans:
        if plan.file in found:
            checksums = plan.stored_checksums(folder)
            assert checksums is not None, f"{plan.file} has its name and is not whole"
            assert found[plan.file] == calm[plan.file]
    if MANIFEST in found:
        assert not find_damage(ExpertFile.open(folder))
    unlocked(folder.parent)


class Conversion:
    """A small model, what it converts to, and conversions of it that die."""

    def __init__(self, kills: Any, home: Path) -> None:
        self.kills = kills
        self.home = home
        self.source = random_experts.RandomExperts(layers=3, experts=4)
        file = convert_experts(self.source, BF16, home / "calm")
        self.calm = contents(home / "calm")
        self.plans = [
            ShardPlan(file.fingerprint, file.format, layer, stored.name, stored.layouts)
            for layer, stored in enumerate(file.layers)
        ]
        self.moments = kills.effects(lambda: convert_experts(self.source, BF16, home / "counted"))

    def die(self, folder: Path, effect: int) -> bool:
        died = self.kills.killed_at(lambda: convert_experts(self.source, BF16, folder), effect)
        sound(folder, self.plans, self.calm)
        return died

    def finish(self, folder: Path) -> None:
        """Go on with what was killed: to the bytes of an undisturbed conversion."""
        convert_experts(self.source, BF16, folder)
        assert contents(folder) == self.calm
        shutil.rmtree(folder)


@pytest.fixture
def conversion(tmp_path: Path) -> Conversion:
    return Conversion(kill_points, tmp_path / "home")


def kill_conversions(conversion: Conversion, effects: list[int], seed: int = 0) -> None:
    """Kill at each of these; half of the conversions are killed again when they go on."""
    moments = random.Random(seed)
    for number, effect in enumerate(effects):
        folder = conversion.home / f"killed{number}"
        assert conversion.die(folder, effect)
        while moments.random() < 0.5 and conversion.die(folder, moments.randrange(len(conversion.moments))):
            pass
        conversion.finish(folder)


def test_conversions(conversion: Conversion) -> None:
    assert {"open", "write", "half", "fsync", "replace", "opened"} <= set(conversion.moments)
    kill_conversions(conversion, random.Random(1).sample(range(len(conversion.moments)), 4))


@pytest.mark.slow
def test_conversions_at_every_effect(conversion: Conversion) -> None:
    kill_conversions(conversion, list(range(len(conversion.moments))))


class Damaged:
    """A converted model with three damaged experts and a damaged header, and repairs that die."""

    def __init__(self, kills: Any, home: Path) -> None:
        self.kills = kills
        self.source = random_experts.RandomExperts(layers=2, experts=4)
        self.file = convert_experts(self.source, BF16, home / "whole")
        self.whole = contents(home / "whole")
        self.home = home
        for layer, expert in ((0, 1), (0, 3), (1, 0)):
            path, offset, nbytes = self.file.location(layer, expert)
            self._flip(path, offset + nbytes // 2)
        self._flip(self.file.layers[1].path, 100)
        self.damage = set(find_damage(self.file))
        assert len(self.damage) == 4
        counted = self.copy("counted")
        self.moments = kills.effects(lambda: self.repair(counted))

    @staticmethod
    def _flip(path: Path, at: int) -> None:
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.home / "whole", self.home / name))

    def repair(self, folder: Path) -> None:
        convert_experts(self.source, BF16, folder, check=True)

    def kill(self, effect: int) -> None:
        folder = self.copy(f"killed{effect}")
        assert self.kills.killed_at(lambda: self.repair(folder), effect)
        left = find_damage(read_manifest(folder))
        here = {damage._replace(path=self.file.layers[damage.layer].path) for damage in left}
        assert here <= self.damage, "what was whole is whole"
        self.repair(folder)
        assert contents(folder) == self.whole
        for layer, stored in enumerate(read_manifest(folder).layers):
            plan = ShardPlan(self.file.fingerprint, self.file.format, layer, stored.name, stored.layouts)
            assert damaged_frame(plan, stored) is None
        unlocked(self.home)


def test_repairs(tmp_path: Path) -> None:
    damaged = Damaged(kill_points, tmp_path / "home")
    assert set(damaged.moments) >= {"open", "write", "half", "fsync"}
    for effect in random.Random(2).sample(range(len(damaged.moments)), 3):
        damaged.kill(effect)


@pytest.mark.slow
def test_repairs_at_every_effect(tmp_path: Path) -> None:
    damaged = Damaged(kill_points, tmp_path / "home")
    for effect in range(len(damaged.moments)):
        damaged.kill(effect)


class Downloads:
    """A Hub in another process, a checkpoint of three shards on it, and pulls of it that die."""

    def __init__(self, kills: Any, source: Path, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self.kills = kills
        self.source = source
        self.cache = cache
        self.patch = patch
        self.shards = {path.name: path.read_bytes() for path in source.glob("*.safetensors")}

    def use(self, name: str) -> Path:
        """From now on the Hub cache is this, and new."""
        from huggingface_hub import constants

        folder = self.cache / name
        self.patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        return folder

    def pull(self) -> None:
        from huggingface_hub.utils import close_session

        close_session()  # its connections are the parent's
        resolve("org/model")

    def sound(self, folder: Path) -> None:
        blobs = list((folder / "models--org--model" / "blobs").glob("*"))
        largest = max(map(len, self.shards.values()))
        begun = [blob for blob in blobs if ".incomplete" in blob.name]
        assert all(blob.stat().st_size <= largest for blob in begun)
        found = cached_folder("org/model")
        for path in folder.glob("models--org--model/snapshots/*/*.safetensors"):
            assert path.read_bytes() == self.shards[path.name]
        if found is not None:
            self.whole(found)
        unlocked(folder)

    def whole(self, found: Path) -> None:
        assert {path.name: path.read_bytes() for path in found.glob("*.safetensors")} == self.shards
        names = {path.name for path in self.source.iterdir()}
        assert {path.name for path in found.iterdir()} == names
        assert all(known_sha256(found / name) for name in self.shards)

    def finish(self, folder: Path) -> None:
        assert self.kills.exit_status(self.kills.fork(self.pull)) == 0
        found = cached_folder("org/model")
        assert found is not None
        self.whole(found)
        assert not list(folder.rglob("*.incomplete"))
        shutil.rmtree(folder)


@pytest.fixture
def downloads(
    make_checkpoint: Callable[..., Path], hub_servers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Downloads]:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.utils import close_session, get_session

    imported = HfApi, hf_hub_download, snapshot_download, get_session()  # once, not in each child
    assert all(imported)
    close_session()
    source = make_checkpoint("mixtral", shards=3)

    def serve() -> Any:
        server = hub_servers()
        server.add_repo("org/model", source)
        return server

    with kill_points.served(serve) as url:
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield Downloads(kill_points, source, tmp_path / "hub", monkeypatch)


def kill_downloads(downloads: Downloads, kills: int, seed: int) -> None:
    """Kill so many, at random moments of an undisturbed download; each one or two times before it goes on."""
    downloads.use("calm")
    moments = downloads.kills.Moments(seed, downloads.kills.duration(downloads.pull))
    done = 0
    while done < kills:
        folder = downloads.use(f"killed{done}")
        for _ in range(moments.random.randint(1, 2)):
            done += moments.kill(downloads.pull)
            downloads.sound(folder)
        downloads.finish(folder)


@pytest.mark.slow
def test_downloads(downloads: Downloads) -> None:
    kill_downloads(downloads, 3, seed=1)


@pytest.mark.slow
def test_downloads_at_many_moments(downloads: Downloads) -> None:
    kill_downloads(downloads, 60, seed=2)


class Generations:
    """Generations that die, the conversion before the first token among them."""

    def __init__(self, kills: Any, checkpoint: Path, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.kills = kills
        self.checkpoint = checkpoint
        self.home = home
        self.patch = patch
        self.use("calm")
        self.calm = self.ids()  # first, so that children find everything imported
        self.use("counted")
        self.moments = kills.effects(self.generate)
        self.use("timed")
        self.length = kills.duration(self.generate)

    def use(self, name: str) -> Path:
        self.patch.setenv("MOE_LOCAL_HOME", str(self.home / name))
        return self.home / name

    def ids(self) -> list[int]:
        options = {"experts": "fp32", "dense": "fp32", "slots": 2, "context": 64}
        with moe_local.load(self.checkpoint, **options) as model:
            return model.generate(PROMPT, max_new_tokens=6, eos_token_id=None).token_ids

    def generate(self) -> None:
        self.ids()

    def sound(self, home: Path) -> None:
        shard = 8 * 3 * 64 * 96 * 4 + 2 * 4096
        known = {"*.lock", "layer-*.safetensors", MANIFEST, FILE_NAME, "bandwidths.json"}
        for path in home.rglob("*"):
            if path.is_file() and not any(path.match(pattern) for pattern in known):
                assert path.suffix == TEMPORARY or path.name.startswith(f".{FILE_NAME}."), path
                assert path.stat().st_size <= shard
            if path.name == MANIFEST:
                assert not find_damage(ExpertFile.open(path.parent))
            if path.name == FILE_NAME:
                assert read_usage(path.parent) is not None
        unlocked(home)

    def finish(self, home: Path) -> None:
        assert self.ids() == self.calm
        left = [path for path in home.rglob("*") if path.suffix == TEMPORARY or path.name.startswith(".")]
        assert not left
        shutil.rmtree(home)


@pytest.fixture
def generations(tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generations:
    return Generations(kill_points, tiny_mixtral, tmp_path / "homes", monkeypatch)


def test_generations(generations: Generations) -> None:
    home = generations.use("killed")
    last = len(generations.moments) - 1
    assert generations.kills.killed_at(
        generations.generate, last - 1
    )  # the counts of usage are being written
    generations.sound(home)
    delay = generations.length / 3
    while not generations.kills.killed_after(generations.generate, delay):
        delay /= 2  # a pause of the machine had come when the length was measured
    generations.sound(home)
    generations.finish(home)


@pytest.mark.slow
def test_generations_at_many_moments(generations: Generations) -> None:
    moments = random.Random(3)
    effects = moments.sample(range(len(generations.moments)), 15)
    for number, effect in enumerate(effects):
        home = generations.use(f"killed{number}")
        assert generations.kills.killed_at(generations.generate, effect)
        generations.sound(home)
        generations.kills.killed_after(generations.generate, moments.uniform(0, generations.length))
        generations.sound(home)
        generations.finish(home)
