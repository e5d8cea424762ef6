"""An ordinary PyTorch loop over a model whose weights and optimizer state live on disk.

Three lines differ from the loop you know: attach, step, export. Run it as `python examples/plain_loop.py`;
it takes seconds and needs neither a GPU nor a network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import offload

WIDTH = 128


def make_model() -> torch.nn.Sequential:
    """A stack of blocks; each becomes a unit that visits memory only while it is used."""
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()) for _ in range(6)]
    return torch.nn.Sequential(*blocks, torch.nn.Linear(WIDTH, WIDTH))


def main(directory: Path) -> list[float]:
    """Train for 50 steps with the state in `directory` and return the losses."""
    model = make_model()
    options = offload.RuntimeOptions(
        disk=[directory],
        host_memory=128 << 20,
        device_memory=64 << 20,
        device="cpu",
        optimizer=offload.AdamWOptions(lr=1e-3),
    )
    losses = []
    with offload.attach(model, options) as runtime:  # 1. the weights leave the model
        for _ in range(50):
            inputs = torch.randn(64, WIDTH)
            loss = torch.nn.functional.mse_loss(model(inputs), inputs.flip(-1))
            loss.backward()
            runtime.step()  # 2. instead of optimizer.step(): the step is committed to the disk
            losses.append(loss.item())
        trained = runtime.export(directory / "trained")  # 3. plain safetensors

    fresh = make_model()
    fresh.load_state_dict(load_file(trained / "model.safetensors"))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; loaded back without offload from {trained.name}/")
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
