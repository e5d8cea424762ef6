"""How long each link is busy in a step, on a machine: bytes over bytes per second. Pure.

The links work at the same time, so a step takes as long as the busiest of them. Reads and writes of a
drive share it and add up; each drive has a part of all bytes in proportion to its speed, as a run deals them.
Host memory is counted at both ends of every copy: a copy of 1 GB measured at 32 GB/s moves 2 GB, and the
memory takes 64 GB/s.

[Note: cores] AdamW, checksums and, without a GPU, copies and the units themselves run on the same cores,
which do one thing at a time: their times, each as if it had all cores, add up. The sum is the processor's
link beside the others. Units that compute with n of N cores leave it the rest: n / N of their time counts
in the sum, and all of it as a link of its own.

Nothing here is smoothed: a figure that a machine lacks makes a link of unknown time, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..machine import Machine, ProcessorSpeed, stripe_weights
from ..specs import MomentDType
from ..store.stripe import deal_by_weight
from .traffic import Traffic

__all__ = ["Link", "drive_rates", "drive_shares", "link_times", "step_seconds"]


@dataclass(frozen=True, slots=True)
class Link:
    """One link or worker, in one step.

    Attributes:
        name: for people, and the key of JSON.
        amount: in its unit.
        seconds: it is busy; None where the machine's figure is not known.
        formula: how that was reckoned, with symbols.
        figures: the same with the numbers put in.
        part_of: the link that this one is a part of, for detail; it is not compared with the others.
        unit: of the amount.
    """

    name: str
    amount: int
    seconds: float | None
    formula: str
    figures: str
    part_of: str | None = None
    unit: Literal["bytes", "operations"] = "bytes"


def drive_shares(machine: Machine) -> tuple[float, ...]:
    """Return each drive's part of a run's bytes, as `offload.attach` deals them."""
    if not machine.drives:
        return ()
    deal = deal_by_weight(stripe_weights([drive.rewrite_bytes_per_s for drive in machine.drives]))
    return tuple(deal.share(index) for index in range(len(machine.drives)))


def drive_rates(machine: Machine, read_nbytes: int, written_nbytes: int) -> tuple[float, float] | None:
    """Return what all drives read and write together in bytes per second; None without a drive.

    The drive that takes longest for its part sets the pace; what was measured of all at once is a limit as
    well.

    Args:
        machine: its drives.
        read_nbytes, written_nbytes: that a step moves, on all of them together.
    """
    if not machine.drives:
        return None
    parts = [
        (drive.read_bytes_per_s / share, drive.write_bytes_per_s / share)
        for drive, share in zip(machine.drives, drive_shares(machine), strict=True)
    ]
    read, write = max(parts, key=lambda rates: read_nbytes / rates[0] + written_nbytes / rates[1])
    if machine.together is not None and len(machine.drives) > 1:
        read = min(read, machine.together.read_bytes_per_s)
        write = min(write, machine.together.write_bytes_per_s)
    return read, write


def link_times(
    machine: Machine,
    traffic: Traffic,
    flops: tuple[int, int],
    flops_per_s: float | None,
    moments: MomentDType,
) -> tuple[Link, ...]:
    """Return every link of a step, the details of a link behind it.

    Args:
        machine: its figures.
        traffic: what a step moves.
        flops: operations with parameters, and those of attention.
        flops_per_s: that the device sustains; None when nobody knows.
        moments: how AdamW's are stored.
    """
    copy = machine.memory_bytes_per_s
    to_device, to_host, both = _device_rates(machine)
    host_nbytes = traffic.host_memory_nbytes
    if machine.device is None:
        # The device is host memory too, so copies to it have both their ends there.
        host_nbytes += traffic.to_device_nbytes + traffic.to_host_nbytes
    memory = None if copy is None else 2 * copy
    links = [*_disk(machine, traffic)] if traffic.disk_read_nbytes or traffic.disk_written_nbytes else []
    links += [
        _simple("host to device", "h / beta_h", traffic.to_device_nbytes, to_device),
        _simple("device to host", "g / beta_g", traffic.to_host_nbytes, to_host),
    ]
    if both is not None:
        together = traffic.to_device_nbytes + traffic.to_host_nbytes
        links.append(_simple("device link, both ways", "(h + g) / beta", together, both))
    links.append(_simple("host memory", "(R + W + h + g + c) / D", host_nbytes, memory))
    compute = _compute(flops, flops_per_s)
    if machine.processor is None:
        links.append(_simple("AdamW", "c / D", traffic.update_nbytes, memory, part_of="host memory"))
    else:
        links += _processor(machine, machine.processor, traffic, compute, moments)
    return (*links, compute)


def step_seconds(links: Sequence[Link], *, commits_apart: bool) -> tuple[float, str]:
    """Return how long a step takes, and the name of the link that sets it.

    Args:
        links: of the step.
        commits_apart: the drives only take commits, which the updates wait for: their share is added.
    """
    known = {link.name: link.seconds for link in links if link.seconds is not None and link.part_of is None}
    disk = known.pop("disk", 0.0) if commits_apart else 0.0
    slowest = max(known, key=lambda name: known[name])
    return known[slowest] + disk, "disk" if disk > known[slowest] else slowest


def _processor(
    machine: Machine, speed: ProcessorSpeed, traffic: Traffic, compute: Link, moments: MomentDType
) -> Iterator[Link]:
    """Yield the processor's link, which its cores share, and behind it what they do; see [Note: cores]."""
    rate = speed.update_bytes_per_s if moments == "float32" else speed.update_8bit_bytes_per_s
    parts = [_simple("AdamW", "c / U", traffic.update_nbytes, rate, part_of="processor")]
    disk_nbytes = traffic.disk_read_nbytes + traffic.disk_written_nbytes
    if disk_nbytes and machine.crc32c_bytes_per_s is not None:
        each_s = 1 / machine.crc32c_bytes_per_s + _transfer_cpu_s(machine)
        sums = machine.num_cores / each_s
        parts.append(_simple("checksums, transfers", "(R + W) / S", disk_nbytes, sums, part_of="processor"))
    if machine.device is None:
        copied = traffic.to_device_nbytes + traffic.to_host_nbytes
        parts.append(
            _simple("copies", "(h + g) / (D / 2)", copied, machine.memory_bytes_per_s, part_of="processor")
        )
        share = min(1.0, speed.num_threads / machine.num_cores)
        seconds = None if compute.seconds is None else compute.seconds * share
        figures = f"{share:.2f} of the cores x {compute.figures}"
        units = replace(compute, name="units", seconds=seconds, formula="n / N x compute", figures=figures)
        parts.append(replace(units, part_of="processor"))
    total_s = sum(part.seconds for part in parts if part.seconds is not None)
    formula = " + ".join(part.formula for part in parts)
    figures = " + ".join("?" if part.seconds is None else f"{part.seconds:,.2f} s" for part in parts)
    yield Link(
        "processor", sum(part.amount for part in parts if part.unit == "bytes"), total_s, formula, figures
    )
    yield from parts


def _transfer_cpu_s(machine: Machine) -> float:
    """Return the seconds of a core that a byte costs on its way from or to a drive."""
    known = [drive.cpu_s_per_gb for drive in machine.drives if drive.cpu_s_per_gb is not None]
    return max(known, default=0.0) / 1e9


def _device_rates(machine: Machine) -> tuple[float | None, float | None, float | None]:
    device = machine.device
    if device is None:
        return machine.memory_bytes_per_s, machine.memory_bytes_per_s, None
    return (
        device.pinned_to_device_bytes_per_s,
        device.device_to_pinned_bytes_per_s,
        device.both_ways_bytes_per_s,
    )


def _disk(machine: Machine, traffic: Traffic) -> tuple[Link, Link, Link]:
    rates = drive_rates(machine, traffic.disk_read_nbytes, traffic.disk_written_nbytes)
    read_rate, write_rate = rates if rates is not None else (None, None)
    read = _simple("disk read", "R / r", traffic.disk_read_nbytes, read_rate, part_of="disk")
    write = _simple("disk write", "W / w", traffic.disk_written_nbytes, write_rate, part_of="disk")
    seconds = None if read.seconds is None or write.seconds is None else read.seconds + write.seconds
    both = Link(
        "disk", read.amount + write.amount, seconds, "R / r + W / w", f"{read.figures} + {write.figures}"
    )
    return both, read, write


def _simple(name: str, formula: str, nbytes: int, rate: float | None, part_of: str | None = None) -> Link:
    seconds = None if rate is None else nbytes / rate
    known = "?" if rate is None else f"{rate / 1e9:.2f} GB/s"
    return Link(name, nbytes, seconds, formula, f"{nbytes / 1e9:,.2f} GB / {known}", part_of)


def _compute(flops: tuple[int, int], flops_per_s: float | None) -> Link:
    products, attention = flops
    total = products + attention
    known = "?" if flops_per_s is None else f"{flops_per_s / 1e12:,.1f} TFLOP/s"
    figures = f"({products / 1e12:,.1f} + {attention / 1e12:,.1f}) TFLOP / {known}"
    seconds = None if flops_per_s is None else total / flops_per_s
    return Link("compute", total, seconds, "(8 P B + 16 L a s B) / F", figures, unit="operations")
