"""Does training with 8-bit moments end where training with fp32 moments ends?

Two tasks, several seeds each: a small Llama from scratch on the bytes of Python's reference, and the
fine-tune of a model directory on the same text. Both formats see the same initial weights and the same
rows in the same order; what is compared is the loss on rows that neither has seen, at the end.

Training runs take long: with --cells each is kept in a file of its own when it is done, and a second
start takes it from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib.pyplot as plt
import torch
from _report import Report, add_report_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from offload.optim import AdamW, default_param_groups

QUESTION = "does training with 8-bit moments end where training with fp32 moments ends?"
FORMATS = ("float32", "8bit")
MOST_ABOVE = 0.005
# A byte-level Llama of a million parameters: it learns English within minutes on two cores.
SCRATCH = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "use_cache": False,
}


@dataclass(frozen=True, slots=True)
class Task:
    """What a training run does, but for its seed and format: all that its losses depend on."""

    name: str
    steps: int
    rows: int
    length: int
    held_out: int
    learning_rate: float
    warm_up_steps: int


@dataclass(frozen=True, slots=True)
class Losses:
    """What one training run gave: the loss of each step, and on the held-out rows by step."""

    training: list[float]
    held_out: dict[int, float]

    @property
    def final(self) -> float:
        """The loss on the held-out rows at the end."""
        return self.held_out[max(self.held_out)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tasks: dict[Task, Callable[[int], tuple[torch.nn.Module, torch.Tensor]]] = {}
    if args.scratch_steps:
        task = Task("from scratch", args.scratch_steps, args.scratch_rows, 128, 64, 1e-3, 50)
        tasks[task] = lambda seed: (_fresh_model(seed), _as_rows(list(text.encode()), task.length))
    if args.model is not None:
        fine = Task("fine-tune", args.steps, args.rows, args.length, 32, 5e-5, 20)
        ids = AutoTokenizer.from_pretrained(args.model)(text, verbose=False)["input_ids"]
        tasks[fine] = lambda seed: (_pretrained_model(args.model), _as_rows(ids, fine.length))
    curves: dict[str, dict[tuple[int, str], Losses]] = {}
    for task, make in tasks.items():
        curves[task.name] = {
            (seed, moments): _losses(report, task, make, seed, moments, args.cells)
            for seed in range(args.seeds)
            for moments in FORMATS
        }
        _judge(report, task, curves[task.name], args.seeds)
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        for name, each in curves.items():
            _draw(args.save / f"{name.replace(' ', '_').replace('-', '_')}.png", name, each)
            report.say(f"![{name}]({name.replace(' ', '_').replace('-', '_')}.png)")
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="fine-tune this Hugging Face model too")
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=300, help="of the fine-tune [%(default)s]")
    parser.add_argument("--rows", type=int, default=1, help="of a step of the fine-tune [%(default)s]")
    parser.add_argument("--length", type=int, default=64, help="tokens of its rows [%(default)s]")
    parser.add_argument("--scratch-steps", type=int, default=600, help="0 leaves it out [%(default)s]")
    parser.add_argument("--scratch-rows", type=int, default=16, help="of 128 bytes [%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    parser.add_argument("--cells", type=Path, metavar="DIR", help="keep finished training runs here")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="not used: no drive takes part")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _fresh_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**SCRATCH))
    return model


def _pretrained_model(directory: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def _as_rows(tokens: Sequence[int], length: int) -> torch.Tensor:
    """Return tokens as rows [n, length]; what is left over is dropped."""
    whole = len(tokens) // length * length
    return torch.tensor(tokens[:whole]).view(-1, length)


def _losses(
    report: Report,
    task: Task,
    make: Callable[[int], tuple[torch.nn.Module, torch.Tensor]],
    seed: int,
    moments: str,
    cells: Path | None,
) -> Losses:
    """Train, or read what an earlier start has trained."""
    kept = None if cells is None else cells / f"{task.name.replace(' ', '-')}-{moments}-{seed}.json"
    if kept is not None and kept.exists():
        content = json.loads(kept.read_text())
        if content["task"] == asdict(task):
            losses = Losses(content["training"], {int(at): loss for at, loss in content["held_out"].items()})
            _keep_samples(report, task, seed, moments, losses)
            return losses
    losses = _train(task, *make(seed), seed, moments)
    _keep_samples(report, task, seed, moments, losses)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_text(json.dumps({"task": asdict(task), **asdict(losses)}))
        part.rename(kept)
    return losses


def _train(task: Task, model: torch.nn.Module, rows: torch.Tensor, seed: int, moments: str) -> Losses:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held_out, seen = rows[order[: task.held_out]], rows[order[task.held_out :]]
    optimizer = AdamW(
        default_param_groups(model.named_parameters(), 0.01), lr=task.learning_rate, moments=moments
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(task, step))
    model.train()
    losses = Losses([], {0: _evaluate(model, held_out)})
    began_s = time.monotonic()
    for step in range(task.steps):
        at = torch.arange(step * task.rows, (step + 1) * task.rows) % len(seen)
        loss = model(input_ids=seen[at], labels=seen[at]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.training.append(loss.item())
        if (step + 1) % max(1, task.steps // 6) == 0 or step + 1 == task.steps:
            losses.held_out[step + 1] = _evaluate(model, held_out)
            left_s = (time.monotonic() - began_s) / (step + 1) * (task.steps - step - 1)
            print(
                f"{task.name}, {moments}, seed {seed}: step {step + 1} of {task.steps}, held-out loss "
                f"{losses.held_out[step + 1]:.4f}, {left_s / 60:.0f} min left",
                file=sys.stderr,
            )
    return losses


def _rate(task: Task, step: int) -> float:
    """Warm up, then fall to a tenth along half a cosine."""
    if step < task.warm_up_steps:
        return (step + 1) / task.warm_up_steps
    done = (step - task.warm_up_steps) / max(1, task.steps - task.warm_up_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


@torch.no_grad()
def _evaluate(model: torch.nn.Module, rows: torch.Tensor) -> float:
    batches = rows.split(8)
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
    return sum(losses) / len(rows)


def _keep_samples(report: Report, task: Task, seed: int, moments: str, losses: Losses) -> None:
    for number, loss in enumerate(losses.training, start=1):
        held_out = losses.held_out.get(number)
        report.sample(
            task=task.name,
            seed=seed,
            moments=moments,
            step=number,
            loss=f"{loss:.6f}",
            held_out="" if held_out is None else f"{held_out:.6f}",
        )


def _judge(report: Report, task: Task, losses: Mapping[tuple[int, str], Losses], seeds: int) -> None:
    report.say(f"## {task.name}")
    report.say()
    report.say(
        f"{task.steps} steps of {task.rows} x {task.length} tokens, learning rate {task.learning_rate:g}; "
        f"loss on {task.held_out} held-out rows."
    )
    report.say()
    rows = []
    apart = []
    for seed in range(seeds):
        wide, narrow = losses[seed, "float32"], losses[seed, "8bit"]
        apart.append(narrow.final / wide.final - 1)
        rows.append(
            (
                seed,
                f"{wide.held_out[0]:.4f}",
                f"{wide.final:.4f}",
                f"{narrow.final:.4f}",
                f"{100 * apart[-1]:+.3f} %",
            )
        )
    report.table(("seed", "before", "fp32 moments", "8-bit moments", "apart"), rows)
    # Below fp32's is no loss of quality: two runs of one seed part ways as any two trainings do.
    what = f"{task.name}: final loss above that of fp32 moments, worst of {seeds} seeds"
    report.bar(what, 100 * max(apart), 100 * MOST_ABOVE, "%")
    report.say()


def _draw(path: Path, title: str, losses: Mapping[tuple[int, str], Losses]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=110)
    for (seed, moments), each in losses.items():
        style: dict[str, Any] = {
            "color": "tab:blue" if moments == "float32" else "tab:orange",
            "linestyle": "-" if moments == "float32" else "--",  # one lies upon the other
            "label": f"{moments} moments" if seed == 0 else None,
            "linewidth": 1.6 if moments == "float32" else 1,
        }
        left.plot(_smoothed(each.training), **style)
        right.plot(list(each.held_out), list(each.held_out.values()), marker="o", markersize=3, **style)
    left.set(title=f"{title}: training loss (mean of 20 steps)", xlabel="step", ylabel="loss")
    right.set(title=f"{title}: held-out loss", xlabel="step")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _smoothed(losses: Sequence[float]) -> list[float]:
    return [sum(losses[max(0, i - 19) : i + 1]) / (i + 1 - max(0, i - 19)) for i in range(len(losses))]


if __name__ == "__main__":
    sys.exit(main())
