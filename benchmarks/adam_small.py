"""Is our AdamW as fast as torch's fused one on models of many tensors?

A step of `offload.optim.AdamW` beside one of `torch.optim.AdamW(fused=True)`: whole steps, as a loop calls
them, on the same parameters, gradients and state, in turn in one process. Two models: tensors of the
shapes of SmolLM2-135M, where memory sets the pace, and thousands of small ones, where calls do. Moments
in eight bits stand beside, with a state of their own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _cells import Spread
from _report import Report, add_report_arguments
from torch.nn import Parameter

from offload.optim import AdamW, describe_kernel

QUESTION = "is our AdamW as fast as torch's fused one on models of many tensors?"
OURS, EIGHT_BIT, TORCH = "ours, fp32", "ours, 8-bit moments", "torch fused"
LEAST_OF_TORCH = 1.0
VOCABULARY, INTERMEDIATE, KEYS = 49152, 1536, 192  # SmolLM2-135M's, at a hidden size of 576


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv)
    report.say(f"- {describe_kernel()}")
    report.say(f"- {args.rounds} rounds after {args.warm_up} to warm up")
    report.say()
    models = {
        "as SmolLM2-135M": _transformer_shapes(args.layers, args.hidden),
        f"tensors of {args.numel} elements": [(args.numel,)] * args.tensors,
    }
    for name, shapes in models.items():
        optimizers = _optimizers(shapes)
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        report.say(f"## {name}: {len(shapes)} tensors, {numel / 1e6:.1f} M parameters")
        report.say()
        for num_threads in args.threads:
            torch.set_num_threads(num_threads)
            seconds = _take_turns(report, name, optimizers, num_threads, args.warm_up, args.rounds)
            _judge(report, name, seconds, len(shapes), num_threads)
        del optimizers  # Gone before the next are made.
        gc.collect()
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="[%(default)s]")
    parser.add_argument("--hidden", type=int, default=576, help="[%(default)s]")
    parser.add_argument("--tensors", type=int, default=2000, help="[%(default)s]")
    parser.add_argument("--numel", type=int, default=1000, help="[%(default)s]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="ROUNDS", help="[%(default)s]")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="not used: no drive takes part")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _transformer_shapes(num_layers: int, hidden: int) -> list[tuple[int, ...]]:
    """Return the shapes of a Llama of SmolLM2-135M's proportions, its embedding tied."""
    scale = hidden / 576
    vocabulary, intermediate, keys = (round(n * scale) for n in (VOCABULARY, INTERMEDIATE, KEYS))
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    layer: list[tuple[int, ...]] = [*attention, *mlp, (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * num_layers), (hidden,)]


def _optimizers(shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """Return the contenders over the same parameters; those with fp32 moments share them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.empty(shape).normal_(std=1e-1, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty(parameter.shape).normal_(std=1e-2, generator=generator)
    ours = AdamW(parameters, lr=1e-4, fused=True)
    ours.step()
    peer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    # Takes the tensors over, and ours's groups, in which `fused` is set.
    peer.load_state_dict(ours.state_dict())
    return {OURS: ours, TORCH: peer, EIGHT_BIT: AdamW(parameters, lr=1e-4, moments="8bit")}


def _take_turns(
    report: Report,
    model: str,
    optimizers: dict[str, torch.optim.Optimizer],
    num_threads: int,
    warm_up: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Run a step of each once a round, in an order that turns round; return their seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(-warm_up, rounds):
        for name in list(optimizers) if number % 2 == 0 else list(optimizers)[::-1]:
            began_s = time.perf_counter()
            optimizers[name].step()
            elapsed_s = time.perf_counter() - began_s
            if number < 0:
                continue
            seconds[name].append(elapsed_s)
            report.sample(
                model=model,
                threads=num_threads,
                round=number + 1,
                contender=name,
                elapsed_s=f"{elapsed_s:.6f}",
            )
    return seconds


def _judge(
    report: Report, model: str, seconds: dict[str, list[float]], num_tensors: int, num_threads: int
) -> None:
    """Print a table and compare with the bar: the median of the ratios within rounds."""
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    rows = []
    for name, runs in seconds.items():
        took = Spread.of(1e3 * each for each in runs)
        rows.append(
            (
                name,
                f"{took.median:.2f} [{took.least:.2f}..{took.most:.2f}]",
                f"{1e3 * took.median / num_tensors:.2f}",
                Spread.paired(seconds[TORCH], runs),
            )
        )
    report.table((threads, "ms a step", "us a tensor", f"times as fast as {TORCH}"), rows)
    ratio = Spread.paired(seconds[TORCH], seconds[OURS]).median
    report.bar(f"{OURS}, {model}, {threads}, times as fast as {TORCH}", ratio, LEAST_OF_TORCH, least=True)
    report.say()


if __name__ == "__main__":
    sys.exit(main())
