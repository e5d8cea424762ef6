"""Asynchronous file I/O: see `offload.aio.engine` for what an engine promises."""

from offload.aio.checksum import crc32c
from offload.aio.engine import ALIGNMENT_NBYTES, Engine, EngineName, File, Op, OpenMode, Request
from offload.aio.memory import aligned_buffer
from offload.aio.select import EngineProbe, open_engine, probe_engines

__all__ = [
    "ALIGNMENT_NBYTES",
    "Engine",
    "EngineName",
    "EngineProbe",
    "File",
    "Op",
    "OpenMode",
    "Request",
    "aligned_buffer",
    "crc32c",
    "open_engine",
    "probe_engines",
]
