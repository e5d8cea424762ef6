"""Runs the cells of the grid, every contender in turn, prints the table and judges the bars.

The order is reversed from round to round, so that neither side always comes after the other. A ratio
is taken within a round, and the median of the rounds is what is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _cells import Cell, Spread, Transfer
from _fio import run_fio
from _ours import run_ours
from _report import Report

from offload.aio import EngineName
from offload.sizes import MIB

__all__ = ["Contenders", "run_grid"]

# uring beside fio: the least ratio of a cell, that of the cell where fio is fastest, and CPU time.
LEAST_RATIO = 0.95
BEST_RATIO = 1.0
CPU_RATIO = 1.2
# threads beside uring, from this block size on.
THREADS_RATIO = 0.9
THREADS_BLOCK_NBYTES = MIB


@dataclass(frozen=True, slots=True)
class Contenders:
    """Who takes part, and how much each moves."""

    fio: bool
    engines: tuple[EngineName, ...]
    file_nbytes: int
    nbytes: int
    rounds: int

    @property
    def names(self) -> tuple[str, ...]:
        return (*(["fio"] if self.fio else []), *self.engines)


def run_grid(
    report: Report, place: str, file: Path, cells: Sequence[Cell], contenders: Contenders, *, judged: bool
) -> None:
    """Measure `cells` on `file`; `judged`: hold them to the bars."""
    measured = {}
    for name in contenders.names:  # so that the first cell is not the one that wakes everything up
        _run_once(name, cells[0], file, contenders)
    for cell in cells:
        rounds = [
            _run_round(report, place, number, cell, file, contenders) for number in range(contenders.rounds)
        ]
        measured[cell] = {name: [each[name] for each in rounds] for name in contenders.names}
        print(f"{place} {cell}: {_summary(measured[cell])}", flush=True)
    _print_table(report, place, measured)
    if judged:
        _judge(report, measured)


def _run_round(
    report: Report, place: str, number: int, cell: Cell, file: Path, contenders: Contenders
) -> dict[str, Transfer]:
    names = contenders.names if number % 2 == 0 else contenders.names[::-1]
    transfers = {}
    for name in names:
        transfer, process_cpu_s = _run_once(name, cell, file, contenders)
        transfers[name] = transfer
        report.sample(
            place=place,
            op=cell.op,
            block_nbytes=cell.block_nbytes,
            depth=cell.depth,
            round=number + 1,
            contender=name,
            nbytes=transfer.nbytes,
            elapsed_s=round(transfer.elapsed_s, 5),
            cpu_s=round(transfer.cpu_s, 4),
            process_cpu_s=round(process_cpu_s, 4),
        )
    return transfers


def _run_once(name: str, cell: Cell, file: Path, contenders: Contenders) -> tuple[Transfer, float]:
    if name == "fio":
        run = run_fio(cell, [file], contenders.file_nbytes, contenders.nbytes)
        return run.transfer, run.process_cpu_s
    transfer = run_ours(name, cell, [file], contenders.file_nbytes, contenders.nbytes)
    return transfer, transfer.cpu_s


def _summary(transfers: dict[str, list[Transfer]]) -> str:
    return ", ".join(
        f"{name} {Spread.of(each.bytes_per_s / 1e9 for each in runs).median:.2f} GB/s"
        for name, runs in transfers.items()
    )


def _print_table(report: Report, place: str, measured: dict[Cell, dict[str, list[Transfer]]]) -> None:
    names = list(next(iter(measured.values())))
    baselines = {name: _baseline(name, names) for name in names}
    columns = ["", *(f"{name} GB/s" for name in names)]
    columns += [f"{name} / {other}" for name, other in baselines.items() if other]
    columns += [f"{name} CPU s/GB" for name in names]
    columns += [f"CPU {name} / {other}" for name, other in baselines.items() if other == "fio"]
    rows = []
    for cell, runs in measured.items():
        row = [str(cell), *(_range(runs[name]) for name in names)]
        row += [str(_ratio(runs, name, other)) for name, other in baselines.items() if other]
        row += [f"{Spread.of(each.cpu_s_per_gb for each in runs[name]).median:.3f}" for name in names]
        row += [f"{_cpu_ratio(runs, name).median:.2f}" for name, other in baselines.items() if other == "fio"]
        rows.append(row)
    report.say(f"{place}: median [least..most]; ratios are taken within each round")
    report.say()
    report.table(columns, rows)


def _baseline(name: str, names: Sequence[str]) -> str | None:
    """Return whom `name` is compared with: fio, and `threads` with `uring`."""
    if name == "threads" and "uring" in names:
        return "uring"
    return "fio" if name != "fio" and "fio" in names else None


def _range(runs: Sequence[Transfer]) -> str:
    spread = Spread.of(each.bytes_per_s / 1e9 for each in runs)
    return f"{spread.median:.2f} [{spread.least:.2f}..{spread.most:.2f}]"


def _ratio(runs: dict[str, list[Transfer]], name: str, other: str) -> Spread:
    return Spread.paired(
        [each.bytes_per_s for each in runs[name]], [each.bytes_per_s for each in runs[other]]
    )


def _cpu_ratio(runs: dict[str, list[Transfer]], name: str) -> Spread:
    return Spread.paired([each.cpu_s for each in runs[name]], [each.cpu_s for each in runs["fio"]])


def _judge(report: Report, measured: dict[Cell, dict[str, list[Transfer]]]) -> None:
    names = list(next(iter(measured.values())))
    for op in ("read", "write"):
        cells = [cell for cell in measured if cell.op == op]
        if not cells:
            continue
        if "uring" in names and "fio" in names:
            ratios = {cell: _ratio(measured[cell], "uring", "fio").median for cell in cells}
            worst = min(cells, key=lambda cell: ratios[cell])
            report.bar(
                f"{op}: uring / fio, least of all cells ({worst})", ratios[worst], LEAST_RATIO, least=True
            )
            best = max(
                cells, key=lambda cell: Spread.of(each.bytes_per_s for each in measured[cell]["fio"]).median
            )
            report.bar(
                f"{op}: uring / fio where fio is fastest ({best})", ratios[best], BEST_RATIO, least=True
            )
            costs = {cell: _cpu_ratio(measured[cell], "uring").median for cell in cells}
            dearest = max(cells, key=lambda cell: costs[cell])
            report.bar(
                f"{op}: CPU time uring / fio, most of all cells ({dearest})", costs[dearest], CPU_RATIO
            )
        large = [cell for cell in cells if cell.block_nbytes >= THREADS_BLOCK_NBYTES]
        if "uring" in names and "threads" in names and large:
            ratios = {cell: _ratio(measured[cell], "threads", "uring").median for cell in large}
            worst = min(large, key=lambda cell: ratios[cell])
            report.bar(
                f"{op}: threads / uring, least from 1 MiB on ({worst})",
                ratios[worst],
                THREADS_RATIO,
                least=True,
            )
    report.say()
