"""Is our AdamW as fast as torch's and DeepSpeed's, and as memory allows?

All contenders take turns in one process, on the same tensors where they use the same ones; ratios are
taken within each round. The bound is the best that STREAM's kernels move in the same round: copy
(a = b, 8 bytes an element of fp32), triad (a = b + s c, 12 bytes) and triad in place (b += s c, 12
bytes). STREAM counts what a program asks for: the first two cost memory a third more, for it fetches a
line before it is overwritten, so the one in place is the ceiling as a rule. An update is in place too.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _cells import Spread
from _gil import measure_gaps
from _report import Report, add_report_arguments
from torch import Tensor

from offload.optim import ParameterSettings, adamw_update, describe_kernel
from offload.optim.kernel import Moment8bit, adamw_update_8bit

QUESTION = "is our AdamW as fast as torch's and DeepSpeed's, and as memory allows?"
SETTINGS = ParameterSettings(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
# Bytes that an update reads and writes for each parameter, with fp32 moments: gradient, and twice
# weights and moments.
FP32_NBYTES = 4 + 2 * (4 + 4 + 4)
SPLIT_NBYTES = 2 + 2 * (2 + 2 + 4 + 4)
EIGHT_BIT_NBYTES = 4 + 2 * (4 + 1 + 1)
COPY_NBYTES, TRIAD_NBYTES = 8, 12
OURS, EIGHT_BIT, SPLIT = "ours, fp32", "ours, 8-bit moments", "ours, bf16 gradient, split weights"
TORCH, DEEPSPEED = "torch fused", "DeepSpeedCPUAdam"
COPY, TRIAD, IN_PLACE = "copy", "triad", "triad in place"
BOUNDS = (COPY, TRIAD, IN_PLACE)
LEAST_OF_PEERS, LEAST_OF_BOUND, LEAST_8BIT, MOST_HELD_OFF_S = 1.0, 0.85, 0.8, 0.005


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to time: one call works on `numel` elements and moves `nbytes` for each."""

    run: Callable[[], object]
    numel: int
    nbytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv)
    report.say(f"- {describe_kernel()}")
    report.say(
        f"- {args.parameters / 1e6:.1f} M parameters, {args.rounds} rounds after {args.warm_up} to warm up"
    )
    report.say()
    deepspeed = _find_deepspeed(report)
    groups = (
        lambda: _fp32_contenders(args.parameters, deepspeed),
        lambda: _split_contenders(args.parameters),
    )
    for make in groups:
        contenders = make()
        for num_threads in args.threads:
            torch.set_num_threads(num_threads)
            seconds = _take_turns(report, contenders, num_threads, args.warm_up, args.rounds)
            _judge(report, contenders, seconds, num_threads)
        if OURS in contenders:
            _measure_gil(report, contenders[OURS], args.threads, args.rounds)
        # Gone before the next group's are made: 16 bytes for each parameter are 3.2 GB.
        del contenders
        gc.collect()
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parameters", type=lambda text: int(float(text)), default=200_000_000, help="[%(default)s]"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=1, metavar="ROUNDS", help="[%(default)s]")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="not used: no drive takes part")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.parameters < 2:
        parser.error(f"--parameters must be at least 2, got {args.parameters}")
    return args


def _fp32_contenders(numel: int, deepspeed: type[torch.optim.Optimizer] | None) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.empty(numel).normal_(std=1e-2, generator=generator)
    weights = torch.empty(numel).normal_(std=1e-1, generator=generator)
    exp_avg, exp_avg_sq = gradient * 0.1, gradient.square()
    first = Moment8bit.of("exp_avg", exp_avg)
    second = Moment8bit.of("exp_avg_sq", exp_avg_sq)

    def ours() -> None:
        adamw_update(gradient, weights, None, exp_avg, exp_avg_sq, settings=SETTINGS, step=100)

    def eight_bit() -> None:
        adamw_update_8bit(gradient, weights, None, first, second, settings=SETTINGS, step=100)

    def optimizer(make: Callable[..., torch.optim.Optimizer], step: object, **more: object) -> Contender:
        parameter = torch.nn.Parameter(weights)
        parameter.grad = gradient
        made = make(
            [parameter],
            lr=SETTINGS.lr,
            betas=(SETTINGS.beta1, SETTINGS.beta2),
            eps=SETTINGS.eps,
            weight_decay=SETTINGS.weight_decay,
            **more,
        )
        made.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return Contender(made.step, numel, FP32_NBYTES)

    contenders = {
        OURS: Contender(ours, numel, FP32_NBYTES),
        TORCH: optimizer(torch.optim.AdamW, torch.tensor(100.0), fused=True),
        EIGHT_BIT: Contender(eight_bit, numel, EIGHT_BIT_NBYTES),
    }
    if deepspeed is not None:
        contenders[DEEPSPEED] = optimizer(deepspeed, 100)
    return {**contenders, **_bounds(exp_avg, exp_avg_sq)}


def _split_contenders(numel: int) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.empty(numel, dtype=torch.bfloat16).normal_(std=1e-2, generator=generator)
    high = torch.empty(numel, dtype=torch.bfloat16).normal_(std=1e-1, generator=generator)
    residual = torch.zeros(numel, dtype=torch.int16)
    exp_avg, exp_avg_sq = torch.full((numel,), 1e-3), torch.full((numel,), 1e-4)

    def ours() -> None:
        adamw_update(gradient, high, residual, exp_avg, exp_avg_sq, settings=SETTINGS, step=100)

    return {SPLIT: Contender(ours, numel, SPLIT_NBYTES), **_bounds(exp_avg, exp_avg_sq)}


def _bounds(first: Tensor, second: Tensor) -> dict[str, Contender]:
    """Return STREAM's kernels, in fp32 memory that others have: half of each tensor."""
    half = first.numel() // 2
    a, b, c = first[:half], first[half : 2 * half], second[:half]
    return {
        COPY: Contender(lambda: a.copy_(b), half, COPY_NBYTES),
        TRIAD: Contender(lambda: torch.add(b, c, alpha=0.5, out=a), half, TRIAD_NBYTES),
        IN_PLACE: Contender(lambda: b.add_(c, alpha=1e-6), half, TRIAD_NBYTES),
    }


def _find_deepspeed(report: Report) -> type[torch.optim.Optimizer] | None:
    try:
        module = importlib.import_module("deepspeed.ops.adam")
    except ImportError as error:
        report.say(f"{DEEPSPEED} does not take part: {error}. `pip install deepspeed` lets it.")
        report.say()
        return None
    found: type[torch.optim.Optimizer] = module.DeepSpeedCPUAdam
    return found


def _take_turns(
    report: Report, contenders: Mapping[str, Contender], num_threads: int, warm_up: int, rounds: int
) -> dict[str, list[float]]:
    """Run every contender once a round, in an order that turns round; return its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            began_s = time.perf_counter()
            contenders[name].run()
            elapsed_s = time.perf_counter() - began_s
            if number < 0:
                continue
            seconds[name].append(elapsed_s)
            report.sample(
                threads=num_threads,
                round=number + 1,
                contender=name,
                numel=contenders[name].numel,
                nbytes=contenders[name].nbytes,
                elapsed_s=f"{elapsed_s:.6f}",
            )
    return seconds


def _judge(
    report: Report, contenders: Mapping[str, Contender], seconds: Mapping[str, list[float]], num_threads: int
) -> None:
    """Print a table and compare with the bars."""
    rates = {name: [contenders[name].numel / each for each in runs] for name, runs in seconds.items()}
    moved = {name: [rate * contenders[name].nbytes for rate in each] for name, each in rates.items()}
    # The best of each round.
    bound = [max(each) for each in zip(*(moved[name] for name in BOUNDS), strict=True)]
    rows = []
    for name, contender in contenders.items():
        rate = Spread.of(each / 1e6 for each in rates[name])
        rows.append(
            (
                name,
                f"{rate.median:,.0f} [{rate.least:,.0f}..{rate.most:,.0f}]",
                contender.nbytes,
                f"{Spread.of(moved[name]).median / 1e9:.1f}",
                Spread.paired(moved[name], bound),
            )
        )
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    report.say(f"## {threads}")
    report.say()
    columns = ("", "M elements/s", "bytes an element", "GB/s", "of the bound")
    report.table(columns, rows)
    peers = [name for name in (TORCH, DEEPSPEED) if name in contenders]
    if OURS in contenders:
        # The better peer of each round: no peer's good round is forgiven.
        best = [max(each) for each in zip(*(rates[name] for name in peers), strict=True)]
        ratio = Spread.paired(rates[OURS], best)
        report.say(f"{OURS} / the better of {', '.join(peers)}: {ratio}")
        report.say()
        report.bar(f"{OURS}, {threads}, of its peers", ratio.median, LEAST_OF_PEERS, least=True)
        peer = DEEPSPEED if DEEPSPEED in contenders else TORCH
        ratio = Spread.paired(rates[EIGHT_BIT], rates[peer])
        what = f"{EIGHT_BIT}, {threads}, of {peer} with fp32 moments"
        if num_threads == 2:
            report.bar(what, ratio.median, LEAST_8BIT, least=True)
        else:
            report.say(f"- {what}: {ratio}")
    for name in (OURS, SPLIT):
        if name in contenders:
            share = Spread.paired(moved[name], bound).median
            report.bar(f"{name}, {threads}, of the bound", share, LEAST_OF_BOUND, least=True)
    report.say()


def _measure_gil(report: Report, ours: Contender, threads: Sequence[int], rounds: int) -> None:
    """Measure how long an update holds off another Python thread."""
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        gaps = [measure_gaps(ours.run) for _ in range(rounds)]
        for number, each in enumerate(gaps):
            report.sample(threads=num_threads, round=number + 1, contender="gil", **each._asdict())
        working_s = Spread.of(each.working_s for each in gaps)
        idle_s = Spread.of(each.idle_s for each in gaps)
        what = f"longest time another Python thread waits, {num_threads} threads on {os.cpu_count()} cores"
        report.say(
            f"- {what}: {1e3 * working_s.median:.2f} ms [{1e3 * working_s.least:.2f}.."
            f"{1e3 * working_s.most:.2f}], with nothing going on {1e3 * idle_s.median:.2f} ms"
        )
        if num_threads == 1:  # With every core at work the kernel makes threads wait, whoever they are.
            report.bar("another Python thread is held off", working_s.median, MOST_HELD_OFF_S, "s")
    report.say()


if __name__ == "__main__":
    sys.exit(main())
