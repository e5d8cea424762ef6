"""What does a step cost whose saved inputs do not fit into host memory?

The same model, batch and budget, once with room for the inputs of all units, once with room for some of them
and the rest on disk, in turn. Bytes are the runtime's own counters: every input that memory does not hold is
to be written once and read once. Losses must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.planner import describe_model
from offload.planner.inputs import SavedInputs, saved_inputs
from offload.sizes import format_bytes

QUESTION = "what does a step cost whose saved inputs do not fit into host memory?"


@dataclass(frozen=True, slots=True)
class _Step:
    """A steady step: its loss, what it took, and bytes of inputs written and read."""

    loss: float
    seconds: float
    stall_s: float
    written_nbytes: int
    read_nbytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    figures: dict[str, list[_Step]] = {"memory": [], "disk": []}
    for turn in range(args.rounds):
        for home in ("memory", "disk") if turn % 2 == 0 else ("disk", "memory"):
            figures[home] += _measure(args, report, turn, home)
    inputs = _inputs(args)
    kept = _memory_nbytes(args, inputs)
    spilled = sum(inputs.on_disk(kept))
    report.say(
        f"{len(inputs.sizes)} inputs of {format_bytes(inputs.sizes[0])} a step, in all"
        f" {format_bytes(inputs.nbytes)}; host memory holds {format_bytes(kept)} of them,"
        f" the other {format_bytes(spilled)} go to disk. Steady steps:"
    )
    report.say()
    rows = []
    for home, steps in figures.items():
        seconds = [step.seconds for step in steps]
        rows.append(
            (
                home,
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})",
                f"{statistics.median(step.stall_s for step in steps):.2f}",
                format_bytes(max(step.written_nbytes for step in steps)),
                format_bytes(max(step.read_nbytes for step in steps)),
            )
        )
    report.table(("inputs in", "step, s (least - most)", "stall, s", "inputs written", "inputs read"), rows)
    ratio = _median_s(figures["disk"]) / _median_s(figures["memory"])
    report.say(f"A step with inputs on disk takes {ratio:.3f} times one with all in memory.")
    report.say()
    once = all(step.written_nbytes == step.read_nbytes == spilled for step in figures["disk"])
    report.fact("every input that memory does not hold is written once and read once", once)
    losses = [{step.loss for step in steps} for steps in figures.values()]
    report.fact("the losses are the same, bit for bit", losses[0] == losses[1])
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "100m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--kept", type=int, default=3, help="inputs that memory holds [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="STEPS", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="of each round [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step [%(default)s]")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row [%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _inputs(args: argparse.Namespace) -> SavedInputs:
    facts = describe_model(open_model(args).model, "the model")
    return saved_inputs(facts, args.batch, args.length, 4)


def _memory_nbytes(args: argparse.Namespace, inputs: SavedInputs) -> int:
    return sum(inputs.sizes[-args.kept :])


def _median_s(steps: Sequence[_Step]) -> float:
    return statistics.median(step.seconds for step in steps)


def _measure(args: argparse.Namespace, report: Report, turn: int, home: str) -> list[_Step]:
    """Run one setting; return its steady steps."""
    opened, inputs = open_model(args), _inputs(args)
    tokens = random_tokens(opened, args.batch, args.length)
    kept = _memory_nbytes(args, inputs)
    steady = []
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-inputs-") as directory:
        runtime = offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            disk=[directory],
            host_memory=args.host_memory,
            device_memory=args.device_memory,
            activations_nbytes=inputs.nbytes if home == "memory" else kept,
            activations_disk_nbytes=0 if home == "memory" else inputs.disk_room_nbytes(kept),
        )
        with runtime:
            for step in range(args.warm_up + args.steps):
                runtime.reset_stats()
                began_s = time.perf_counter()
                loss = opened.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                runtime.synchronize()
                step_s = time.perf_counter() - began_s
                stats = runtime.stats()
                figures = _Step(
                    loss=loss.item(),
                    seconds=step_s,
                    stall_s=stats.stall_s,
                    written_nbytes=stats.activations_written_nbytes,
                    read_nbytes=stats.activations_read_nbytes,
                )
                report.sample(
                    round=turn,
                    inputs_in=home,
                    step=step + 1,
                    warm_up=step < args.warm_up,
                    loss=figures.loss,
                    step_s=round(step_s, 4),
                    stall_s=round(stats.stall_s, 4),
                    inputs_written=stats.activations_written_nbytes,
                    inputs_read=stats.activations_read_nbytes,
                    disk_written=stats.disk_written_nbytes,
                    disk_read=stats.disk_read_nbytes,
                )
                if step >= args.warm_up:
                    steady.append(figures)
    return steady


if __name__ == "__main__":
    sys.exit(main())
