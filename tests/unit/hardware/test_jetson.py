"""Recognising JetPack, against the release file and package versions as NVIDIA ships them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgemed.hardware import doctor, jetson

R36 = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan "
    " 8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
)


def machine(monkeypatch, tmp_path, release: str, package: str | None) -> None:
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc" / "nv_tegra_release").write_text(release)
    monkeypatch.setattr(jetson.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = SimpleNamespace(
        returncode=0 if package else 1, stdout=package or "", stderr="no packages found"
    )
    monkeypatch.setattr(jetson.subprocess, "run", lambda *a, **k: done)


@pytest.mark.parametrize(
    ("release", "package", "expected"),
    [
        (R36, "6.2+b77", ("36.4.3", "6.2", True, "10.3", "jetpack6")),
        (R36.replace("4.3", "4.4"), "6.2.1+b38", ("36.4.4", "6.2.1", True, "10.3", "jetpack6")),
        (R36, None, ("36.4.3", "6.2", False, "10.3", "jetpack6")),
        (
            R36.replace("R36", "R38").replace("4.3", "2.0"),
            "7.2-b10",
            ("38.2.0", "7.2", True, "10.16", "jetpack7"),
        ),
        (
            R36.replace("R36", "R38").replace("4.3", "2.0"),
            "7.2.2+b1",
            ("38.2.0", "7.2.2", True, "11.4", "trt11"),
        ),
        (
            R36.replace("R36", "R35").replace("4.3", "6.1"),
            "5.1.5-b1",
            ("35.6.1", "5.1.5", True, "", ""),
        ),
    ],
)
def test_releases(
    monkeypatch, tmp_path, release: str, package: str | None, expected: tuple
) -> None:
    machine(monkeypatch, tmp_path, release, package)
    found = jetson.read_jetson(tmp_path)
    assert (found.l4t, found.jetpack, found.package, found.tensorrt, found.profile) == expected


def test_doctor_says_what_is_missing(monkeypatch, tmp_path) -> None:
    machine(monkeypatch, tmp_path, R36, None)
    (finding,) = doctor.jetpack_findings(tmp_path)
    assert finding.state == "missing"
    assert "profile=jetpack6" in finding.detail
    assert finding.fix == "sudo apt install nvidia-jetpack"
    machine(monkeypatch, tmp_path, R36, "6.2+b77")
    assert "--system-site-packages" in doctor.jetpack_findings(tmp_path)[0].fix
    monkeypatch.setattr(jetson.util, "find_spec", lambda name: object())
    assert doctor.jetpack_findings(tmp_path)[0].state == "ok"
    assert (
        "JetPack 6.2, L4T 36.4.3 with TensorRT 10.3" in doctor.jetpack_findings(tmp_path)[0].detail
    )
    machine(monkeypatch, tmp_path, R36.replace("R36", "R35"), "5.1.2-b104")
    assert "too old" in doctor.jetpack_findings(tmp_path)[0].detail


def test_elsewhere(tmp_path) -> None:
    assert jetson.read_jetson(tmp_path) is None
    assert doctor.jetpack_findings(tmp_path) == []
    # Without the package the real command says so, and that is no error.
    assert isinstance(jetson.installed_jetpack(), str)
