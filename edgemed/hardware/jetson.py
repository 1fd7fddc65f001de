"""What an NVIDIA Jetson says about itself in files: release, power mode, clocks, the power rails of
its board, over-current events.

The programs that show the same (nvpmodel, jetson_clocks, tegrastats) want root or are missing in
containers; the files they read are readable by everybody. Rail names and units follow NVIDIA's
developer guides of L4T 32, 35, 36 and 38 (tests/data/sensors/README.md).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from edgemed.hardware.sysfs import in_order, number, text

# L4T release -> JetPack. NVIDIA's JetPack archive; no file on the board states it.
JETPACK = {
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
}
GENERATION = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7"}
# A rail that carries everything: NVIDIA says not to add the others to it.
WHOLE = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN")
# Not connected; not a rail; and on AGX Orin a part of VIN_SYS_5V0, which would be counted twice.
LEFT_OUT = ("NC", "sum of shunt voltages", "VDDQ_VDD2_1V8AO")
OVER_CURRENT = {
    "oc1": "under-voltage",
    "oc2": "average over-current",
    "oc3": "instantaneous over-current",
}


@dataclass(frozen=True)
class Rail:
    """One power rail. Its power is power [W] = file / scale, or millivolts * milliamperes / 10^6.
    settle: seconds its chip averages over.
    """

    name: str
    files: tuple[Path, ...]
    scale: float
    settle: float

    def watts(self) -> float:
        """Power now. Raises OSError where the kernel does not give it."""
        value = 1.0
        for file in self.files:
            value *= int(file.read_text())
        return value / self.scale


def release(root: Path) -> str | None:
    """The L4T release ('36.4.4') of /etc/nv_tegra_release, None on anything but a Jetson."""
    line = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release") or ""
    )
    return f"{line[1]}.{line[2]}" if line else None


def jetpack_name(l4t: str) -> str:
    """'JetPack 6.2.1 (L4T 36.4.4)'; only the generation where this release is not in the table, and
    no guess beyond that.
    """
    generation = GENERATION.get(l4t.split(".")[0])
    version = JETPACK.get(l4t) or (
        f"{generation}, which release is not known" if generation else "not known"
    )
    return f"JetPack {version} (L4T {l4t})"


def nvpmodel_mode(root: Path) -> str | None:
    """The name of the nvpmodel mode in force, its number where the configuration does not name it,
    None on anything but a Jetson.
    """
    mode = re.search(r"pmode:(\d+)", text(root / "var/lib/nvpmodel/status") or "")
    if not mode:
        return None
    names = dict(
        re.findall(
            r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", text(root / "etc/nvpmodel.conf") or ""
        )
    )
    return names.get(str(int(mode[1])), f"mode {int(mode[1])}")


def gpu_clock_directory(root: Path) -> Path | None:
    """The devfreq directory of the GPU: named by its address and chip up to L4T 36, gpu-gpc-0 on
    Thor.
    """
    directories = in_order(
        [
            p
            for p in (root / "sys/class/devfreq").glob("*")
            if re.search(r"\.(gpu|ga10b|gv11b|gp10b|gm20b)$|^gpu-gpc-0$", p.name)
        ]
    )
    return directories[0] if directories else None


def clock_ranges(root: Path) -> str:
    """One line: the ranges CPU and GPU clocks may move in, and whether jetson_clocks holds them;
    empty where nothing says so.
    """
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    gpu = gpu_clock_directory(root)
    ranges = [("CPU", number(cpu / "scaling_min_freq"), number(cpu / "scaling_max_freq"), 1e3)]
    if gpu:
        ranges += [("GPU", number(gpu / "min_freq"), number(gpu / "max_freq"), 1e6)]
    megahertz = [
        (name, low / unit, high / unit) for name, low, high, unit in ranges if low and high
    ]
    if not megahertz:
        return ""
    held = all(low == high for _, low, high in megahertz)
    listed = ", ".join(
        f"{name} {high:.0f} MHz" if low == high else f"{name} {low:.0f} to {high:.0f} MHz"
        for name, low, high in megahertz
    )
    free = "free to change (sudo jetson_clocks holds them at the top)"
    return f"{listed}: {'held by jetson_clocks' if held else free}"


def is_board(root: Path) -> bool:
    """Whether this is a Jetson; in containers /etc/nv_tegra_release is missing and the device tree
    is not.
    """
    return release(root) is not None or "tegra" in (
        text(root / "proc/device-tree/compatible") or ""
    )


def rails(root: Path) -> list[Rail]:
    """Every connected power rail: INA3221 by its hwmon driver (L4T 34 and later) or by the iio
    driver before, and Thor's INA238.

    Only on a Jetson: the same chips elsewhere measure whatever somebody wired to them.
    """
    if not is_board(root):
        return []
    return [*_hwmon(root), *_iio(root), *_ina238(root)]


def whole(rails: Sequence[Rail]) -> list[Rail]:
    """The rails whose sum is what the module draws, without any part counted twice."""
    for name in WHOLE:
        if alone := [rail for rail in rails if rail.name == name]:
            return alone[:1]
    return list(rails)


def _hwmon(root: Path) -> Iterator[Rail]:
    # in*_input in mV, curr*_input in mA (kernel documentation, hwmon/ina3221). Reading a channel
    # that is not connected fails with EIO.
    for chip in in_order(list((root / "sys/bus/i2c/drivers/ina3221").glob("*-*/hwmon/hwmon*"))):
        for label in in_order(list(chip.glob("in*_label"))):
            n = label.name[2:-6]
            name = text(label) or ""
            files = (chip / f"in{n}_input", chip / f"curr{n}_input")
            if name not in LEFT_OUT and all(number(file) is not None for file in files):
                yield Rail(
                    name,
                    files,
                    1e6,
                    (number(chip / "update_interval") or 500) / 1e3,
                )


def _iio(root: Path) -> Iterator[Rail]:
    for chip in in_order(list((root / "sys/bus/i2c/drivers/ina3221x").glob("*-*/iio:device*"))):
        for label in in_order(list(chip.glob("rail_name_*"))):
            n = label.name[10:]
            name = text(label) or ""
            power = chip / f"in_power{n}_input"
            pair = (chip / f"in_voltage{n}_input", chip / f"in_current{n}_input")
            if name in LEFT_OUT:
                continue
            if number(power) is not None:
                yield Rail(
                    name,
                    (power,),
                    1e3,
                    0.5,
                )
            elif all(number(file) is not None for file in pair):
                yield Rail(
                    name,
                    pair,
                    1e6,
                    0.5,
                )


def _ina238(root: Path) -> Iterator[Rail]:
    for chip in in_order(list((root / "sys/bus/i2c/drivers/ina238").glob("*-*/hwmon/hwmon*"))):
        if number(chip / "power1_input") is not None:
            yield Rail(
                "VIN",
                (chip / "power1_input",),
                1e6,
                0.5,
            )


def over_current(root: Path) -> dict[str, int]:
    """Events since the start of the machine, by name; at each the hardware lowers the clocks for a
    moment.
    """
    counts: dict[str, int] = {}
    for chip in in_order(list((root / "sys/class/hwmon").glob("hwmon*"))):
        if text(chip / "name") == "soctherm_oc":
            counts |= {
                f"{what} ({name})": count
                for name, what in OVER_CURRENT.items()
                if (count := number(chip / f"{name}_event_cnt")) is not None
            }
    return counts


def parse_tegrastats(line: str) -> dict[str, float]:
    """Rail -> watts now, of one line of tegrastats: 'VDD_IN 4940mW/4940mW' (L4T 32.7 and later) or
    'POM_5V_IN 1750/1628' (before).
    """
    return {
        name: int(now) / 1e3
        for name, now in re.findall(
            r"\b((?:VDD|VIN|POM|CPU|GPU|SOC|CV|SYS5V|VDDRQ)[A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?",
            line,
        )
    }


class Tegrastats:
    """Power by tegrastats, where the sensors' files are not visible (some containers); one line
    every 100 ms.
    """

    def __init__(self, command: Sequence[str] = ("tegrastats", "--interval", "100")):
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def watts(self) -> float:
        """Power of the whole module in the next line. Raises OSError where tegrastats ended or
        names no rail.
        """
        line = self.process.stdout.readline() if self.process.stdout else ""
        rails = parse_tegrastats(line)
        watts = {name: value for name, value in rails.items() if name not in LEFT_OUT}
        if not watts:
            raise OSError("tegrastats gave no line with power rails")
        return next((watts[name] for name in WHOLE if name in watts), sum(watts.values()))

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


# (JetPack from here on, TensorRT it carries, profile of target tensorrt), newest first.
TENSORRT = (
    ((7, 2, 2), "11.4", "trt11"),
    ((7, 2), "10.16", "jetpack7"),
    ((7,), "10.13", "jetpack6"),
    ((6, 1), "10.3", "jetpack6"),
)


@dataclass(frozen=True)
class Jetson:
    """l4t: '36.4.3'. jetpack: '6.2.1', only its first number where the package is not installed, ''
    where unknown. tensorrt: what that JetPack carries.
    """

    l4t: str
    jetpack: str
    package: bool
    tensorrt: str
    profile: str


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The release of this Jetson, None on anything else."""
    if (l4t := release(root)) is None:
        return None
    version = installed_jetpack()
    jetpack = version or JETPACK.get(l4t) or GENERATION.get(l4t.split(".")[0], "")
    numbers = tuple(int(part) for part in jetpack.split(".") if part.isdigit())
    # JetPack 6 without a second number is 6.1 or later on any current image.
    numbers = (6, 1) if numbers == (6,) else numbers
    tensorrt, profile = next(
        ((trt, profile) for since, trt, profile in TENSORRT if numbers >= since), ("", "")
    )
    return Jetson(
        l4t,
        jetpack,
        bool(version),
        tensorrt,
        profile,
    )


def installed_jetpack() -> str:
    """The version of the package nvidia-jetpack without its build number ('6.2.1+b38' -> '6.2.1'),
    '' where it is not installed.
    """
    if not shutil.which("dpkg-query"):
        return ""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return re.split(r"[+-]", done.stdout.strip())[0] if done.returncode == 0 else ""


def jetpack_state(board: Jetson) -> tuple[str, str]:
    """(what is here, the command that adds what is missing or '')."""
    text = f"JetPack {board.jetpack or 'unknown'}, L4T {board.l4t}"
    if board.jetpack.startswith("5"):
        return (
            f"{text}: its TensorRT 8 is too old for target tensorrt; use llamacpp or onnx",
            "Flash JetPack 6.2 or later",
        )
    if not board.profile:
        return f"{text}: no TensorRT profile is known for it", ""
    text += f" with TensorRT {board.tensorrt}: export engines with --set profile={board.profile}"
    if not board.package:
        return (
            f"{text}; the package nvidia-jetpack, which brings TensorRT, is not installed",
            "sudo apt install nvidia-jetpack",
        )
    if util.find_spec("tensorrt") is None:
        return (
            f"{text}; this Python does not see its module tensorrt",
            "Use the system's Python, or a venv made with --system-site-packages",
        )
    return text, ""
