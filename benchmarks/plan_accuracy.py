"""Does a run take the bytes, the memory and the time that `offload plan` says?

For each size and home, in turn: the machine is measured in a few seconds, as `offload finetune` does before
a run; the plan is made; the model is attached with it; and steps are timed in the steady state, from
the end of one to the end of another, with everything committed at the end. Predicted and measured stand
side by side. A run's own measurement of the machine is that of its minute: on a machine that wanders, the
spread of the steps beside it says how far.

  python benchmarks/plan_accuracy.py --disk /mnt/nvme
  python benchmarks/plan_accuracy.py --disk /mnt/nvme --shapes 100m-deep --homes disk
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

import torch
from _models import SHAPES, OpenModel, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.machine import Machine
from offload.planner import ModelFacts, Question, TrainingPlan, describe_model, plan_training
from offload.planner.work import step_flops
from offload.preflight import compute_speed, probe_machine
from offload.sizes import format_bytes, parse_bytes
from offload.specs import Tier

QUESTION = "does a run take the bytes, the memory and the time that the plan says?"
BYTES_BAR, PEAK_BAR, TIME_BAR = 0.03, 0.10, 0.20
HOMES = ("disk", "host", "device")


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of a run.

    Attributes:
        what: it is.
        predicted: by the plan.
        measured: by the runtime.
        bar: how far the ratio may be from 1.
    """

    what: str
    predicted: float
    measured: float
    bar: float

    @property
    def ratio(self) -> float:
        return 1.0 if self.predicted == self.measured else self.measured / max(self.predicted, 1e-12)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    runs = {
        (shape, home): _run(args, report, shape, Tier(home)) for shape in args.shapes for home in args.homes
    }
    _print(args, report, runs)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["10m", "40m", "100m-deep"])
    parser.add_argument("--homes", nargs="+", choices=HOMES, default=list(HOMES))
    parser.add_argument("--host-memory", default="4GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="2GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--moments", choices=("float32", "8bit"), default="float32", help="[%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step [%(default)s]")
    parser.add_argument("--rows", type=int, help="of a micro-batch [all]")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row [%(default)s]")
    parser.add_argument("--warm-up", type=int, default=1, metavar="ROUNDS", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="timed [%(default)s]")
    parser.add_argument(
        "--steps", type=int, default=3, help="of a round; from memory there is a commit in each [%(default)s]"
    )
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _run(args: argparse.Namespace, report: Report, shape: str, home: Tier) -> tuple[TrainingPlan, list[Pair]]:
    args.shape, args.model = shape, None
    opened = open_model(args)
    facts = describe_model(opened.model, shape)
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-accuracy-") as directory:
        machine = probe_machine([directory], device=False)
        assert machine is not None, "there is room on the drive"
        plan = _plan(args, opened, facts, machine, home)
        pairs, rounds = _measure(args, opened, plan, directory)
    step_s = next(pair for pair in pairs if pair.what == "step, s")
    print(
        f"{shape} {home.value}: step {step_s.predicted:.3f} s planned ({plan.bottleneck}), "
        + " ".join(f"{seconds:.3f}" for seconds in rounds)
        + " s measured; "
        + ", ".join(f"{link.name} {link.seconds or 0:.3f}" for link in plan.links),
        flush=True,
    )
    for number, seconds in enumerate(rounds, start=1):
        report.sample(
            shape=shape,
            home=home.value,
            round=number,
            step_s=round(seconds, 4),
            **{f"predicted {pair.what}": round(pair.predicted, 4) for pair in pairs},
            **{f"measured {pair.what}": round(pair.measured, 4) for pair in pairs},
        )
    return plan, pairs


def _plan(
    args: argparse.Namespace, opened: OpenModel, facts: ModelFacts, machine: Machine, home: Tier
) -> TrainingPlan:
    speed = compute_speed(
        opened.model, device=torch.device("cpu"), rows=args.rows or args.batch, length=args.length
    )
    assert speed is not None, "a Llama has layers"
    question = Question(
        machine=machine,
        host_memory=parse_bytes(args.host_memory),
        device_memory=parse_bytes(args.device_memory),
        batch=args.batch,
        rows=args.rows or args.batch,
        length=args.length,
        home=home,
        moments=args.moments,
        save_steps=1 if home is Tier.DISK else args.steps,
        flops_per_s=sum(step_flops(facts, speed.rows, speed.length)) / speed.seconds,
    )
    answer = plan_training(question, facts)
    assert answer.plan is not None, answer.refused
    return answer.plan


def _measure(
    args: argparse.Namespace, opened: OpenModel, plan: TrainingPlan, directory: str
) -> tuple[list[Pair], list[float]]:
    tokens = random_tokens(opened, args.batch, args.length)
    rounds = []
    with offload.attach(opened.model, plan, source=opened.source, disk=directory) as runtime:
        for number in range(args.warm_up + args.rounds):
            if number == args.warm_up:
                runtime.reset_stats()
            began_s = time.perf_counter()
            for _ in range(args.steps):
                opened.model(input_ids=tokens, labels=tokens).loss.backward()
                runtime.step()
            runtime.synchronize()
            rounds.append((time.perf_counter() - began_s) / args.steps)
        stats = runtime.stats()
    steps, traffic = args.rounds * args.steps, plan.traffic
    pairs = [
        Pair("step, s", plan.step_s, statistics.median(rounds[args.warm_up :]), TIME_BAR),
        Pair("disk read, B", traffic.disk_read_nbytes, stats.disk_read_nbytes / steps, BYTES_BAR),
        Pair("disk written, B", traffic.disk_written_nbytes, stats.disk_written_nbytes / steps, BYTES_BAR),
        Pair("to device, B", traffic.to_device_nbytes, stats.to_device_nbytes / steps, BYTES_BAR),
        Pair("to host, B", traffic.to_host_nbytes, stats.to_host_nbytes / steps, BYTES_BAR),
        Pair("host peak, B", plan.host_nbytes, stats.host_high_water_nbytes, PEAK_BAR),
        Pair(
            "device peak, B",
            plan.memory.device_nbytes,
            stats.device_high_water_nbytes,
            PEAK_BAR,
        ),
    ]
    return pairs, rounds[args.warm_up :]


def _print(
    args: argparse.Namespace,
    report: Report,
    runs: dict[tuple[str, str], tuple[TrainingPlan, list[Pair]]],
) -> None:
    report.say(
        f"Random weights, {args.batch} x {args.length} tokens a step, {args.moments} moments; budgets: host"
        f" {args.host_memory}, device {args.device_memory}. {args.rounds} rounds of {args.steps} steps after"
        f" {args.warm_up}; the median round. Device peaks are what is under lease. Direct I/O."
    )
    report.say()
    rows = []
    for (shape, home), (plan, pairs) in runs.items():
        for pair in pairs:
            words = (f"{pair.predicted:.3f}", f"{pair.measured:.3f}")
            if pair.what.endswith("B"):
                words = (format_bytes(int(pair.predicted)), format_bytes(int(pair.measured)))
            bottleneck = plan.bottleneck if pair.what == "step, s" else ""
            rows.append((shape, home, pair.what, *words, f"{pair.ratio:.3f}", bottleneck))
    report.table(("model", "home", "figure", "predicted", "measured", "ratio", "set by"), rows)
    for (shape, home), (_, pairs) in runs.items():
        for bar, what in ((BYTES_BAR, "bytes"), (PEAK_BAR, "peaks"), (TIME_BAR, "time")):
            worst = max((pair for pair in pairs if pair.bar == bar), key=lambda pair: abs(pair.ratio - 1))
            report.bar(f"{shape}, {home}: {what} off by ({worst.what})", abs(worst.ratio - 1), bar)
    report.fact(
        "no peak is above its budget",
        all(
            pair.measured <= parse_bytes(args.host_memory if "host" in pair.what else args.device_memory)
            for _, pairs in runs.values()
            for pair in pairs
            if "peak" in pair.what
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
