"""Read and write files asynchronously with the I/O engine alone: no model, no GPU, no torch needed.

    python examples/async_io.py /mnt/nvme

Writes 256 MiB to one file in the directory given (the current one by default), reads it back in several
ways, shows what errors look like, and removes the file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from offload.aio import Engine, File, aligned_buffer, crc32c, open_engine
from offload.errors import StorageError
from offload.sizes import MIB, format_rate

PIECE_NBYTES = 32 * MIB
NUM_PIECES = 8


def main(folder: Path) -> None:
    """Show the engine at work in `folder`."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no directory; name one on the drive of interest")
    with (
        tempfile.TemporaryDirectory(prefix="offload-example-", dir=folder) as private,
        # io_uring where the kernel allows it, else threads, else plain Python; engine.name says which.
        open_engine() as engine,
        engine.open(f"{private}/data", "x+") as file,
    ):
        print(f"engine {engine.name}, O_DIRECT {'on' if file.direct else 'off'}")
        checksums = write(engine, file)
        read(engine, file, checksums)
        read_into_anything(engine, file)
        change_your_mind(engine, file)
        fail(engine, file)


def write(engine: Engine, file: File) -> list[int]:
    """Write all pieces at once, make them durable, and return their checksums."""
    file.allocate(NUM_PIECES * PIECE_NBYTES)  # a full drive is an error now, not in the middle
    random = np.random.default_rng(0)
    pieces = []
    for _ in range(NUM_PIECES):
        piece = aligned_buffer(PIECE_NBYTES)
        piece[:] = random.bytes(PIECE_NBYTES)
        pieces.append(piece)
    began_s = time.perf_counter()
    # submit() returns at once. A request holds on to its buffer until the transfer has ended; all you
    # must not do is change its content before that.
    requests = [engine.submit("write", file, piece, i * PIECE_NBYTES) for i, piece in enumerate(pieces)]
    for request in requests:
        request.wait()  # raises when this transfer failed
    engine.sync(file)  # durable from here on
    say("written and synced", began_s, NUM_PIECES * PIECE_NBYTES)
    return [crc32c(piece) for piece in pieces]


def read(engine: Engine, file: File, checksums: list[int]) -> None:
    """Read with two buffers, over and over: one fills while the other is checked."""
    buffers = [aligned_buffer(PIECE_NBYTES) for _ in range(2)]
    began_s = time.perf_counter()
    request = engine.submit("read", file, buffers[0], 0)
    for i, checksum in enumerate(checksums):
        request.wait()
        if i + 1 < NUM_PIECES:
            request = engine.submit("read", file, buffers[(i + 1) % 2], (i + 1) * PIECE_NBYTES)
        # Runs without the GIL, while the next piece is on its way.
        if crc32c(buffers[i % 2]) != checksum:
            raise SystemExit(f"piece {i} is not what was written")
    say("read and checked", began_s, NUM_PIECES * PIECE_NBYTES)


def read_into_anything(engine: Engine, file: File) -> None:
    """Any contiguous buffer will do, at any offset and of any size."""
    array = np.empty((1000, 3), dtype=np.float32)
    text = bytearray(77)
    requests = [engine.submit("read", file, array, 12_345), engine.submit("read", file, text, 1)]
    for request in requests:
        request.wait()
    # A torch tensor is a buffer through numpy: engine.submit("read", file, tensor.numpy(), 0).
    print(f"numpy array of shape {array.shape} and a bytearray of {len(text)} filled")


def change_your_mind(engine: Engine, file: File) -> None:
    """Do not wait longer than you like, and give up what is not needed any more."""
    request = engine.submit("read", file, aligned_buffer(NUM_PIECES * PIECE_NBYTES), 0)
    print(f"cancelled before all of it had begun: {request.cancel()}")
    try:
        print(f"it was done by then: {request.wait(timeout_s=10):,} bytes")
    except StorageError as error:
        print(f"StorageError: {error}")


def fail(engine: Engine, file: File) -> None:
    """Show that errors come at the wait of the request that failed, with all there is to know."""
    beyond = engine.submit("read", file, bytearray(4096), NUM_PIECES * PIECE_NBYTES - 1000)
    try:
        beyond.wait()
    except StorageError as error:
        print(f"StorageError: {error}")
        print(f"  errno {error.errno}, {error.got_nbytes:,} of {error.asked_nbytes:,} bytes transferred")


def say(what: str, began_s: float, nbytes: int) -> None:
    """Print what was moved, and how fast."""
    elapsed_s = time.perf_counter() - began_s
    print(f"{nbytes // MIB} MiB {what} in {elapsed_s:.2f} s, {format_rate(nbytes / elapsed_s)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
