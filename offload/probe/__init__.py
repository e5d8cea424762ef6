"""Measures this machine: drives, host memory, links. `run` is where it begins, `results` what comes out."""

__all__: list[str] = []
