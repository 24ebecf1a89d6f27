"""Checks of GPUs, their driver and their PCIe links."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_local.cache.errors import first_line
from moe_local.cache.keys import format_bytes
from moe_local.offload.doctor.finding import Finding, fail, warn

NVIDIA = "0x10de"
DISPLAY = "0x03"
"""The PCI class of display controllers, which includes data center GPUs."""
QUERY_SECONDS = 15
LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCIe generation -> bytes/s of one lane, in one direction."""
FIELDS = (
    *("pci.bus_id", "driver_version", "pcie.link.gen.current", "pcie.link.gen.max"),
    *("pcie.link.width.current", "pcie.link.width.max"),
)


@dataclass(frozen=True, slots=True)
class Link:
    """A GPU's PCIe link. When idle it lowers its generation, so `generation` may be less than it can do."""

    bus_id: str
    driver: str
    generation: int | None
    most_generation: int | None
    width: int | None
    most_width: int | None

    @property
    def rate(self) -> float | None:
        """Bytes/s that the highest generation and present width allow, after encoding; None if unknown."""
        lane = LANE.get(self.most_generation or 0)
        return None if lane is None or self.width is None else lane * self.width


def links() -> list[Link]:
    """The links of all NVIDIA GPUs, as reported by nvidia-smi; empty if it does not report them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_links(done.stdout)


def parse_links(text: str) -> list[Link]:
    """Parse the lines of nvidia-smi's answer; figures that it does not know, "[N/A]", are None."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(FIELDS):
            numbers = [int(value) if value.isdigit() else None for value in values[2:]]
            found.append(Link(values[0], values[1], *numbers))
    return found


def has_nvidia_hardware(pci: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether there is an NVIDIA GPU, with or without a driver, as far as the system tells."""
    if shutil.which("nvidia-smi") and links():
        return True
    for device in pci.glob("*"):
        try:
            kind = (device / "class").read_text().strip()
            if kind.startswith(DISPLAY) and (device / "vendor").read_text().strip() == NVIDIA:
                return True
        except OSError:
            continue
    return False


def graphics() -> Iterator[Finding]:
    """Each CUDA device and its link, or why there is none."""
    if not torch.cuda.is_available():
        yield _none()
        return
    known = {_bus(link.bus_id): link for link in links()}
    for index in range(torch.cuda.device_count()):
        yield _card(index)
        properties = torch.cuda.get_device_properties(index)
        names = ("pci_domain_id", "pci_bus_id", "pci_device_id")  # older releases of torch lack them
        place = tuple(getattr(properties, name, -1) for name in names)
        yield link_finding(f"link of cuda:{index}", known.get(place))


def _none() -> Finding:
    if not has_nvidia_hardware():
        remedy = "none is needed, but it is faster with one: NVIDIA's are supported, with CUDA 12 or later"
        return warn("GPU", "no CUDA device; experts are computed on the CPU", remedy, devices=0)
    return fail("GPU", *absence(), devices=0)


def absence() -> tuple[str, str]:
    """Why torch has no CUDA device though an NVIDIA GPU is there, and the remedy."""
    if torch.version.cuda is None:
        return (
            "an NVIDIA GPU is there, but this PyTorch is built for CPUs",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
        )
    return (
        f"an NVIDIA GPU is there, but CUDA {torch.version.cuda} finds none",
        "update the driver until nvidia-smi works and shows this CUDA version or a later one, or install a "
        "PyTorch for an earlier one; look at CUDA_VISIBLE_DEVICES; in a container, pass the GPU in (--gpus "
        "all)",
    )


def _card(index: int) -> Finding:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    text = f"{properties.name}, {format_bytes(properties.total_memory)}, compute capability {capability}"
    facts = {"gpu": properties.name, "bytes": properties.total_memory, "capability": capability}
    try:
        if torch.ones(2, device=device).sum().item() != 2:
            raise RuntimeError("1 + 1 is not 2")
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        remedy = "update the driver, or install a PyTorch for this GPU"
        return fail(str(device), f"{text}: {first_line(error)}", remedy)
    text += f", {format_bytes(free)} free"
    facts["free"] = free
    if free < properties.total_memory // 2:
        return warn(str(device), text, "end what else uses the GPU (nvidia-smi lists it)", **facts)
    return Finding(str(device), text, facts=facts)


def link_finding(name: str, link: Link | None) -> Finding:
    """A link's generation and width, and whether it is as wide as it could be."""
    if link is None or link.width is None:
        return Finding(name, "unknown: nvidia-smi does not tell; see the measured bandwidth")
    text = f"PCIe {link.most_generation or '?'} x{link.width}, driver {link.driver}"
    facts = {
        "generation": link.generation,
        "most_generation": link.most_generation,
        "width": link.width,
        "most_width": link.most_width,
        "driver": link.driver,
        "bytes_per_s": link.rate,
    }
    if link.most_width is not None and link.width < link.most_width:
        return warn(
            name,
            f"{text}, of x{link.most_width} that the GPU can",
            "put the GPU into the slot next to the CPU; other cards and drives may take its lanes",
            **facts,
        )
    return Finding(name, text, facts=facts)


def _bus(bus_id: str) -> tuple[int, ...]:
    """ "00000000:65:00.0" -> (0, 0x65, 0); for an invalid bus id, one that no device has."""
    try:
        domain, bus, rest = bus_id.split(":")
        return int(domain, 16), int(bus, 16), int(rest.split(".")[0], 16)
    except ValueError:
        return -1, -1, -1
