"""Verifying an expert file: every damage named at once, whatever it is, and nothing else."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest

from moe_local.cache.errors import ExpertFileError
from moe_local.offload.expert_file import verify
from moe_local.offload.expert_file.convert import FormatChoice, convert_experts
from moe_local.offload.expert_file.expert_file import read_manifest
from moe_local.offload.expert_file.verify import HEADER, WRONG, find_damage
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.system import direct_io
from moe_local.offload.system.patience import PATIENCE_S
from support import random_experts


@pytest.fixture(params=["one size", "two sizes"])
def file(request, tmp_path):
    """An expert file; with experts of two sizes, too."""
    codec = codec_for("bf16")
    if request.param == "two sizes":
        codec = FormatChoice("both", lambda key: codec_for("bf16" if key.expert % 2 else "nf4"))
    return convert_experts(random_experts.RandomExperts(layers=3, experts=5), codec, tmp_path / "file")


@pytest.fixture(params=[1, 100_000, verify.BATCH])
def batch(request, monkeypatch):
    """Every expert on its own; some together; a shard at a time."""
    monkeypatch.setattr(verify, "BATCH", request.param)


def flip(path, offset):
    with open(path, "r+b") as shard:
        shard.seek(offset)
        byte = shard.read(1)[0]
        shard.seek(offset)
        shard.write(bytes([byte ^ 1 << random.randrange(8)]))


def found(file):
    return [(damage.layer, damage.expert, damage.what) for damage in find_damage(read_manifest(file.folder))]


@pytest.mark.usefixtures("batch")
def test_whole(file):
    seen = []
    assert find_damage(file, lambda *counts: seen.append(counts)) == []
    assert [counts[:2] for counts in seen] == [(done, 15) for done in range(1, 16)]
    assert seen[-1][2] == file.total_bytes


@pytest.mark.usefixtures("batch")
def test_all_flipped_bits_are_named(file):
    places = random.Random(1).sample([(layer, expert) for layer in range(3) for expert in range(5)], 6)
    for layer, expert in places:
        path, offset, nbytes = file.location(layer, expert)
        flip(path, offset + random.randrange(nbytes))
    assert found(file) == [(layer, expert, WRONG) for layer, expert in sorted(places)]


@pytest.mark.usefixtures("batch")
def test_headers_and_ends(file):
    flip(file.layers[0].path, 200)
    with open(file.layers[1].path, "ab") as shard:
        shard.write(b"more")
    size = file.layers[2].nbytes
    os.truncate(file.layers[2].path, size - 1)
    assert found(file) == [
        (0, None, HEADER),
        (1, None, f"{size + 4} bytes instead of {size}"),
        (2, None, f"{size - 1} bytes instead of {size}"),
        (2, 4, f"it ends at byte {size - 1}"),
    ]


@pytest.mark.usefixtures("batch")
def test_a_shard_that_is_gone(file):
    file.layers[1].path.unlink()
    flip(file.layers[2].path, file.layers[2].offsets[0])
    gone = "No such file or directory"
    assert found(file) == [(1, None, gone), *((1, expert, gone) for expert in range(5)), (2, 0, WRONG)]


def test_a_bad_sector(file, monkeypatch):
    """Where the disk gives an error, it is that expert's; its neighbours are read and compared."""
    path, bad, nbytes = file.location(1, 3)
    ours, real = {path}, os.preadv

    def preadv(descriptor, buffers, offset, *flags):
        size = sum(len(buffer) for buffer in buffers)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path) and offset < bad + nbytes < offset + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset, *flags)

    class Bad:
        """The file, read in the ordinary way."""

        def __init__(self, *arguments, **options):
            self.file = open_(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, offset):
            self.file.seek(offset)

        def readinto(self, buffer):
            at = self.file.tell()
            if at < bad + nbytes and at + len(buffer) > bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self.file.readinto(buffer)

    open_ = open
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(
        "moe_local.offload.system.direct_io.open",
        lambda name, *arguments, **options: (Bad if name in ours else open_)(name, *arguments, **options),
        raising=False,
    )
    assert found(file) == [(1, 3, "Input/output error")]


def test_each_damage_is_a_line_that_says_where(file):
    flip(file.layers[1].path, file.layers[1].offsets[4])
    flip(file.layers[1].path, 200)
    assert list(map(str, find_damage(file))) == [
        "MoE layer 1 (model.layers.1.mlp.experts): its header is damaged in layer-00001.safetensors",
        "expert 4 of MoE layer 1 (model.layers.1.mlp.experts): wrong checksum in layer-00001.safetensors",
    ]


def test_a_disk_that_hangs_is_no_damage(file, impatient, monkeypatch):
    """It is told once, for the file, and not waited for expert by expert."""
    path, answer = file.layers[1].path, threading.Event()
    real = direct_io._read
    impatient.add(path)

    def read(found):
        if found.path == path:
            answer.wait()
        real(found)

    monkeypatch.setattr(direct_io, "_read", read)
    began = time.monotonic()
    with pytest.raises(
        ExpertFileError, match=f"^{path} is being read, and its disk has given nothing for 0 s"
    ):
        find_damage(file)
    assert time.monotonic() - began < PATIENCE_S
    answer.set()
