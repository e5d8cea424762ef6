"""Are our engines as fast as fio, block size by block size, and as cheap?

fio and our engines take turns on the same file: the same bytes, direct, sequential, the same block size
and queue depth. Ours are given large requests, as the runtime does, and cut them into blocks. Each round
runs every contender once, in an order that is reversed from round to round, and gives a ratio; the
median of the ratios is judged. On a real drive (--disk) the figures are for information; on the quiet
disk (--quiet, root), which repeats, the bars count.

  python benchmarks/io.py --quiet                       the grid, 18 cells, about 6 minutes
  python benchmarks/io.py --quiet --cells 'read:1m:*'   three of them
  python benchmarks/io.py --quiet --parts all           everything, about 15 minutes
  python benchmarks/io.py --disk /mnt/nvme --parts grid,peers

Parts: `grid`; `two`, two quiet disks at once; `memory`, huge pages and small, much memory and little;
`blocks`, one request for each block from Python; `fixed`, what registered buffers and files give fio;
`gil`, how long calls hold off other Python threads;
`peers`, what else loads weights: aiofiles, numpy, torch, safetensors, Accelerate.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _cells import Cell, grid, select_cells
from _fio import fio_version
from _grid import Bench, measure_blocks, measure_fixed, measure_gil, measure_grid, measure_memory, measure_two
from _ours import fill_file
from _quiet import quiet_disk
from _report import Report, add_report_arguments

from offload.errors import ConfigError, OffloadError
from offload.sizes import format_bytes, parse_bytes

QUESTION = "are our engines as fast as fio, and as cheap?"
FILE = "data"
PARTS = ("grid", "two", "memory", "blocks", "fixed", "gil", "peers")
# The peers' tensors are a half of the file's size, and are written in this many formats.
PEER_COPIES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    try:
        return _run(args, sys.argv[1:] if argv is None else argv)
    except OffloadError as error:
        print(f"io.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("io.py: interrupted; what it made is gone again", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--disk", type=Path, metavar="DIR", help="measure the drive that holds DIR")
    parser.add_argument("--quiet", action="store_true", help="measure a disk in memory (root)")
    parser.add_argument("--size", default="1GiB", help="of the file [%(default)s]")
    parser.add_argument(
        "--transfer", default="4GiB", metavar="SIZE", help="bytes of one run, wrapping around [%(default)s]"
    )
    parser.add_argument("--parts", default="grid", help=f"{','.join(PARTS)} or all [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--blocks", default="128KiB,1MiB,8MiB", help="block sizes [%(default)s]")
    parser.add_argument("--depths", default="1,8,32", help="queue depths [%(default)s]")
    parser.add_argument("--cells", default="*", metavar="PATTERNS", help="OP:BLOCK:DEPTH, as in 'read:1m:*'")
    parser.add_argument("--engines", default="uring,threads", help="[%(default)s]")
    parser.add_argument("--without-fio", action="store_true", help="ours alone: no ratios")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.disk is None and not args.quiet:
        parser.error("name a drive to measure with --disk DIR, or --quiet, or both")
    return args


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    blocks = [parse_bytes(block) for block in args.blocks.split(",")]
    depths = [int(depth) for depth in args.depths.split(",")]
    cells = select_cells(grid(("read", "write"), blocks, depths), args.cells)
    parts = _parts(args)
    file_nbytes = parse_bytes(args.size)
    for cell in cells:
        if cell.file_nbytes > file_nbytes:
            raise ConfigError(
                f"{cell} needs a file of {format_bytes(cell.file_nbytes)}, not of {format_bytes(file_nbytes)}"
                ": raise --size, or choose other --cells"
            )
    fio = "left out" if args.without_fio else fio_version()
    report = Report(__file__, QUESTION, argv, args.disk)
    report.say(
        f"fio: {fio}, io_uring. One file of {args.size}, all of it written before; {args.transfer} a run,"
        f" {args.rounds} rounds; direct I/O, no flush on either side. Medians [least..most]; ratios are taken"
        " within each round. CPU seconds are those of the contender, not of the kernel's loop threads."
    )
    report.say()
    bench = Bench(
        report,
        place="drive",
        fio=not args.without_fio,
        engines=tuple(args.engines.split(",")),
        file_nbytes=file_nbytes,
        nbytes=parse_bytes(args.transfer),
        rounds=args.rounds,
    )
    if args.disk is not None:
        with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-io-") as folder:
            _measure(bench, Path(folder), cells, parts, judged=False)
    if args.quiet:
        with quiet_disk(_room_nbytes(file_nbytes, parts)) as directory:
            _measure(dataclasses.replace(bench, place="quiet disk"), directory, cells, parts, judged=True)
    return report.finish(args.save)


def _parts(args: argparse.Namespace) -> frozenset[str]:
    wanted = set(PARTS) if args.parts == "all" else set(args.parts.split(","))
    unknown = wanted - set(PARTS)
    if unknown:
        raise ConfigError(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.without_fio:
        wanted.discard("fixed")
    return frozenset(wanted)


def _room_nbytes(file_nbytes: int, parts: frozenset[str]) -> int:
    """Return what the file and the largest of the parts' own files need at once."""
    peers_nbytes = PEER_COPIES * file_nbytes // 2 if "peers" in parts else 0
    return file_nbytes + max(peers_nbytes, file_nbytes if "gil" in parts else 0)


def _measure(
    bench: Bench, directory: Path, cells: Sequence[Cell], parts: frozenset[str], *, judged: bool
) -> None:
    file = directory / FILE
    fill_file(file, bench.file_nbytes)
    if "grid" in parts:
        measure_grid(bench, file, cells, judged=judged)
    if "memory" in parts:
        measure_memory(bench, file)
    if "blocks" in parts:
        measure_blocks(bench, file)
    if "fixed" in parts:
        measure_fixed(bench, file)
    if "two" in parts and not judged:
        bench.report.say(f"{bench.place}: one directory only; two at once are measured with --quiet.")
        bench.report.say()
    elif "two" in parts:
        with quiet_disk(bench.file_nbytes) as other:
            fill_file(other / FILE, bench.file_nbytes)
            measure_two(bench, [file, other / FILE], judged=judged)
    if "gil" in parts:
        measure_gil(bench, directory / "burst")
    if "peers" in parts:
        # Imported here: torch, Accelerate and their threads have no place beside the other parts.
        from _peers import measure_peers

        folder = directory / "peers"
        folder.mkdir()
        measure_peers(bench.report, bench.place, folder, bench.file_nbytes // 2, bench.rounds)


if __name__ == "__main__":
    sys.exit(main())
