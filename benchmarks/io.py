"""Are our engines as fast as fio, block size by block size, and as cheap?

fio and our engines take turns on the same file: the same bytes, direct, sequential, the same block size
and queue depth. Ours are given large requests, as the runtime does, and cut them into blocks. Each round
runs every contender once, in an order that is reversed from round to round, and gives a ratio; the
median of the ratios is judged. On a real drive (--disk) the figures are for information; on the quiet
disk (--quiet, root), which repeats, the bars count.

  python benchmarks/io.py --quiet                     the grid, 18 cells, about 8 minutes
  python benchmarks/io.py --quiet --cells 'read:1m:*' a part of it
  python benchmarks/io.py --disk /mnt/nvme --peers    a drive, and what else loads weights from it
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from _cells import grid, select_cells
from _fio import fio_version
from _grid import Contenders, run_grid
from _ours import fill_file
from _quiet import quiet_disk
from _report import Report, add_report_arguments

from offload.errors import OffloadError
from offload.sizes import format_bytes, parse_bytes

QUESTION = "are our engines as fast as fio, and as cheap?"
FILE = "data"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    try:
        return _run(args, sys.argv[1:] if argv is None else argv)
    except OffloadError as error:
        print(f"io.py: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--disk", type=Path, metavar="DIR", help="measure the drive that holds DIR")
    parser.add_argument("--quiet", action="store_true", help="measure a disk in memory (root)")
    parser.add_argument("--size", default="1GiB", help="of the file [%(default)s]")
    parser.add_argument(
        "--transfer", default="4GiB", metavar="SIZE", help="bytes of one run, wrapping around [%(default)s]"
    )
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
    contenders = Contenders(
        fio=not args.without_fio,
        engines=tuple(args.engines.split(",")),
        file_nbytes=parse_bytes(args.size),
        nbytes=parse_bytes(args.transfer),
        rounds=args.rounds,
    )
    cells = select_cells(grid(("read", "write"), blocks, depths), args.cells)
    fio = fio_version() if contenders.fio else "left out"
    report = Report(__file__, QUESTION, argv, args.disk)
    report.say(f"fio: {fio}. One file of {format_bytes(contenders.file_nbytes)}, all of it written before,")
    report.say(
        f"{format_bytes(contenders.nbytes)} a run, {args.rounds} rounds; direct I/O, no flush on either side."
    )
    report.say()
    with ExitStack() as stack:
        places = []
        if args.disk is not None:
            folder = tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-io-")
            places.append(("disk", Path(stack.enter_context(folder))))
        if args.quiet:
            places.append(("quiet", stack.enter_context(quiet_disk(contenders.file_nbytes))))
        for place, directory in places:
            fill_file(directory / FILE, contenders.file_nbytes)
            run_grid(report, place, directory / FILE, cells, contenders, judged=place == "quiet")
    return report.finish(args.save)


if __name__ == "__main__":
    sys.exit(main())
