"""`offload export`: the weights of a run that is not open, as a plain Hugging Face directory."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, StateError
from ..sizes import parse_bytes

if TYPE_CHECKING:
    from ..export.contents import Contents
    from ._runs import Target

__all__ = ["export_command"]

HELP = """Write the weights of a run as safetensors, with its model's config and tokenizer.

RUN is an output directory of offload finetune, a run's folder, or a directory that it lies in (name all
drives of a run together). The run must not be in use, and is only read. What is written appears whole or
not at all; memory for one unit of the model is enough, on top of what Python and torch take.

Config and tokenizer are copied from the model directory that the run was begun from, where it is still
there, or from --model. Every byte is verified; a damaged run ends the export with exit code 76. Without
room it ends with 75, with the bytes needed and free.

Examples:

  offload export runs/first --to model

  offload export /mnt/nvme0 /mnt/nvme1 --run 1c9d --to model --dtype bfloat16
"""

_DTYPES = ("float32", "bfloat16", "float16")


def export_command() -> Callable[..., None]:
    """Return the command."""

    def export(
        directories: Annotated[
            list[str], typer.Argument(metavar="RUN...", help="Which run; all its drives together.")
        ],
        to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to; new, empty, or an export.")],
        run: Annotated[
            str | None, typer.Option("--run", metavar="ID", help="Which of several; its id's beginning.")
        ] = None,
        model: Annotated[
            Path | None,
            typer.Option("--model", metavar="DIR", help="Model directory for config and tokenizer."),
        ] = None,
        dtype: Annotated[
            str | None,
            typer.Option(metavar="|".join(_DTYPES), help="Of the weights; what config.json names."),
        ] = None,
        max_shard_size: Annotated[
            str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file.")
        ] = "5GB",
        older: Annotated[
            bool, typer.Option("--older", help="The generation before the newest: where that is damaged.")
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        # Imported here, so that --help is quick.
        from ._runs import choose, find_targets

        if dtype is not None and dtype not in _DTYPES:
            close = difflib.get_close_matches(dtype, _DTYPES, n=1)
            raise ConfigError(f"--dtype: {dtype!r} is none of {', '.join(close or _DTYPES)}")
        try:
            nbytes = parse_bytes(max_shard_size)
        except ValueError as error:
            raise ConfigError(f"--max-shard-size: {error}") from error
        target = choose(find_targets(directories), run, directories)
        try:
            _export(target, to, model, dtype, nbytes, older=older)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; nothing is left of the export to {to}", err=True)
            raise typer.Exit(130) from None

    export.__doc__ = HELP
    return export


def _export(
    target: Target, to: Path, model: Path | None, dtype: str | None, max_shard_nbytes: int, *, older: bool
) -> None:
    # torch takes seconds to import, so the arguments were checked before.
    import torch

    from ..aio import open_engine
    from ..export.checkpoint import ExportOptions, check_export_target
    from ..export.contents import read_contents
    from ..export.run import export_run
    from ..store import RunReader
    from ..training.progress import Progress

    check_export_target(to)
    _check_outside(target, to)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine())
        reader = stack.enter_context(
            RunReader.open(target.run.directories, engine=engine, run_id=target.run.run_id)
        )
        generation = reader.older if older else reader.newest
        if generation is None or not generation.number:
            what = "no generation before the newest" if older else "committed nothing yet"
            raise StateError(f"{target.label} has {what}; there is nothing to export")
        contents = read_contents(generation.identity)
        directory = _model_directory(target, contents, model)
        options = ExportOptions(
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_nbytes=max_shard_nbytes,
            assets_from=directory,
        )
        typer.echo(f"{target.label}, generation {generation.number}, step {generation.state.get('step')}")
        with Progress(num_steps=0, logging_steps=1, echo=typer.echo).phase("export") as moved:
            written_nbytes = 0
            total_nbytes = sum(record.weights_nbytes for record in contents.records.values())

            def written(nbytes: int) -> None:
                nonlocal written_nbytes
                written_nbytes += nbytes
                moved(written_nbytes, max(written_nbytes, total_nbytes))

            target_directory = export_run(
                generation,
                contents,
                to,
                model=_model(contents, directory, stack),
                options=options,
                on_written=written,
            )
    typer.echo(f"the model is in {target_directory}")


def _check_outside(target: Target, to: Path) -> None:
    """Refuse to write into a run's own folder, where nothing else may lie."""
    where = to.absolute()
    for folder in target.run.folders:
        if Path(folder.path) in (where, *where.parents):
            raise ConfigError(f"--to: {to} lies in the run's own folder; name another directory")


def _model_directory(target: Target, contents: Contents, model: Path | None) -> Path | None:
    """Return the directory that config and tokenizer come from, None where there is none."""
    if model is not None:
        if not (model / "config.json").is_file():
            raise ConfigError(f"--model: {model} is not a model directory: it has no config.json")
        return model
    named = target.pointer.identity.get("model_name_or_path") if target.pointer is not None else None
    known = [Path(name) for name in (named, contents.directory) if isinstance(name, str)]
    for directory in known:
        if (directory / "config.json").is_file():
            return directory
    reason = f"{known[0]} is no longer there" if known else "the run was not begun from a model directory"
    typer.echo(f"without config.json and tokenizer, since {reason}; --model DIR brings them along", err=True)
    return None


def _model(contents: Contents, directory: Path | None, stack: ExitStack) -> Any:
    """Return the model that brings the persistent buffers, which a run does not hold; mostly none."""
    if not contents.buffers:
        return None
    names = ", ".join(contents.buffers[:3])
    if directory is None:
        raise ConfigError(
            f"the model has {len(contents.buffers)} buffers that the run does not hold ({names}); --model DIR"
            " names the model directory that has them"
        )
    from ..hf import open_pretrained

    model, source = open_pretrained(directory)
    stack.callback(source.close)
    return model
