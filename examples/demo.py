"""`make demo`: fine-tune a real 135M-parameter model whose state lives on disk, and see that it learned.

It prepares the model and the text (once), lets the model continue a sentence, runs

    offload finetune examples/finetune_smollm2.yaml

with memory budgets far below the model's training state, and lets the trained model continue the same
sentence. The trained model is loaded by transformers alone. Stop it at any moment and start it again:
it goes on where it was. Remove demo-run/out to begin anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

# Before transformers is imported: everything is local.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from smollm2 import prepare

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("examples/finetune_smollm2.yaml")
DIRECTORY = Path("demo-run")
PROMPT = 'The "try" statement specifies exception handlers and'


def main() -> None:
    """Prepare, show, train, show."""
    transformers.utils.logging.disable_progress_bar()
    say("1. The model: SmolLM2-135M-Instruct; the text: Python's language reference")
    model, text = prepare(ROOT / DIRECTORY)
    print(f"{model} ({sum(f.stat().st_size for f in model.iterdir()) / 1e6:.0f} MB)")
    print(f"{text} ({text.stat().st_size / 1e3:.0f} KB)")

    say("2. Before: the model continues a sentence of the reference")
    show(continue_text(model))

    say(f"3. offload finetune {CONFIG}")
    print("The training state is 12 bytes a parameter, 1.6 GB; it may use 700 MiB of host memory.")
    finetune()

    say("4. After: the exported model, loaded by transformers alone")
    show(continue_text(ROOT / DIRECTORY / "out" / "final"))


def continue_text(directory: Path) -> str:
    """Return what the model in `directory` makes of the prompt, greedily."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def finetune() -> None:
    """Run the command line in a process of its own; its Ctrl-C is its own to handle."""
    offload = Path(sys.executable).with_name("offload")
    child = subprocess.Popen([str(offload), "finetune", str(CONFIG)], cwd=ROOT)
    # The terminal sends Ctrl-C to both processes: the child finishes its step, this one waits.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, previous)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def show(continuation: str) -> None:
    text = f"{PROMPT} [...] {' '.join(continuation.split())}"
    print(textwrap.indent(textwrap.fill(text, 96), "    "), flush=True)


if __name__ == "__main__":
    main()
