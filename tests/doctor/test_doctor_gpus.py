"""What the doctor learns of GPUs, from a stand-in for NVML and from files as the driver writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_nvml import NVMLError, gpu, make_nvml

from offload.doctor.facts import Gpu, GpuFacts, Link
from offload.doctor.gpus import look_at_gpus
from offload.doctor.pcie import link_of

OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"
)
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
FULL = Link(generation=4, width=16, max_generation=4, max_width=16)


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nvidia-ml-py is not installed."""
    monkeypatch.setitem(sys.modules, "pynvml", None)


def pci_device(root: Path, address: str, speeds: tuple[str, str], widths: tuple[str, str]) -> Path:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for which, speed, width in zip(("current", "max"), speeds, widths, strict=True):
        (folder / f"{which}_link_speed").write_text(f"{speed}\n")
        (folder / f"{which}_link_width").write_text(f"{width}\n")
    return folder


def driver(root: Path, version: str, *addresses: str) -> None:
    for address in addresses:
        folder = root / "proc/driver/nvidia/gpus" / address
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 74\n")
    (root / "proc/driver/nvidia").mkdir(parents=True, exist_ok=True)
    (root / "proc/driver/nvidia/version").write_text(version)


def test_nvml_tells_name_memory_link_and_state(monkeypatch, tmp_path):
    nvml = make_nvml([gpu(), gpu(name="Second", state=8, generation=1)])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = look_at_gpus(tmp_path)
    assert (found.source, found.driver, found.problem) == ("nvml", "580.65.06", "")
    assert found.gpus[0] == Gpu(
        name="NVIDIA Example", memory_nbytes=24 << 30, used_nbytes=1 << 30, link=FULL, performance_state=0
    )
    assert (found.gpus[1].name, found.gpus[1].performance_state) == ("Second", 8)
    assert found.gpus[1].link == Link(generation=1, width=16, max_generation=4, max_width=16)
    assert nvml.open == 0


def test_a_question_that_a_gpu_does_not_answer_costs_that_answer_alone(monkeypatch, tmp_path):
    refused = NVMLError("Not Supported")
    answers = gpu(memory=refused, state=32, max_width=refused)
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml([answers]))
    assert look_at_gpus(tmp_path).gpus == (Gpu(name="NVIDIA Example"),)


def test_a_link_of_no_lanes_is_none(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml([gpu(generation=0, width=0)]))
    assert look_at_gpus(tmp_path).gpus[0].link is None


def test_a_driver_that_fails_in_between_is_a_problem_and_nvml_is_closed(monkeypatch, tmp_path):
    nvml = make_nvml([gpu()], count_error="GPU is lost")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert look_at_gpus(tmp_path) == GpuFacts(source="nvml", problem="GPU is lost")
    assert nvml.open == 0


def test_nvml_that_cannot_begin_leaves_what_the_driver_shows(monkeypatch, tmp_path):
    driver(tmp_path, OPEN_DRIVER, "0000:01:00.0")
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml([], init_error="version mismatch"))
    found = look_at_gpus(tmp_path)
    assert (found.source, found.driver, found.problem) == ("proc", "580.65.06", "version mismatch")
    assert found.gpus == (Gpu(name="NVIDIA GeForce RTX 4090"),)


def test_nvml_without_a_driver_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml([], init_error="Shared Library Not Found"))
    found = look_at_gpus(tmp_path)
    assert (found.source, found.gpus) == ("", ())


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN_DRIVER, "580.65.06"), (CLOSED_DRIVER, "535.104.05"), ("", "")]
)
def test_without_nvml_the_driver_names_its_gpus_and_the_kernel_their_links(no_nvml, tmp_path, text, version):
    driver(tmp_path, text, "0000:01:00.0", "0000:02:00.0")
    pci_device(tmp_path, "0000:02:00.0", ("8.0 GT/s PCIe", "16.0 GT/s PCIe"), ("8", "16"))
    found = look_at_gpus(tmp_path)
    assert (found.source, found.driver) == ("proc", version)
    links = [None, Link(generation=3, width=8, max_generation=4, max_width=16)]
    assert found.gpus == tuple(Gpu(name="NVIDIA GeForce RTX 4090", link=link) for link in links)


def test_a_machine_without_a_driver_has_no_gpu(no_nvml, tmp_path):
    assert look_at_gpus(tmp_path) == GpuFacts()


@pytest.mark.parametrize(
    ("speeds", "widths"),
    [
        (("Unknown", "16.0 GT/s PCIe"), ("16", "16")),
        (("16.0 GT/s PCIe", "16.0 GT/s PCIe"), ("0", "16")),
        (("16.0 GT/s PCIe", "16.0 GT/s PCIe"), ("255", "255")),
        (("", ""), ("", "")),
    ],
)
def test_a_link_that_the_kernel_does_not_know_is_none(tmp_path, speeds, widths):
    assert link_of(pci_device(tmp_path, "0000:01:00.0", speeds, widths)) is None


def test_a_device_without_a_link_has_none(tmp_path):
    assert link_of(tmp_path) is None


@pytest.mark.parametrize(
    ("speed", "generation"), [("2.5 GT/s PCIe", 1), ("5 GT/s", 2), ("32.0 GT/s PCIe", 5)]
)
def test_speeds_are_generations(tmp_path, speed, generation):
    found = link_of(pci_device(tmp_path, "0000:01:00.0", (speed, speed), ("4", "4")))
    assert found == Link(generation=generation, width=4, max_generation=generation, max_width=4)
