"""What does a loss in chunks of tokens save in memory, and what does it cost in time?

A small model with a large vocabulary is trained with everything resident, so that head and loss are most of
a step and nothing waits for a drive: with chunks and without, in turn, each attached anew. Memory is that of
the process above what it had before the step; the losses of both must agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _memory import MemoryWatch, private_nbytes
from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.sizes import MIB, format_bytes, parse_bytes

QUESTION = "what does a loss in chunks of tokens save, and what does it cost?"
# Beside the chunk: the head's gradient for one chunk, saved inputs, the layers' activations.
PEAK_BAR = 0.25
TIME_BAR = 1.05
LOSS_BAR = 1e-6


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its time, the most memory it took above what there was before it, and its loss."""

    seconds: float
    peak_nbytes: int
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv)
    contenders = {"in chunks": args.chunk, "whole": None}
    found: dict[str, list[Step]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            for place, step in enumerate(_train(args, contenders[name])):
                report.sample(
                    round=number + 1,
                    contender=name,
                    step=place + 1,
                    step_s=round(step.seconds, 4),
                    peak_nbytes=step.peak_nbytes,
                    loss=step.loss,
                )
                # The first step of a process touches its memory.
                if place:
                    found[name].append(step)
    opened = open_model(args)
    logits_nbytes = args.rows * args.length * opened.vocab_size * 4
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters, {opened.vocab_size:,} logits a token,"
        f" {args.rows} x {args.length} tokens a step: {format_bytes(logits_nbytes)} of logits in fp32,"
        f" several times while the loss is computed. Chunks of {format_bytes(args.chunk)};"
        f" {torch.get_num_threads()} threads; {args.rounds} rounds of {args.steps} steps, the first of each"
        " left out."
    )
    report.say()
    report.table(
        ("loss", "step, s", "peak above the memory before the step"),
        (
            (name, _spread([step.seconds for step in steps]), format_bytes(_peak(steps)))
            for name, steps in found.items()
        ),
    )
    chunks, whole = found["in chunks"], found["whole"]
    if _peak(whole) > 0:
        report.bar("peak in chunks / whole", _peak(chunks) / _peak(whole), PEAK_BAR)
    else:
        report.say("The steps are too short for their memory to be seen.")
    seconds = [statistics.median(step.seconds for step in steps) for steps in (chunks, whole)]
    report.bar("step in chunks / whole, medians", seconds[0] / seconds[1], TIME_BAR)
    differences = (abs(one.loss / other.loss - 1) for one, other in zip(chunks, whole, strict=True))
    report.bar("largest relative difference of losses", max(differences), LOSS_BAR)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "vocabulary-128k")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="not used: no drive takes part")
    parser.add_argument("--host-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--chunk", type=parse_bytes, default=64 * MIB, metavar="SIZE", help="[64MiB]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="of each in a round [%(default)s]")
    parser.add_argument("--rows", type=int, default=4, help="sequences in a step [%(default)s]")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence [%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _train(args: argparse.Namespace, chunk_nbytes: int | None) -> list[Step]:
    opened = open_model(args)
    tokens = random_tokens(opened, args.rows, args.length)
    before: list[int] = []
    times: list[tuple[float, float]] = []
    losses: list[float] = []
    with (
        offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            host_memory=args.host_memory,
            device_memory=args.device_memory,
            loss_chunk_nbytes=chunk_nbytes,
        ) as runtime,
        MemoryWatch(os.getpid()) as watch,
    ):
        for _ in range(args.steps):
            before.append(private_nbytes())
            began_s = time.monotonic()
            loss = opened.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            runtime.step()
            runtime.synchronize()
            times.append((began_s, time.monotonic()))
            losses.append(loss.item())
            # The graph owns what backward did not need.
            del loss
    return [
        Step(end_s - start_s, watch.peak_nbytes(start_s, end_s) - base, loss)
        for (start_s, end_s), base, loss in zip(times, before, losses, strict=True)
    ]


def _peak(steps: Sequence[Step]) -> int:
    return max(step.peak_nbytes for step in steps)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}..{max(values):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
