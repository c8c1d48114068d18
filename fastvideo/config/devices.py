# SPDX-License-Identifier: Apache-2.0
"""What GPUs hold and compute at best, by their makers' data sheets."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU model.

    ``memory_gib`` is what the driver reports as usable, which is less than the data sheet says.
    ``bf16_tflops`` is the dense peak with float32 accumulation, half of what is advertised "with
    sparsity"; ``float32_tflops`` that of float32 proper, as torch multiplies unless TF32 is
    switched on. ``reported`` are the names that ``torch.cuda.get_device_name`` returns.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    float32_tflops: float
    reported: tuple[str, ...]
    source: str

    def tflops(self, dtype: str) -> float:
        """Dense peak of matrix products in ``dtype``; 1 TFLOP/s is 1e12 operations a second."""
        return self.float32_tflops if dtype == "float32" else self.bf16_tflops


DEVICES = (
    Device(
        name="RTX4090",
        memory_gib=23.5,
        bf16_tflops=165.2,
        float32_tflops=82.6,
        reported=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
    Device(
        name="RTX5090",
        memory_gib=31.4,
        bf16_tflops=209.5,
        float32_tflops=104.8,
        reported=("NVIDIA GeForce RTX 5090",),
        source="NVIDIA RTX Blackwell GPU architecture white paper, appendix A",
    ),
    Device(
        name="A100-40GB",
        memory_gib=39.4,
        bf16_tflops=312.0,
        float32_tflops=19.5,
        reported=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB"),
        source="NVIDIA A100 data sheet, 2021",
    ),
    Device(
        name="L40S",
        memory_gib=44.4,
        bf16_tflops=362.0,
        float32_tflops=91.6,
        reported=("NVIDIA L40S",),
        source="NVIDIA L40S data sheet, 2023",
    ),
    Device(
        name="A40",
        memory_gib=44.4,
        bf16_tflops=149.7,
        float32_tflops=37.4,
        reported=("NVIDIA A40",),
        source="NVIDIA A40 data sheet, 2020",
    ),
    Device(
        name="A6000",
        memory_gib=47.4,
        bf16_tflops=154.8,
        float32_tflops=38.7,
        reported=("NVIDIA RTX A6000",),
        source="NVIDIA Ampere GA102 GPU architecture white paper, table 9",
    ),
    Device(
        name="RTX6000-Ada",
        memory_gib=47.4,
        bf16_tflops=364.2,
        float32_tflops=91.1,
        reported=("NVIDIA RTX 6000 Ada Generation",),
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
    Device(
        name="A100-80GB",
        memory_gib=79.1,
        bf16_tflops=312.0,
        float32_tflops=19.5,
        reported=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM-80GB"),
        source="NVIDIA A100 data sheet, 2021",
    ),
    Device(
        name="H100-80GB",
        memory_gib=79.1,
        bf16_tflops=989.4,
        float32_tflops=66.9,
        reported=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 GPU architecture white paper, SXM5",
    ),
    Device(
        name="H100-PCIe",
        memory_gib=79.1,
        bf16_tflops=756.0,
        float32_tflops=51.2,
        reported=("NVIDIA H100 PCIe",),
        source="NVIDIA H100 GPU architecture white paper, PCIe",
    ),
    Device(
        name="H100-NVL",
        memory_gib=93.1,
        bf16_tflops=835.0,
        float32_tflops=60.0,
        reported=("NVIDIA H100 NVL",),
        source="NVIDIA H100 data sheet, 2024, NVL",
    ),
    Device(
        name="H200",
        memory_gib=139.7,
        bf16_tflops=989.4,
        float32_tflops=66.9,
        reported=("NVIDIA H200",),
        source="NVIDIA H200 data sheet, 2024, SXM; the chip is H100's",
    ),
    Device(
        name="H200-NVL",
        memory_gib=139.7,
        bf16_tflops=835.5,
        float32_tflops=60.0,
        reported=("NVIDIA H200 NVL",),
        source="NVIDIA H200 data sheet, 2024, NVL",
    ),
    Device(
        name="B200",
        memory_gib=178.3,
        bf16_tflops=2250.0,
        float32_tflops=75.0,
        reported=("NVIDIA B200",),
        source="NVIDIA Blackwell data sheet, 2025, HGX B200, an eighth",
    ),
    Device(
        name="GB200",
        memory_gib=184.0,
        bf16_tflops=2500.0,
        float32_tflops=80.0,
        reported=("NVIDIA GB200",),
        source="NVIDIA Blackwell data sheet, 2025, GB200 NVL72, a 72nd",
    ),
    Device(
        name="MI300X",
        memory_gib=191.5,
        bf16_tflops=1307.4,
        float32_tflops=163.4,
        reported=("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
        source="AMD Instinct MI300X data sheet, 2023",
    ),
)
"""In the order of their memory."""


def find_device(name: str, devices: Sequence[Device] = DEVICES) -> Device | None:
    """Return the device of a name of ours or of the driver's, in any case; None if unknown.

    A part of a GPU (MIG) has a longer name and is unknown.
    """
    wanted = name.strip().lower()
    for device in devices:
        if wanted in {known.lower() for known in (device.name, *device.reported)}:
            return device
    return None
