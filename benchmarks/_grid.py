"""The parts of the I/O benchmark that fio takes part in: the grid with its bars, and rows beside it.

`Bench` says what is compared; each `measure_*` is one part: it runs its contenders, prints a table and,
where it is told to, judges. The judging functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from _cells import Cell, Spread
from _fio import run_fio
from _gil import measure_burst
from _ours import run_blocks, run_ours
from _report import Report
from _turns import Contender, Measured, cost_ratio, print_turns, speed_ratio, take_turns

from offload.aio import EngineName, open_engine
from offload.sizes import MIB, format_bytes

__all__ = [
    "Bench",
    "judge",
    "measure_blocks",
    "measure_fixed",
    "measure_gil",
    "measure_grid",
    "measure_memory",
    "measure_two",
]

# uring beside fio: the least ratio of a cell, that of the cell where fio is fastest, and CPU time.
LEAST_RATIO = 0.95
BEST_RATIO = 1.0
CPU_RATIO = 1.2
# threads beside uring, from this block size on.
THREADS_RATIO = 0.9
THREADS_BLOCK_NBYTES = MIB
# Many small blocks, the default, and large ones.
FEW_CELLS = [
    Cell(op, nbytes, depth)
    for op in ("read", "write")
    for nbytes, depth in ((MIB // 8, 32), (MIB, 8), (8 * MIB, 8))
]


@dataclass(frozen=True, slots=True)
class Bench:
    """What takes part and how much each moves; a part of the benchmark runs on one place."""

    report: Report
    place: str
    fio: bool
    engines: tuple[EngineName, ...]
    file_nbytes: int
    nbytes: int
    rounds: int

    @property
    def few_cells(self) -> list[Cell]:
        """Some cells of which the file is large enough, for what is not worth the whole grid's time."""
        return [cell for cell in FEW_CELLS if cell.file_nbytes <= self.file_nbytes]

    def contenders(self, *files: Path) -> dict[str, Contender]:
        """Return fio, where it takes part, and our engines, on these files at once."""
        found: dict[str, Contender] = {"fio": self.fio_contender(*files)} if self.fio else {}
        return found | {name: self.our_contender(name, *files) for name in self.engines}

    def fio_contender(self, *files: Path, extra: Sequence[str] = (), huge_pages: bool = False) -> Contender:
        """Return fio with these options."""
        return lambda cell: run_fio(cell, files, self.file_nbytes, self.nbytes, extra, huge_pages=huge_pages)

    def our_contender(self, name: EngineName, *files: Path, footprint_nbytes: int = 0) -> Contender:
        """Return one of our engines."""
        return lambda cell: run_ours(
            name, cell, files, self.file_nbytes, self.nbytes, footprint_nbytes=footprint_nbytes
        )

    def compare(
        self,
        part: str,
        cells: Sequence[Cell],
        contenders: Mapping[str, Contender],
        baselines: Mapping[str, Sequence[str]],
    ) -> dict[Cell, Measured]:
        """Let the contenders take turns at each cell, and print the table."""
        title = f"{self.place}: {part}"
        for contender in contenders.values():  # so that the first cell does not wake everything up
            contender(cells[0])
        measured: dict[Cell, Measured] = {
            cell: take_turns(self.report, title, cell, contenders, self.rounds) for cell in cells
        }
        self.report.say(f"## {title}")
        self.report.say()
        print_turns(self.report, measured, baselines)
        return measured


def measure_grid(bench: Bench, file: Path, cells: Sequence[Cell], *, judged: bool) -> None:
    """Measure every cell; `judged`: hold them to the bars."""
    baselines = {"uring": ("fio",), "threads": ("uring",) if "uring" in bench.engines else ("fio",)}
    measured = bench.compare("grid", cells, bench.contenders(file), baselines)
    if judged:
        judge(bench.report, measured)


def measure_two(bench: Bench, files: Sequence[Path], *, judged: bool) -> None:
    """Measure two drives at once: two jobs of fio's, one engine of ours."""
    contenders = bench.contenders(*files)
    contenders.pop("threads", None)
    cells = [Cell(op, MIB, 8) for op in ("read", "write")]
    measured = bench.compare("two directories at once", cells, contenders, {"uring": ("fio",)})
    for cell in cells if judged and {"uring", "fio"} <= set(contenders) else ():
        ratio = speed_ratio(measured[cell], "uring", "fio").median
        bench.report.bar(f"two directories, {cell}: uring / two jobs of fio", ratio, LEAST_RATIO, least=True)
    bench.report.say()


def measure_memory(bench: Bench, file: Path) -> None:
    """Measure what the buffers' pages and their number do.

    By default fio has small pages and ours are huge; fio's buffers are depth x block bytes, ours twice
    that, but a run of the runtime goes through far more than any cache holds; here, as much as the file.
    """
    large = f"uring over {format_bytes(bench.file_nbytes)}"
    contenders = bench.contenders(file)
    contenders.pop("threads", None)
    if bench.fio:
        contenders["fio, huge pages"] = bench.fio_contender(file, huge_pages=True)
    contenders[large] = bench.our_contender("uring", file, footprint_nbytes=bench.file_nbytes)
    both = ("fio", "fio, huge pages")
    baselines = {"fio, huge pages": ("fio",), "uring": both, large: both}
    bench.compare("pages and amount of memory", bench.few_cells, contenders, baselines)


def measure_blocks(bench: Bench, file: Path) -> None:
    """Measure one request from Python for each block, beside large requests that the engine cuts."""
    contenders = bench.contenders(file)
    contenders.pop("threads", None)
    contenders["a request a block"] = lambda cell: run_blocks(
        "uring", cell, [file], bench.file_nbytes, bench.nbytes
    )
    baselines = {"uring": ("fio",), "a request a block": ("fio", "uring")}
    bench.compare("one request for each block, from Python", bench.few_cells, contenders, baselines)


def measure_fixed(bench: Bench, file: Path) -> None:
    """Measure what registered files and buffers give fio, with small pages and with huge ones."""
    make = partial(bench.fio_contender, file)
    buffers, files = "--fixedbufs=1", "--registerfiles=1"
    contenders = {
        "fio": make(),
        "registered files": make(extra=[files]),
        "registered buffers": make(extra=[buffers]),
        "both": make(extra=[buffers, files]),
        "huge pages": make(huge_pages=True),
        "huge pages, files": make(extra=[files], huge_pages=True),
        "huge pages, both": make(extra=[buffers, files], huge_pages=True),
    }
    baselines = {name: ("fio",) for name in contenders if name != "fio"}
    baselines |= {name: ("huge pages",) for name in contenders if name.startswith("huge pages,")}
    bench.compare("what registering gives fio", bench.few_cells, contenders, baselines)


def measure_gil(bench: Bench, path: Path) -> None:
    """Measure how long a burst of calls holds off a second Python thread; makes `path` and removes it."""
    title = f"{bench.place}: how long another Python thread waits"
    rows = []
    for name in bench.engines:
        with open_engine(name) as engine:
            rounds = [
                measure_burst(engine, path, total_nbytes=bench.file_nbytes) for _ in range(bench.rounds)
            ]
        for number, gaps in enumerate(rounds):
            bench.report.sample(part=title, round=number + 1, contender=name, **gaps._asdict())
        idle, working = (Spread.of(each) for each in zip(*(each[:2] for each in rounds), strict=True))
        rows.append(
            (
                name,
                *(f"{1e3 * s.median:.2f} [{1e3 * s.least:.2f}..{1e3 * s.most:.2f}]" for s in (idle, working)),
            )
        )
    bench.report.say(f"## {title}")
    bench.report.say()
    bench.report.say(
        f"{format_bytes(bench.file_nbytes)} written and read in requests of 1 MiB, 64 outstanding."
    )
    bench.report.say()
    bench.report.table(("", "longest gap, nothing going on, ms", "longest gap, calls going on, ms"), rows)


def judge(report: Report, measured: Mapping[Cell, Measured]) -> None:
    """Hold what was measured to the bars, each direction by itself."""
    names = set(next(iter(measured.values())))
    for op in ("read", "write"):
        cells = [cell for cell in measured if cell.op == op]
        if cells and {"uring", "fio"} <= names:
            _judge_uring(report, op, {cell: measured[cell] for cell in cells})
        large = [cell for cell in cells if cell.block_nbytes >= THREADS_BLOCK_NBYTES]
        if large and {"uring", "threads"} <= names:
            ratios = {cell: speed_ratio(measured[cell], "threads", "uring").median for cell in large}
            worst = min(large, key=ratios.__getitem__)
            what = f"{op}: threads / uring, least from 1 MiB on ({worst})"
            report.bar(what, ratios[worst], THREADS_RATIO, least=True)
    report.say()


def _judge_uring(report: Report, op: str, measured: Mapping[Cell, Measured]) -> None:
    ratios = {cell: speed_ratio(runs, "uring", "fio").median for cell, runs in measured.items()}
    worst = min(ratios, key=ratios.__getitem__)
    report.bar(f"{op}: uring / fio, least of all cells ({worst})", ratios[worst], LEAST_RATIO, least=True)
    rates = {
        cell: Spread.of(each.bytes_per_s for each in runs["fio"]).median for cell, runs in measured.items()
    }
    best = max(rates, key=rates.__getitem__)
    report.bar(f"{op}: uring / fio where fio is fastest ({best})", ratios[best], BEST_RATIO, least=True)
    costs = {cell: cost_ratio(runs, "uring", "fio").median for cell, runs in measured.items()}
    dearest = max(costs, key=costs.__getitem__)
    report.bar(f"{op}: CPU time uring / fio, most of all cells ({dearest})", costs[dearest], CPU_RATIO)
