"""Contenders that take turns at one thing, and the table of what came of it.

Each round runs every contender once; the order is reversed from round to round, so that none always
comes after another. A ratio is taken within a round. Nothing here knows what a contender does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from _cells import Cell, Spread, Transfer
from _report import Report

__all__ = ["Contender", "Measured", "cost_ratio", "print_turns", "speed_ratio", "take_turns"]

Contender = Callable[[Cell], Transfer]
# By contender, one transfer a round.
Measured = Mapping[str, Sequence[Transfer]]


def take_turns(
    report: Report, part: str, cell: Cell, contenders: Mapping[str, Contender], rounds: int
) -> dict[str, list[Transfer]]:
    """Run every contender once a round and return what each measured; keep the samples under `part`."""
    measured: dict[str, list[Transfer]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in names:
            transfer = contenders[name](cell)
            measured[name].append(transfer)
            report.sample(
                part=part,
                op=cell.op,
                block_nbytes=cell.block_nbytes,
                depth=cell.depth,
                round=number + 1,
                contender=name,
                nbytes=transfer.nbytes,
                elapsed_s=round(transfer.elapsed_s, 5),
                cpu_s=round(transfer.cpu_s, 4),
                process_cpu_s=round(transfer.process_cpu_s, 4),
            )
    rates = (f"{name} {_rate(runs).median:.2f} GB/s" for name, runs in measured.items())
    print(f"{part} {cell}: {', '.join(rates)}", flush=True)
    return measured


def speed_ratio(measured: Measured, name: str, baseline: str) -> Spread:
    """Return how many times the bytes a second of `baseline`."""
    ours, theirs = measured[name], measured[baseline]
    return Spread.paired([each.bytes_per_s for each in ours], [each.bytes_per_s for each in theirs])


def cost_ratio(measured: Measured, name: str, baseline: str) -> Spread:
    """Return how many times the CPU seconds a byte of `baseline`."""
    ours, theirs = measured[name], measured[baseline]
    # fio's CPU time is in whole milliseconds, and so may be zero at the sizes of a test.
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.cpu_s > 0]
    if not pairs:
        return Spread.of([float("nan")])
    return Spread.of(a.cpu_s_per_gb / b.cpu_s_per_gb for a, b in pairs)


def print_turns(
    report: Report, cells: Mapping[Cell, Measured], baselines: Mapping[str, Sequence[str]]
) -> None:
    """Print a row for each cell and contender: bandwidth, CPU time, and their ratios.

    Args:
        report: where to.
        cells: what was measured.
        baselines: whom a contender is compared with; those that are not named stand alone.
    """
    rows = []
    for cell, measured in cells.items():
        for name, runs in measured.items():
            rate = _rate(runs)
            others = [other for other in baselines.get(name, ()) if other in measured]
            speeds = (f"{speed_ratio(measured, name, other)} x {other}" for other in others)
            costs = (f"{cost_ratio(measured, name, other).median:.2f} x {other}" for other in others)
            cost = Spread.of(each.cpu_s_per_gb for each in runs).median
            rows.append(
                (
                    cell,
                    name,
                    f"{rate.median:.2f} [{rate.least:.2f}..{rate.most:.2f}]",
                    "; ".join(speeds),
                    f"{cost:.3f}",
                    "; ".join(costs),
                )
            )
    report.table(("", "", "GB/s", "bandwidth", "CPU s/GB", "CPU time"), rows)


def _rate(runs: Sequence[Transfer]) -> Spread:
    return Spread.of(each.bytes_per_s / 1e9 for each in runs)
