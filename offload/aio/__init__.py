"""Asynchronous file I/O: see `offload.aio.engine` for what an engine promises."""
