"""Real devices: memory, bandwidth and peak, as their makers state them.

A data sheet's numbers are limits that no program reaches; the rate that a program reaches is measured
(``kvlearn.measure.roofline``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvlearn import validate
from kvlearn.measure.roofline import Roofline
from kvlearn.measure.table import Table
from kvlearn.measure.units import GB, TB, format_bytes_decimal, format_rate


@dataclass(frozen=True)
class Device:
    """Memory in bytes, bandwidth in bytes/s and the dense 16-bit peak in FLOP/s, from ``source``."""

    name: str
    memory: int
    bandwidth: float
    peak: float
    source: str

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            validate.instance(name, getattr(self, name), str)
        for name in ("memory", "bandwidth", "peak"):
            validate.above(name, getattr(self, name), 0)

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.peak, self.bandwidth, self.name)


# NVIDIA prints peaks with structured sparsity for newer cards: twice the dense ones. The RTX 3060's "101
# tensor TFLOPS" are with sparsity and 16-bit sums: a quarter of it is dense with 32-bit sums. The T4 has no
# bf16, its peak is that of fp16. Apple prints no peak of 16-bit products: this one is for 32 bit.
DEVICES = {
    device.name: device
    for device in (
        Device("RTX 3060", 12 * GB, 360e9, 101e12 / 4, "NVIDIA, GeForce RTX 3060 announcement"),
        Device(
            "RTX 4090",
            24 * GB,
            1.008 * TB,
            165.2e12,
            "NVIDIA, Ada GPU architecture whitepaper (2023), appendix A",
        ),
        Device(
            "Apple M1 Max",
            64 * GB,
            400e9,
            10.4e12,
            "Apple, M1 Pro and M1 Max announcement (2021); 32-bit peak",
        ),
        Device("T4", 16 * GB, 320e9, 65e12, "NVIDIA, T4 product page (320 GB/s; fp16)"),
        Device("L40S", 48 * GB, 864e9, 362.05e12, "NVIDIA, L40S data sheet"),
        Device("A100 80 GB", 80 * GB, 2.039 * TB, 312e12, "NVIDIA, A100 data sheet (SXM)"),
        # The data sheets' 1979 TFLOP/s are those with structured sparsity, twice the dense ones.
        Device("H100", 80 * GB, 3.35 * TB, 1979e12 / 2, "NVIDIA, H100 data sheet (SXM)"),
        Device("H200", 141 * GB, 4.8 * TB, 1979e12 / 2, "NVIDIA, H200 data sheet (SXM)"),
        Device("MI300X", 192 * GB, 5.3 * TB, 1307.4e12, "AMD, Instinct MI300X data sheet"),
    )
}
"""By name: consumer devices, then those of data centres."""


def device_table(devices: Sequence[Device] = tuple(DEVICES.values())) -> Table:
    """Memory, bandwidth, peak, the knee of the roofline and the source of each device."""
    validate.positive("len(devices)", len(validate.instance("devices", devices, (list, tuple))))
    for device in devices:
        validate.instance("devices", device, Device)
    return Table(
        [
            {
                "device": device.name,
                "memory": format_bytes_decimal(device.memory),
                "bandwidth": format_rate(device.bandwidth),
                "peak": format_rate(device.peak, "FLOP"),
                "knee, FLOP per byte": f"{device.roofline.knee:.0f}",
                "source": device.source,
            }
            for device in devices
        ],
        "GB and TB are powers of ten",
    )
