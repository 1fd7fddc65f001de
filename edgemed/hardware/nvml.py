"""NVIDIA GPUs through NVML, the library that comes with the driver: energy, power, temperature,
clock and why the clock is held down.

It is asked directly (package nvidia-ml-py) and not through nvidia-smi, because a call takes
microseconds instead of a process; the package is an extra, so a machine without a GPU needs
nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgemed.errors import EdgemedError, need

# NVML's clock event reasons that mean a clock lower than the GPU would choose; idle and clocks set
# by the user are none.
HELD_DOWN = {
    0x4: "GPU held down by its power limit",
    0x8: "GPU slowed by its hardware",
    0x20: "GPU slowed by its driver because of heat",
    0x40: "GPU slowed by its hardware because of heat",
    0x80: "GPU slowed by the power supply",
}


@dataclass(frozen=True)
class Card:
    """One GPU. Every method raises OSError where NVML does not answer, and gives None where this
    GPU does not have the number.
    """

    index: int
    name: str
    handle: Any
    nvml: ModuleType

    def energy(self) -> float | None:
        """Joules since the driver was loaded; Volta and later."""
        value = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else value / 1e3

    def watts(self) -> float | None:
        """Power of the whole card; an average over one second on Ampere and later (except GA100),
        of this moment before.
        """
        value = self._ask("nvmlDeviceGetPowerUsage")
        return None if value is None else value / 1e3

    def celsius(self) -> float | None:
        return self._ask("nvmlDeviceGetTemperature", self.nvml.NVML_TEMPERATURE_GPU)

    def mhz(self) -> float | None:
        """The clock of the multiprocessors."""
        return self._ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM)

    def held_down(self) -> tuple[str, ...]:
        """Why the clock is lower than the GPU would choose, right now; empty where it is not."""
        # The older name of the call is the one every driver and every version of the package has.
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return tuple(reason for bit, reason in HELD_DOWN.items() if bits & bit)

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (self.nvml.NVMLError_NotSupported, self.nvml.NVMLError_FunctionNotFound):
            return None
        except self.nvml.NVMLError as error:
            raise OSError(f"NVML: {error} ({function})") from error


def first_card() -> Card:
    """The GPU a CUDA program of this process would take: the first of CUDA_VISIBLE_DEVICES where
    that holds a number or a UUID, else the first.

    CUDA and NVML number the GPUs alike only with CUDA_DEVICE_ORDER=PCI_BUS_ID; with several unlike
    GPUs name one by its UUID. Raises EdgemedError where the package is missing, or NVML finds no
    driver or no GPU.
    """
    nvml = need("pynvml", "nvml")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    try:
        nvml.nvmlInit()
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(chosen))
            if chosen.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(chosen)
        )
        name = nvml.nvmlDeviceGetName(handle)
        return Card(
            nvml.nvmlDeviceGetIndex(handle),
            name.decode() if isinstance(name, bytes) else name,
            handle,
            nvml,
        )
    except nvml.NVMLError as error:
        raise EdgemedError(
            f"NVML does not answer: {error}",
            "Check that nvidia-smi works and, in a container, that the driver's libraries are"
            " passed through",
        ) from error
