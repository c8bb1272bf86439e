"""Accelerators as data: what each can do at best, by its maker's own figures."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.core.errors import ConfigError

GB = 10**9
TERA = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator and its connections, as its maker states them; nobody reaches all of it.

    Attributes:
        name: as ``moesaic plan --device`` takes it.
        flops: dense peak of matrix products, FLOP/s by dtype. A dtype that it has no units for is not listed.
        memory_bytes: of one device.
        bandwidth: bytes/s between its memory and its units.
        node: devices that the fast links join.
        link_in: bytes/s that one device can send to others of its node, and as many that it can receive.
        link_out: the same to other nodes.
        link_host: the same from the host's memory; 0 where there is none to load experts from.
        source: where the figures are from.
        checked: whether they were read there rather than remembered.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: int
    bandwidth: float
    node: int
    link_in: float
    link_out: float
    link_host: float
    source: str
    checked: bool = False

    def peak(self, dtype: str) -> float:
        """FLOP/s in a dtype; weights in 4 bits are multiplied in bfloat16.

        Raises:
            ConfigError: if the device has no figure for it.
        """
        work = {"mxfp4": "bf16", "int4": "bf16"}.get(dtype, dtype)
        if work not in self.flops:
            raise ConfigError(
                f"{self.name} has no peak for {work}, only for {', '.join(self.flops)}. Choose one of these dtypes."
            )
        return self.flops[work]


def _tensor_cores(bf16: float, *, fp32: float, fp8: float = 0, int8: float = 0) -> Mapping[str, float]:
    found = {"bf16": bf16, "fp16": bf16, "fp32": fp32, "fp8": fp8, "int8": int8}
    return {dtype: value * TERA for dtype, value in found.items() if value}


_HOPPER = {"bf16": 989.4, "fp32": 66.9, "fp8": 1978.9, "int8": 1978.9}
# A network card of 400 Gbit/s for each device, as in DGX H100; 200 Gbit/s in DGX A100.
_NDR, _HDR = 50 * GB, 25 * GB
_PCIE5, _PCIE4 = 64 * GB, 32 * GB

DEVICES: tuple[Device, ...] = (
    Device(
        name="h100-80g",
        flops=_tensor_cores(**_HOPPER),
        memory_bytes=80 * GB,
        bandwidth=3.35 * TERA,
        node=8,
        link_in=450 * GB,
        link_out=_NDR,
        link_host=_PCIE5,
        source="NVIDIA H100 SXM5 data sheet (dense figures, half of those with sparsity); NVLink 900 GB/s both ways",
        checked=True,
    ),
    Device(
        name="h800-80g",
        flops=_tensor_cores(**_HOPPER),
        memory_bytes=80 * GB,
        bandwidth=3.35 * TERA,
        node=8,
        link_in=200 * GB,
        link_out=_NDR,
        link_host=_PCIE5,
        source="as H100 SXM5 with NVLink at 400 GB/s both ways; DeepSeek-V3 (arXiv:2412.19437) reaches 160 of 200 GB/s",
    ),
    Device(
        name="h200",
        flops=_tensor_cores(**_HOPPER),
        memory_bytes=141 * GB,
        bandwidth=4.8 * TERA,
        node=8,
        link_in=450 * GB,
        link_out=_NDR,
        link_host=_PCIE5,
        source="NVIDIA H200 SXM data sheet",
    ),
    Device(
        name="b200",
        flops=_tensor_cores(2250, fp32=75, fp8=4500, int8=4500),
        memory_bytes=180 * GB,
        bandwidth=8.0 * TERA,
        node=8,
        link_in=900 * GB,
        link_out=_NDR,
        link_host=_PCIE5,
        source="NVIDIA HGX B200 data sheet (dense)",
    ),
    Device(
        name="a100-40g",
        flops=_tensor_cores(312, fp32=19.5, int8=624),
        memory_bytes=40 * GB,
        bandwidth=1.555 * TERA,
        node=8,
        link_in=300 * GB,
        link_out=_HDR,
        link_host=_PCIE4,
        source="NVIDIA A100 SXM4 40 GB data sheet",
    ),
    Device(
        name="a100-80g",
        flops=_tensor_cores(312, fp32=19.5, int8=624),
        memory_bytes=80 * GB,
        bandwidth=2.039 * TERA,
        node=8,
        link_in=300 * GB,
        link_out=_HDR,
        link_host=_PCIE4,
        source="NVIDIA A100 SXM4 80 GB data sheet",
    ),
    Device(
        name="l40s",
        flops=_tensor_cores(362, fp32=91.6, fp8=733, int8=733),
        memory_bytes=48 * GB,
        bandwidth=0.864 * TERA,
        node=8,
        link_in=_PCIE4,
        link_out=_HDR,
        link_host=_PCIE4,
        source="NVIDIA L40S data sheet (dense); no NVLink, PCIe 4.0 x16 between devices",
    ),
    Device(
        name="rtx4090",
        flops=_tensor_cores(165.2, fp32=82.6, fp8=330.3, int8=660.6),
        memory_bytes=24 * GB,
        bandwidth=1.008 * TERA,
        node=8,
        link_in=_PCIE4,
        link_out=12.5 * GB,
        link_host=_PCIE4,
        source="NVIDIA Ada white paper (float32 accumulation); PCIe 4.0 x16, a network of 100 Gbit/s assumed",
    ),
    Device(
        name="mi300x",
        flops=_tensor_cores(1307.4, fp32=163.4, fp8=2614.9, int8=2614.9),
        memory_bytes=192 * GB,
        bandwidth=5.3 * TERA,
        node=8,
        link_in=448 * GB,
        link_out=_NDR,
        link_host=_PCIE5,
        source="AMD Instinct MI300X data sheet (dense); seven links of 64 GB/s each way",
        checked=True,
    ),
    Device(
        name="tpu-v3-core",
        flops={"bf16": 61.5 * TERA},
        memory_bytes=16 * 2**30,
        bandwidth=0.45 * TERA,
        node=2048,
        link_in=140 * GB,
        link_out=12.5 * GB,
        link_host=0,
        source="cloud.google.com/tpu/docs/v3, a chip's figures halved, since papers count cores; four links of 70 GB/s "
        "a chip (arXiv:2304.01433). A pod is taken as one node: the torus' bisection is not counted",
        checked=True,
    ),
    Device(
        name="tpu-v4",
        flops={"bf16": 275 * TERA, "int8": 275 * TERA},
        memory_bytes=32 * 2**30,
        bandwidth=1.2 * TERA,
        node=4096,
        link_in=300 * GB,
        link_out=12.5 * GB,
        link_host=0,
        source="cloud.google.com/tpu/docs/v4; six links of 50 GB/s (arXiv:2304.01433). A pod is taken as one node: the "
        "torus' bisection is not counted",
        checked=True,
    ),
    Device(
        name="cpu",
        # 96 cores at 2.4 GHz, 32 float32 operations a cycle; twice that in bfloat16 dot products.
        flops={"fp32": 7.4 * TERA, "bf16": 14.7 * TERA},
        memory_bytes=768 * GB,
        bandwidth=0.4608 * TERA,
        node=2,
        link_in=32 * GB,
        link_out=_HDR,
        link_host=0,
        source="AMD EPYC 9654 at its base clock, 12 channels of DDR5-4800, 768 GB fitted",
    ),
)
"""Every device that the planner knows."""

_TABLE = {device.name: device for device in DEVICES}


def names() -> list[str]:
    """The names of all devices."""
    return list(_TABLE)


def get(name: str) -> Device:
    """Find a device by its name, such as "h100-80g".

    Raises:
        ConfigError: if there is none of that name; says which are near.
    """
    if name not in _TABLE:
        near = difflib.get_close_matches(name, _TABLE, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Choose one of these."
        raise ConfigError(f"A device must be one of {', '.join(_TABLE)}, got {name!r}. {hint}")
    return _TABLE[name]
