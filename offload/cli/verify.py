"""`offload verify`: re-read every byte of runs, name what is damaged, and go back when that helps.

Results go to standard output, the bar to standard error. The exit code is 0 when everything is whole, 76
when something is damaged, 74 when a run could not be checked.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, CorruptionError, StorageError

if TYPE_CHECKING:
    from ..store import DamagedChunk, Generation, RunReader, RunReport, VerifyReport
    from ._runs import Target

__all__ = ["verify_command"]

HELP = """Re-read every byte of runs and compare it with its checksum. Nothing is changed.

RUN is an output directory of offload finetune, a run's folder, or a directory that runs lie in (name all
drives of a run together). Every damaged chunk is named: drive, file, offset, record, tensor. When the newest
generation is damaged the one before it is checked too, and --fall-back makes the run go on from that one.

A run that a process is writing to is not checked. Exit codes: 0 everything is whole, 76 something is
damaged, 74 a run could not be checked.

Examples:

  offload verify runs/first

  offload verify /mnt/nvme0 /mnt/nvme1 --run 1c9d

  offload verify runs/first --fall-back
"""

# Of a dead drive every chunk is damaged; --json has them all.
_MAX_LINES = 20


def verify_command() -> Callable[..., None]:
    """Return the command."""

    def verify(
        directories: Annotated[
            list[str], typer.Argument(metavar="RUN...", help="Which runs; all drives of a run together.")
        ],
        run: Annotated[
            str | None, typer.Option("--run", metavar="ID", help="Only this run; its id's beginning will do.")
        ] = None,
        fall_back: Annotated[
            bool,
            typer.Option("--fall-back", help="If the newest generation is damaged, go back by one."),
        ] = False,
        json: Annotated[bool, typer.Option("--json", help="Everything, for other programs.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        # Imported here, so that --help is quick.
        from ._runs import choose, find_targets, print_json

        targets = find_targets(directories)
        if run is not None or fall_back or not targets:
            targets = (choose(targets, run, directories),)
        try:
            results = [_check(target, quiet=json, fall_back=fall_back) for target in targets]
        except KeyboardInterrupt:
            typer.echo("interrupted; the runs are as they were", err=True)
            raise typer.Exit(130) from None
        if json:
            sys.stdout.write(print_json({"runs": [result for result, _ in results]}))
        codes = [code for _, code in results]
        # Damage weighs more than a run that could not be looked at.
        raise typer.Exit(max(codes))

    verify.__doc__ = HELP
    return verify


def _check(target: Target, *, quiet: bool, fall_back: bool) -> tuple[dict[str, Any], int]:
    """Verify one run; return what was found, as JSON, and the exit code."""
    from ..aio import open_engine
    from ..store import RunReader, verify_reader
    from ._runs import model_of, step_of, to_json

    def say(text: str) -> None:
        from ..report.terminal import printable

        if not quiet:
            typer.echo(printable(text))

    step = step_of(target.run.newest)
    say(f"{target.label} ({model_of(target)}{'' if step is None else f', step {step}'})")
    with open_engine() as engine:
        try:
            with RunReader.open(target.run.directories, engine=engine, run_id=target.run.run_id) as reader:
                with _progress(quiet) as moved:
                    report = verify_reader(reader, moved)
                result = {**to_json(target), **_as_json(report, reader)}
                _tell(report, reader, say)
        except StorageError as error:
            say(f"  not checked: {error}")
            code = error.exit_code if isinstance(error, CorruptionError) else StorageError.exit_code
            return {**to_json(target), "error": str(error)}, code
        if report.ok:
            return result, 0
        if fall_back and not report.newest.ok:
            result["fall_back"] = _go_back(target, engine, quiet, say)
            return result, 0
        if report.older is not None and report.older.ok:
            again = shlex.join(["offload", "verify", *_arguments(target), "--fall-back"])
            say(f"  the generation before is whole: {again!r} makes the run go on from it")
        elif not report.newest.ok:
            say("  there is no whole generation before it: go on from a snapshot, an export or a backup")
    return result, CorruptionError.exit_code


def _go_back(target: Target, engine: Any, quiet: bool, say: Callable[[str], None]) -> dict[str, Any]:
    from ..store import fall_back as go_back

    with _progress(quiet) as moved:
        went = go_back(target.run.directories, engine=engine, run_id=target.run.run_id, progress=moved)
    step = went.state.get("step")
    say(
        f"  gone back: generation {went.generation} is generation {went.source} again, step {step}; the run"
        " goes on from there"
    )
    return {"left": went.left, "source": went.source, "generation": went.generation, "step": step}


def _tell(report: RunReport, reader: RunReader, say: Callable[[str], None]) -> None:
    newest = reader.newest
    for problem in report.problems:
        say(f"  damaged: {problem}")
    if report.problems and report.newest.ok:
        say("  the next start of the run mends that, from the copy on another drive or by the next commit")
    if report.newest.ok:
        say(f"  generation {newest.number} is whole: {report.newest.num_chunks:,} chunks")
    else:
        _tell_damages(newest, report.newest, say)
    for name, checked, reason in report.snapshots:
        if reason is not None:
            say(f"  snapshot {name} is damaged: {reason}")
        elif checked is not None and not checked.ok:
            say(f"  snapshot {name} is damaged in {len(checked.damaged):,} chunks: {checked.damages[0]}")
        elif checked is not None:
            say(f"  snapshot {name} is whole: {checked.num_chunks:,} chunks")
    if report.older is not None and reader.older is not None and not report.older.ok:
        _tell_damages(reader.older, report.older, say)


def _tell_damages(generation: Generation, report: VerifyReport, say: Callable[[str], None]) -> None:
    say(f"  generation {generation.number} is damaged in {len(report.damaged):,} chunks:")
    for chunk in report.damaged[:_MAX_LINES]:
        place = _place(generation, chunk)
        tensors = place["tensors"]
        more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
        held = f" ({', '.join(tensors[:3])}{more})" if tensors else ""
        say(
            f"    drive {place['drive']}, {place['path']}, offset {place['offset_bytes']:,}: chunk"
            f" {chunk.chunk} of {chunk.record}{held}: {chunk.error}"
        )
    if len(report.damaged) > _MAX_LINES:
        say(f"    and {len(report.damaged) - _MAX_LINES:,} more; --json has them all")


def _as_json(report: RunReport, reader: RunReader) -> dict[str, Any]:
    def part(generation: Generation | None, checked: VerifyReport | None) -> dict[str, Any] | None:
        if generation is None or checked is None:
            return None
        return {
            "generation": generation.number,
            "step": generation.state.get("step"),
            "nbytes": checked.nbytes,
            "num_chunks": checked.num_chunks,
            "damaged": [_place(generation, chunk) for chunk in checked.damaged],
        }

    return {
        "whole": report.ok,
        "problems": list(report.problems),
        "newest": part(reader.newest, report.newest),
        "older": part(reader.older, report.older),
        "snapshots": [
            {
                "name": name,
                "problem": problem,
                "damaged": [str(error) for error in checked.damages] if checked is not None else [],
            }
            for name, checked, problem in report.snapshots
        ],
    }


def _place(generation: Generation, chunk: DamagedChunk) -> dict[str, Any]:
    drive, path, offset_bytes = generation.place(chunk.record, chunk.chunk)
    return {
        "drive": drive,
        "path": path,
        "offset_bytes": offset_bytes,
        "nbytes": chunk.end - chunk.begin,
        "record": chunk.record,
        "unit": chunk.record.rpartition(":")[0],
        "chunk": chunk.chunk,
        "tensors": list(_tensors(generation, chunk)),
        "error": str(chunk.error),
    }


def _tensors(generation: Generation, chunk: DamagedChunk) -> Sequence[str]:
    """Return which tensors lie in a chunk, as far as the run says."""
    # Imported here: torch takes seconds, and most runs are whole.
    from ..export.contents import CONTENTS_KEY, read_contents, tensors_at

    if CONTENTS_KEY not in generation.identity:
        return ()
    try:
        records = read_contents(generation.identity).records
    except ConfigError:
        return ()  # Another program's run: the record and the offset have to do.
    return tensors_at(records, chunk.record, chunk.begin, chunk.end)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show the bytes that were read, over all parts of a verification: each counts from 0 again."""
    from ..training.progress import Progress

    echo: Callable[[str], None] = (lambda _: None) if quiet else (lambda text: typer.echo(f"  {text}"))
    before = last = 0
    with Progress(num_steps=0, logging_steps=1, echo=echo).phase("read") as moved:

        def show(done_nbytes: int, total_nbytes: int) -> None:
            nonlocal before, last
            if done_nbytes < last:
                before += last
            last = done_nbytes
            moved(before + done_nbytes, before + total_nbytes)

        yield show


def _arguments(target: Target) -> list[str]:
    if target.output is not None:
        return [str(target.output)]
    return [folder.path for folder in target.run.folders]
