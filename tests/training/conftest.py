"""A tiny model directory with a byte tokenizer, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from offload.training.config import FinetuneConfig, load_config

END = 256


def make_model_directory(directory: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{n} squared is {n * n}." for n in range(200)))
    return path


@pytest.fixture
def make_config(model_directory: Path, text_file: Path, tmp_path: Path):
    """Return a function that makes a small run's configuration; keywords are flags."""

    def make(**flags: object) -> FinetuneConfig:
        defaults = {
            "model_name_or_path": model_directory,
            "train_file": str(text_file),
            "output_dir": tmp_path / "out",
            "device": "cpu",
            "device_memory": "64MiB",
            "host_memory": "256MiB",
            "max_length": 32,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            # Without a measured machine there is no plan either: tests of the plan ask for it.
            "preflight": False,
        }
        return load_config(None, {**defaults, **flags})

    return make
