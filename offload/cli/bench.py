"""`offload bench`: parse the options, have the machine measured, show and keep what came out.

Owns the options and the progress bar; `offload.probe` measures, `offload.report` renders and writes.
Results go to standard output; the bar, and the last line beside `--json -`, to standard error.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..aio.engine import EngineName
from ..errors import ConfigError, StorageError
from ..sizes import parse_bytes

if TYPE_CHECKING:
    from ..probe.options import BenchOptions
    from ..probe.results import BenchResult, Pattern
    from ..report.outputs import Outputs

__all__ = ["bench_command", "parse_seconds"]

HELP = """Measure drives, host memory and the GPU's link, and keep the best I/O setting for later runs.

DIR is a directory on each drive, one a drive. In each one file is made, written, read and removed; its
name is gone at once, so even a kill leaves nothing. Half a minute to a minute a drive; with --full
some minutes. At the end the whole file is read back and compared with what was written.

GB/s is the median of the samples, with the slowest and the fastest beside it: a wide range means a busy
or a wandering drive. A write ends with its flush (fdatasync). Reads and writes bypass the page cache
(O_DIRECT) where the file system allows it. p50, p99 and p99.9 are latencies of single blocks. CPU s/GB
is what a gigabyte costs this process. The best setting has the fewest bytes in flight within 2 % of the
fastest.

Examples:

  offload bench /mnt/nvme0

  offload bench /mnt/nvme0 /mnt/nvme1 --plot bench.html

  offload bench /mnt/nvme0 --full --json bench.json

  offload bench /mnt/nvme0 --sustained 10min
"""

_SECONDS = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*)\s*")
_UNITS_S = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}

WHAT, HOW, OUTPUT = "What to measure", "How", "Output"


def bench_command() -> Callable[..., None]:
    """Return the command."""

    def bench(
        directories: Annotated[
            list[str], typer.Argument(metavar="DIR...", help="A directory on each drive to measure.")
        ],
        size: Annotated[
            str, typer.Option(metavar="SIZE", help="File in each DIR.", rich_help_panel=WHAT)
        ] = "4GiB",
        full: Annotated[
            bool,
            typer.Option(
                "--full", help="Sweep 128 KiB to 8 MiB by depth 1 to 32; minutes.", rich_help_panel=WHAT
            ),
        ] = False,
        read: Annotated[bool, typer.Option("--read", help="Only reading.", rich_help_panel=WHAT)] = False,
        write: Annotated[bool, typer.Option("--write", help="Only writing.", rich_help_panel=WHAT)] = False,
        mixed: Annotated[
            bool,
            typer.Option("--mixed", help="Only both at once; the three combine.", rich_help_panel=WHAT),
        ] = False,
        sustained: Annotated[
            str | None,
            typer.Option(
                metavar="TIME",
                help="Also write to each drive for so long: 10min, 90s, 1h. Wears it.",
                rich_help_panel=WHAT,
            ),
        ] = None,
        no_latency: Annotated[
            bool, typer.Option("--no-latency", help="Leave out latencies.", rich_help_panel=WHAT)
        ] = False,
        no_memory: Annotated[
            bool, typer.Option("--no-memory", help="Leave out host memory and crc32c.", rich_help_panel=WHAT)
        ] = False,
        no_device: Annotated[
            bool, typer.Option("--no-device", help="Leave out the GPU's link.", rich_help_panel=WHAT)
        ] = False,
        block: Annotated[
            str | None,
            typer.Option(
                metavar="SIZES", help="Block sizes instead of the usual: 1MiB,4MiB.", rich_help_panel=HOW
            ),
        ] = None,
        depth: Annotated[
            str | None,
            typer.Option(
                metavar="NUMBERS",
                help="Operations in flight instead of the usual: 1,8,32.",
                rich_help_panel=HOW,
            ),
        ] = None,
        rounds: Annotated[
            int, typer.Option(metavar="INT", help="Samples of each figure.", rich_help_panel=HOW)
        ] = 3,
        engine: Annotated[
            str | None,
            typer.Option(
                metavar="|".join(get_args(EngineName)),
                help="I/O engine; the best that works here.",
                rich_help_panel=HOW,
            ),
        ] = None,
        buffered: Annotated[
            bool,
            typer.Option("--buffered", help="Go through the page cache: no O_DIRECT.", rich_help_panel=HOW),
        ] = False,
        json: Annotated[
            str | None,
            typer.Option(
                metavar="FILE|-", help="All figures and raw samples; - prints them.", rich_help_panel=OUTPUT
            ),
        ] = None,
        markdown: Annotated[
            str | None, typer.Option(metavar="FILE", help="The tables, to paste.", rich_help_panel=OUTPUT)
        ] = None,
        plot: Annotated[
            str | None,
            typer.Option(metavar="FILE", help="Charts: one .html page or one .svg.", rich_help_panel=OUTPUT),
        ] = None,
        machine: Annotated[
            str | None,
            typer.Option(
                metavar="FILE",
                help="Keep the best setting here instead of in ~/.config/offload/machine.json.",
                rich_help_panel=OUTPUT,
            ),
        ] = None,
        no_machine: Annotated[
            bool, typer.Option("--no-machine", help="Keep no setting.", rich_help_panel=OUTPUT)
        ] = False,
        quiet: Annotated[
            bool, typer.Option("--quiet", help="No bar and no tables: the last line.", rich_help_panel=OUTPUT)
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
        ] = False,
    ) -> None:
        # Imported here: numpy and pydantic take time that --help and a typo need not.
        from ..probe.options import BenchOptions

        chosen: dict[Pattern, bool] = {"read": read, "write": write, "mixed": mixed}
        options = BenchOptions(
            size_nbytes=_parse("--size", size, parse_bytes),
            patterns=tuple(name for name, wanted in chosen.items() if wanted or not any(chosen.values())),
            full=full,
            block_nbytes=_parse_list("--block", block, parse_bytes),
            depths=_parse_list("--depth", depth, _parse_count),
            rounds=rounds,
            engine=_parse_engine(engine),
            direct=not buffered,
            latency=not no_latency,
            memory=not no_memory,
            device=not no_device,
            sustained_s=_parse("--sustained", sustained, parse_seconds) if sustained is not None else None,
        )
        outputs = _outputs(options, json, markdown, plot, machine, no_machine)
        _check_directories(directories)
        try:
            _run(directories, options, outputs, quiet=quiet, json_alone=json == "-", debug=debug)
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing is left on the drives", err=True)
            raise typer.Exit(130) from None

    bench.__doc__ = HELP
    return bench


def parse_seconds(text: str) -> float:
    """Return the seconds that `text` names: `90s`, `10min`, `1.5h`, or a bare number of seconds.

    Raises:
        ValueError: it is no time.

    >>> parse_seconds("10min"), parse_seconds("90"), parse_seconds("0.5 h")
    (600.0, 90.0, 1800.0)
    """
    match = _SECONDS.fullmatch(text.lower())
    unit_s = _UNITS_S.get(match["unit"]) if match else None
    if match is None or unit_s is None:
        raise ValueError(f"not a time: {text!r}; write 90s, 10min or 1h")
    return float(match["number"]) * unit_s


def _run(
    directories: Sequence[str],
    options: BenchOptions,
    outputs: Outputs,
    *,
    quiet: bool,
    json_alone: bool,
    debug: bool,
) -> None:
    from ..probe.run import run_bench
    from ..report.document import to_json
    from ..report.outputs import keep_machine, write_files
    from ..report.sections import sections_of
    from ..report.terminal import print_sections, printable

    with _progress(sys.stderr.isatty() and not quiet) as progress, _fewer_messages("offload.aio", debug):
        result = run_bench(directories, options, progress)

    last: list[str] = []

    def show() -> None:
        if json_alone:
            sys.stdout.write(to_json(result))
        elif not quiet:
            print_sections(sections_of(result))

    def draw() -> None:
        if outputs.plot is not None:
            _plot_writer()(result, outputs.plot)

    def tell() -> None:
        if not (json_alone or quiet):
            typer.echo()
        for line in last if not (json_alone and quiet) else ():
            typer.echo(printable(line), err=json_alone)

    # The setting first, since every later run depends on it; the line about it last.
    _do_all(
        lambda: last.append(keep_machine(result, outputs)),
        show,
        lambda: write_files(result, outputs),
        draw,
        tell,
    )


def _do_all(*steps: Callable[[], None]) -> None:
    """Do every step, then raise the first error: a full disk or a closed pipe costs one, not the minutes."""
    errors: list[OSError] = []
    for step in steps:
        try:
            step()
        except OSError as error:  # StorageError is one
            errors.append(error)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _progress(terminal: bool) -> Iterator[Callable[[float, str], None] | None]:
    """Give what shows a bar with the time that is left; None where there is no terminal."""
    if not terminal:
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        total=1.0,
        leave=False,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}  {desc}",
    ) as bar:

        def show(fraction: float, text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update(min(fraction, 1.0) - bar.n)
            bar.refresh()

        yield show


@contextlib.contextmanager
def _fewer_messages(name: str, debug: bool) -> Iterator[None]:
    """Hold back a logger's messages: the engine's come for each depth, and the table says it once."""
    logger = logging.getLogger(name)
    level = logger.level
    if not debug:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parse(option: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


def _parse_list(option: str, text: str | None, parse: Callable[[str], int]) -> tuple[int, ...] | None:
    if text is None:
        return None
    # Sorted and once each: the sweep shows them in this order.
    return tuple(sorted({_parse(option, part, parse) for part in text.split(",")}))


def _parse_count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"not a whole number: {text!r}; write numbers with commas, for example 1,8,32")
    return int(text)


def _parse_engine(name: str | None) -> EngineName | None:
    names: tuple[EngineName, ...] = get_args(EngineName)
    for known in names:
        if name == known:
            return known
    if name is None:
        return None
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise ConfigError(f"--engine: no I/O engine is called {name!r}; {hint}")


def _check_directories(directories: Sequence[str]) -> None:
    """Refuse what is no directory before anything is opened, and say which one may be meant."""
    seen: dict[str, str] = {}
    for directory in directories:
        if not os.path.lexists(directory):
            raise StorageError(
                f"{directory} does not exist{_nearest(directory)}; name a directory on the drive to measure",
                errno=errno.ENOENT,
                path=directory,
            )
        if not os.path.isdir(directory):
            parent = os.path.dirname(os.path.abspath(directory))
            raise StorageError(
                f"{directory} is not a directory; name one on the drive to measure, for example {parent}",
                errno=errno.ENOTDIR,
                path=directory,
            )
        real = os.path.realpath(directory)
        if real in seen:
            raise ConfigError(f"{directory} and {seen[real]} are one directory; name each drive once")
        seen[real] = directory


def _nearest(directory: str) -> str:
    parent, name = os.path.split(os.path.abspath(directory))
    try:
        there = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:
        return f", nor does {parent}"
    close = difflib.get_close_matches(name, there, n=1)
    return f", did you mean {os.path.join(parent, close[0])}?" if close else ""


def _outputs(
    options: BenchOptions,
    json: str | None,
    markdown: str | None,
    plot: str | None,
    machine: str | None,
    no_machine: bool,
) -> Outputs:
    """Check where results go before minutes are spent on them."""
    from ..machine import default_machine_path
    from ..report.outputs import Outputs

    named = {"--json": json, "--markdown": markdown, "--plot": plot, "--machine": machine}
    files = {
        option: name
        for option, name in named.items()
        if name is not None and (option, name) != ("--json", "-")
    }
    for option, name in files.items():
        if name.startswith("-") or not name:
            dash = ", or - for standard output" if option == "--json" else ""
            raise ConfigError(f"{option} needs a file{dash}, not {name!r}")
        _check_file(option, Path(name))
    twice = [name for name in files.values() if list(files.values()).count(name) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named for two outputs; give each a file of its own")
    if plot is not None and Path(plot).suffix.lower() not in (".html", ".svg"):
        raise ConfigError(f"--plot: {plot} is neither .html nor .svg")
    if plot is not None:
        # Now, since a missing package must not be told after minutes of measuring.
        _plot_writer()
    if machine is not None and no_machine:
        raise ConfigError("--machine and --no-machine exclude each other")
    unkept = "--no-machine" if no_machine else _partial(options, named=machine is not None)
    if machine is not None and unkept:
        raise ConfigError(f"--machine: {unkept}")
    path = None if unkept else Path(machine) if machine is not None else default_machine_path()
    if path is not None and os.path.exists(path) and not path.is_file():
        # Saving replaces what is there: for root /dev/null would be gone.
        raise ConfigError(f"{path} is no regular file, to keep the setting in; use --no-machine to keep none")
    return Outputs(
        json=Path(json) if json is not None and json != "-" else None,
        markdown=Path(markdown) if markdown is not None else None,
        plot=Path(plot) if plot is not None else None,
        machine=path,
        unkept=unkept,
    )


def _plot_writer() -> Callable[[BenchResult, Path], None]:
    """Return what writes the picture; matplotlib is imported here and nowhere else."""
    try:
        # It remarks on a home that it cannot write to, and on its font cache; it does without both.
        with _fewer_messages("matplotlib", debug=False):
            from ..report.page import write_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError("--plot needs matplotlib: python3 -m pip install 'offload[plot]'") from error
    return write_plot


def _check_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a directory; name a file")
    # `machine.json` brings its folder along.
    if option != "--machine" and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: the folder {path.absolute().parent} does not exist")


def _partial(options: BenchOptions, *, named: bool) -> str:
    """Return why a measurement would not serve later runs, or nothing.

    What was narrowed on purpose is kept only where the user names a file: an experiment with one depth
    must not slow down every run that comes after it.
    """
    if not {"read", "write"} <= set(options.patterns):
        return "a setting is chosen from reading and writing, and only a part was measured"
    if named:
        return ""
    narrowed = {
        "--block": options.block_nbytes is not None,
        "--depth": options.depths is not None,
        "--engine": options.engine is not None,
        "--buffered": not options.direct,
    }
    given = [option for option, is_given in narrowed.items() if is_given]
    return f"{' and '.join(given)} narrowed the choice; --machine FILE keeps it all the same" if given else ""
