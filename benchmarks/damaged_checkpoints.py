"""What becomes of a run whose newest checkpoint is damaged?

A tiny Llama is trained to two thirds, with good older state beside the newest; then one thing of the newest
is removed, cut, emptied or changed by a bit, and the run is started again, as its documentation says. It is
handled when it ends with the weights of a run that was never damaged (after the command that its own message
names, if it names one), or when it stops with a message that names the damaged file. To end with other
weights, or in an error that does not say what is damaged, is not. `offload finetune` and the Hugging Face
Trainer (`resume_from_checkpoint=True`) get the same eight kinds of damage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from _report import Report, add_report_arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from offload.aio import open_engine
from offload.cli import main as offload_command
from offload.errors import CorruptionError, OffloadError
from offload.store import RunReader, list_runs
from offload.training.config import FinetuneConfig, load_config
from offload.training.finetune import finetune

QUESTION = "what becomes of a run whose newest checkpoint is damaged?"
END = 256
CONTENDERS = ("offload", "Trainer")


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    Attributes:
        name: what happens.
        ours: does it to an output directory of `offload finetune`; returns the file.
        theirs: does it to the newest checkpoint of a Trainer; returns the file.
    """

    name: str
    ours: Callable[[Path], Path]
    theirs: Callable[[Path], Path]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when one of ours was not handled."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    with _errors_only():
        _compare(args, report)
    return report.finish(args.save)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Keep both contenders from warning of every damage; as it was behind it."""
    log = logging.getLogger("offload")
    ours, theirs = log.level, transformers.logging.get_verbosity()
    log.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        log.setLevel(ours)
        transformers.logging.set_verbosity(theirs)


def _compare(args: argparse.Namespace, report: Report) -> None:
    handled = dict.fromkeys(CONTENDERS, 0)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-damage-") as directory:
        model = _make_model(Path(directory) / "model")
        contenders = {
            "offload": _Ours(Path(directory) / "ours", model, args.steps),
            "Trainer": _Theirs(Path(directory) / "theirs", model, args.steps),
        }
        for damage in DAMAGES:
            row = [damage.name]
            for name, contender in contenders.items():
                outcome, is_handled = contender.meets(damage)
                handled[name] += is_handled
                row.append(("" if is_handled else "NOT HANDLED: ") + outcome)
                report.sample(contender=name, damage=damage.name, handled=is_handled, outcome=outcome)
            rows.append(row)
    report.table(("damage to the newest", "offload finetune", "Hugging Face Trainer"), rows)
    report.say(
        f"The Trainer handled {handled['Trainer']} of {len(DAMAGES)}. Its files and ours: trainer_state.json,"
        " the manifest; optimizer.pt and model.safetensors, the records in data.bin; scheduler.pt, run.json"
        " (a schedule is a function of the step here)."
    )
    report.say()
    report.bar("offload handled", handled["offload"], len(DAMAGES), f"of {len(DAMAGES)}", least=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the runs may lie")
    parser.add_argument("--steps", type=int, default=30, help="of a whole run, by 3 [%(default)s]")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.steps % 3 or args.steps < 3:
        parser.error(f"--steps must be a multiple of 3, got {args.steps}")
    return args


def _make_model(directory: Path) -> Path:
    """Make a model directory with a tokenizer of bytes, and a text beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "<end>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(directory)
    (directory / "text.txt").write_text("\n".join(f"{n} squared is {n * n}." for n in range(400)))
    return directory


def _weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def _flip(path: Path, offset: int) -> Path:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    return path


def _cut(path: Path) -> Path:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _remove(path: Path) -> Path:
    path.unlink()
    return path


# -- offload finetune ----------------------------------------------------------------------------


class _Ours:
    """Runs of `offload finetune`; every step is a commit."""

    def __init__(self, root: Path, model: Path, num_steps: int) -> None:
        self._root = root
        self._model = model
        self._num_steps = num_steps
        root.mkdir()
        self._train(root / "run", num_steps * 2 // 3)
        shutil.copytree(root / "run", root / "kept")
        self._expected = self._train(root / "run", num_steps)

    def meets(self, damage: Damage) -> tuple[str, bool]:
        """Damage the run as it was, start it again, and say what came of it."""
        # In its own place: run.json says where the state lies.
        output = self._root / "run"
        shutil.rmtree(output)
        shutil.copytree(self._root / "kept", output)
        return self._start(damage.ours(output), output)

    def _start(self, damaged: Path, output: Path) -> tuple[str, bool]:
        lines: list[str] = []
        try:
            weights = self._train(output, self._num_steps, lines.append)
        except OffloadError as error:
            names_it = str(damaged) in str(error) or str(damaged.parent) in str(error)
            said = f"stops (exit code {error.exit_code}), naming {damaged.name if names_it else 'nothing'}"
            if not (isinstance(error, CorruptionError) and _fall_back(output)):
                return said, names_it
            said += "; after `offload verify --fall-back` "
            weights = self._train(output, self._num_steps, lines.append)
        else:
            said = ""
        resumed = [line for line in lines if line.startswith("resuming run")]
        where = resumed[-1].split(" at ")[1].split(" of ")[0]
        is_same = weights == self._expected
        return f"{said}goes on at {where}; weights {'identical' if is_same else 'DIFFER'}", is_same

    def _train(self, output: Path, max_steps: int, echo: Callable[[str], None] = lambda _: None) -> bytes:
        finetune(self._config(output, max_steps), echo=echo)
        return _weights(output / "final")

    def _config(self, output: Path, max_steps: int) -> FinetuneConfig:
        flags = {
            "model_name_or_path": self._model,
            "train_file": str(self._model / "text.txt"),
            "output_dir": output,
            "device": "cpu",
            "device_memory": "64MiB",
            "host_memory": "64MiB",
            "max_length": 32,
            "max_steps": max_steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "preflight": False,
        }
        return load_config(None, flags)


def _fall_back(output: Path) -> bool:
    """Call the command that the documentation names; return whether the run can go on."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            offload_command(["verify", str(output), "--fall-back"])
        except SystemExit as ended:
            return ended.code == 0
    return False


def _run_folder(output: Path) -> Path:
    (run,) = list_runs(output / "state")
    return Path(run.path)


def _newest_manifest(output: Path) -> Path:
    return max(_run_folder(output).glob("manifest-*"), key=lambda path: int(path.name.split("-")[1]))


def _flip_in_record(output: Path, kind: str) -> Path:
    """Change a bit in the newest generation of the last record of a kind."""
    (run,) = list_runs(output / "state")
    with (
        open_engine() as engine,
        RunReader.open([output / "state"], engine=engine, run_id=run.run_id) as reader,
    ):
        name = [spec.name for spec in reader.newest.written if kind in spec.name][-1]
        _, path, offset = reader.newest.place(name, 0)
    return _flip(Path(path), offset + 100)


# -- the Hugging Face Trainer --------------------------------------------------------------------


class _Theirs:
    """Runs of a Trainer that saves a checkpoint every third of the whole."""

    def __init__(self, root: Path, model: Path, num_steps: int) -> None:
        self._root = root
        self._model = model
        self._num_steps = num_steps
        self._train(root / "base", num_steps * 2 // 3, resume=False)
        shutil.copytree(root / "base", root / "whole")
        self._expected, _ = self._train(root / "whole", num_steps, resume=True)

    def meets(self, damage: Damage) -> tuple[str, bool]:
        """Damage a copy, resume it, and say what came of it."""
        output = self._root / "damaged"
        shutil.copytree(self._root / "base", output)
        damaged = damage.theirs(output / f"checkpoint-{self._num_steps * 2 // 3}")
        try:
            weights, first = self._train(output, self._num_steps, resume=True)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
            names_it = damaged.name in str(error)
            said = f"{type(error).__name__}, {f'naming {damaged.name}' if names_it else 'naming no file'}"
            return said, names_it
        finally:
            shutil.rmtree(output)
        is_same = weights == self._expected
        return f"goes on at step {first}; weights {'identical' if is_same else 'DIFFER, unnoticed'}", is_same

    def _train(self, output: Path, max_steps: int, *, resume: bool) -> tuple[bytes, int]:
        data = (self._model / "text.txt").read_bytes()
        rows = [torch.tensor(list(data[i : i + 32])) for i in range(0, len(data) - 32, 32)]
        model = LlamaForCausalLM.from_pretrained(self._model)
        arguments = TrainingArguments(
            output_dir=str(output),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=self._num_steps // 3,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        first: list[int] = []

        class _First(transformers.TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                first.append(state.global_step)

        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[_First()],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(output / "final"))
        return _weights(output / "final"), first[0]


def _flip_tensor(checkpoint: Path) -> Path:
    path = checkpoint / "model.safetensors"
    with open(path, "rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        json.loads(file.read(header_nbytes))
    return _flip(path, 8 + header_nbytes + 101)


def _flip_moment(checkpoint: Path) -> Path:
    path = checkpoint / "optimizer.pt"
    # In the middle of the zip archive: the bytes of a tensor.
    return _flip(path, path.stat().st_size // 2)


DAMAGES = (
    Damage(
        "trainer state missing",
        lambda output: _remove(_newest_manifest(output)),
        lambda checkpoint: _remove(checkpoint / "trainer_state.json"),
    ),
    Damage(
        "trainer state empty",
        lambda output: _empty(_newest_manifest(output)),
        lambda checkpoint: _empty(checkpoint / "trainer_state.json"),
    ),
    Damage(
        "optimizer state cut in half",
        lambda output: _cut(_run_folder(output) / "data.bin"),
        lambda checkpoint: _cut(checkpoint / "optimizer.pt"),
    ),
    Damage(
        "weights cut off",
        lambda output: _empty(_run_folder(output) / "data.bin"),
        lambda checkpoint: _cut(checkpoint / "model.safetensors"),
    ),
    Damage(
        "optimizer state missing",
        lambda output: _remove(_run_folder(output) / "data.bin"),
        lambda checkpoint: _remove(checkpoint / "optimizer.pt"),
    ),
    Damage(
        "scheduler missing",
        lambda output: _remove(output / "run.json"),
        lambda checkpoint: _remove(checkpoint / "scheduler.pt"),
    ),
    Damage("one bit of the weights", lambda output: _flip_in_record(output, "weights"), _flip_tensor),
    Damage(
        "one bit of the optimizer state", lambda output: _flip_in_record(output, "optimizer"), _flip_moment
    ),
)


if __name__ == "__main__":
    sys.exit(main())
