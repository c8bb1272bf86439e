"""Where a measurement was made, and how much room there is."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LIBRARIES = ("moesaic", "torch", "transformers", "triton", "scattermoe", "megablocks", "sonic-moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device, and the software that ran on it.

    Attributes:
        device: its name.
        threads: that PyTorch used; of a GPU, those of the host.
        versions: of libraries.
        date: of the measurement, as YYYY-MM-DD.
        commit: of Moesaic's source, with a plus if it had changes; empty if it is not in a repository.
    """

    device: str
    threads: int
    versions: dict[str, str]
    date: str
    commit: str

    @property
    def slug(self) -> str:
        """The device's name in a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


def machine(device: torch.device) -> Machine:
    """This one, now."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Machine(
        device=device_name(device),
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), **_versions()},
        date=today,
        commit=_commit(),
    )


def device_name(device: torch.device) -> str:
    """What the device calls itself; a CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken: nine tenths of what is free, on a CPU two thirds, which others use too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) * 9 // 10
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    if found is not None:
        return int(found[1]) * 1024 * 2 // 3
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3


def last_cache_bytes() -> int:
    """Of the largest cache that a core of this machine sees; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", _read(str(path)).strip())
        if found is not None:
            sizes.append(int(found[1]) * (1024 if found[2] == "K" else 1024**2))
    return max(sizes, default=32 * 1024**2)


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found is not None else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # Installed inside somebody else's repository, the commit would be theirs.
        if Path(git("rev-parse", "--show-toplevel"), "src", "moesaic", "bench") != here:
            return ""
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+" if commit and git("status", "--porcelain", "--", str(here.parent)) else commit
    except OSError:
        return ""
