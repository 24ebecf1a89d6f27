from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch

from moe_local.offload.doctor import graphics, host
from moe_local.offload.doctor.bandwidths import age, bandwidths
from moe_local.offload.doctor.check_up import check_up
from moe_local.offload.doctor.finding import Finding, Level
from moe_local.offload.doctor.software import packages
from moe_local.offload.plan import bandwidth
from moe_local.offload.plan.bandwidth import Bandwidths

MEASURED = Bandwidths(
    vram=9e11, ram=5e10, h2d=2.4e10, disk=3e9, measured=frozenset({"vram", "ram", "h2d", "disk"})
)
LINK = graphics.Link("00000000:65:00.0", "570.86", 1, 4, 16, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measurements of a moment: their values are no matter here."""
    monkeypatch.setattr(bandwidth, "SECONDS", 0.0)
    monkeypatch.setattr(bandwidth, "RAM_BUFFER", 2**20)
    monkeypatch.setattr(bandwidth, "ram_bandwidth", lambda: 5e10)
    monkeypatch.setattr(bandwidth, "disk_bandwidth", lambda folder: (3e9, False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_check_up_names_everything_and_keeps_what_it_measured(tmp_path):
    findings = {finding.name: finding for finding in check_up(tmp_path, tmp_path / "hub")}
    assert set(findings) >= {
        *("python", "torch", "packages", "GPU", "CPU", "threads", "NUMA", "RAM", "pinned memory"),
        *("disk for experts", "disk for downloads", "CPU kernels", "compiler"),
        *("RAM bandwidth", "disk bandwidth"),
    }
    assert findings["RAM bandwidth"].text == "50 GB/s, read by the CPU, measured just now"
    kept = bandwidth.saved(tmp_path)
    assert (kept.ram, kept.disk, kept.measured) == (5e10, 3e9, {"ram", "disk"})
    when = bandwidth.saved_at(tmp_path)
    assert when is not None
    assert abs(time.time() - when) < 60
    for finding in findings.values():
        json.dumps(finding.to_dict())
        assert bool(finding.remedy) == (finding.level is not Level.OK), finding


def test_without_measuring_it_says_what_is_assumed_and_writes_nothing(tmp_path):
    findings = {finding.name: finding for finding in check_up(tmp_path, tmp_path, measure=False)}
    assert findings["RAM bandwidth"].level is Level.WARN
    assert "assumed, not measured" in findings["RAM bandwidth"].text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_could_not_be_measured_needs_room():
    [ram, disk] = bandwidths(Bandwidths(ram=5e10, measured=frozenset({"ram"})), time.time(), cuda=False)
    assert ram.level is Level.OK
    assert disk.level is Level.WARN
    assert disk.remedy.startswith("make room: ")
    assert "256 MiB" in disk.remedy


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def of(name, known, when=None, **others) -> Finding:
    return only(f for f in bandwidths(known, when, cuda=True, **others) if f.name.startswith(name))


def test_slow_bandwidths_are_warned_of():
    assert all(f.level is Level.OK for f in bandwidths(MEASURED, time.time(), cuda=True, link=31.5e9))
    assert of("RAM", replace(MEASURED, ram=5e9)).level is Level.WARN
    assert of("disk", replace(MEASURED, disk=2e8)).level is Level.WARN
    slow = of("link", replace(MEASURED, h2d=6e9), link=31.5e9)
    assert slow.level is Level.WARN
    assert slow.text == "6 GB/s, pinned RAM to the GPU, of 31.5 that the link should do"
    old = of("RAM", MEASURED, time.time() - 200 * 86400)
    assert (old.level, old.text) == (Level.WARN, "50 GB/s, read by the CPU, measured 200 days ago")
    assert "page cache" in of("disk", replace(MEASURED, disk_cached=True, disk=1e8)).text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "just now"), (59, "just now"), (60, "1 minute ago"), (7300, "2 hours ago"), (9e5, "10 days ago")],
)
def test_ages(seconds, said):
    assert age(seconds) == said


def test_links_as_nvidia_smi_tells_them():
    text = "00000000:65:00.0, 570.86, 1, 4, 16, 16\n00000000:B3:00.0, 570.86, [N/A], [N/A], 8, 16\nodd\n"
    first, second = graphics.parse_links(text)
    assert first == LINK
    assert first.rate == pytest.approx(31.5e9, rel=0.01)
    assert (second.generation, second.rate) == (None, None)
    assert graphics._bus(second.bus_id) == (0, 0xB3, 0)


def test_a_narrow_link_is_warned_of():
    assert graphics.link_finding("link", LINK).text == "PCIe 4 x16, driver 570.86"
    narrow = graphics.link_finding("link", replace(LINK, width=4))
    assert (narrow.level, narrow.text) == (Level.WARN, "PCIe 4 x4, driver 570.86, of x16 that the GPU can")
    assert graphics.link_finding("link", None).level is Level.OK


def test_why_there_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(graphics, "has_nvidia_hardware", lambda: False)
    none = only(graphics.graphics())
    assert (none.level, none.text) == (Level.WARN, "no CUDA device; experts are computed on the CPU")
    monkeypatch.setattr(graphics, "has_nvidia_hardware", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    built = only(graphics.graphics())
    assert built.level is Level.FAIL
    assert "built for CPUs" in built.text
    assert "pip install" in built.remedy
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update the driver" in only(graphics.graphics()).remedy


def test_hardware_is_found_on_the_bus(tmp_path, monkeypatch):
    monkeypatch.setattr(graphics.shutil, "which", lambda name: None)
    for name, kind, vendor in (("a", "0x060000", "0x8086"), ("b", "0x020000", "0x10de")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "class").write_text(kind + "\n")
        (tmp_path / name / "vendor").write_text(vendor + "\n")
    assert not graphics.has_nvidia_hardware(tmp_path)
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert graphics.has_nvidia_hardware(tmp_path)
    assert not graphics.has_nvidia_hardware(tmp_path / "nowhere")


def test_the_processor_as_linux_tells_it(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU @ 3 GHz\nflags\t\t: fpu avx2 avx512f amx_int8\n")
    found = host.processor(info)
    assert found.text.startswith("Some CPU @ 3 GHz, ")
    assert found.facts["sets"] == ["avx2", "avx512f", "amx_int8"]
    assert host.processor(tmp_path / "nowhere").level is Level.OK


def test_threads_too_few_and_too_many(monkeypatch):
    monkeypatch.setattr(host.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for used, level in ((1, Level.WARN), (4, Level.OK), (8, Level.OK), (9, Level.WARN)):
        monkeypatch.setattr(torch, "get_num_threads", lambda used=used: used)
        assert host.threads().level is level, used


def test_memory_nodes(tmp_path):
    assert host.numa(tmp_path).text == "one node"
    for node in (0, 1):
        (tmp_path / f"node{node}" / f"cpu{node}").mkdir(parents=True)
    (tmp_path / "node2").mkdir()  # memory without processors
    found = host.numa(tmp_path)
    assert (found.level, found.facts["nodes"]) == (Level.WARN, 2)


def test_limits_of_pinned_memory(tmp_path):
    assert host.pinned(None, cuda=True, wsl=False).level is Level.OK
    assert host.pinned(8 << 20, cuda=False, wsl=False).level is Level.OK
    low = host.pinned(8 << 20, cuda=True, wsl=False)
    assert (low.level, low.text) == (Level.WARN, "ulimit -l is 8.00 MiB")
    assert ".wslconfig" in host.pinned(None, cuda=True, wsl=True).remedy
    release = tmp_path / "osrelease"
    release.write_text("5.15.167.4-microsoft-standard-WSL2\n")
    assert host.is_wsl(release)
    assert not host.is_wsl(tmp_path / "nowhere")


def test_disks(tmp_path, monkeypatch):
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: FREE)
    deep = tmp_path / "not" / "yet"
    assert host.disk("disk", deep, "HOME").level is Level.OK
    monkeypatch.setattr(host, "LEAST_DISK", 2 * FREE.free)
    assert "HOME" in host.disk("disk", deep, "HOME").remedy
    assert list(tmp_path.iterdir()) == []


class FREE:
    free = 100 * 2**30


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_disk_that_cannot_be_written_fails(tmp_path):
    tmp_path.chmod(0o500)
    assert host.disk("disk", tmp_path, "HOME").level is Level.FAIL


def test_a_folder_below_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("")
    found = host.disk("disk", tmp_path / "file" / "home", "HOME")
    assert (found.level, found.remedy) == (Level.FAIL, "set HOME to a folder that can")


def test_packages():
    assert packages(["torch>=1", 'nowhere; extra == "plot"']).level is Level.OK
    assert packages(["no-such-package-at-all"]).level is Level.FAIL
    old = packages(["torch<1"])
    assert (old.level, old.remedy) == (Level.WARN, "pip install 'torch<1'")


def test_files_of_before_tell_no_time(tmp_path):
    for when in ("x", 10**400, float("-inf"), float("nan")):
        (tmp_path / bandwidth.FILE_NAME).write_text(json.dumps({bandwidth.machine(): {"saved_at": when}}))
        assert bandwidth.saved_at(tmp_path) is None
    assert bandwidth.saved_at(tmp_path / "nowhere") is None
