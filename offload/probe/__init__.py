"""Measures this machine: drives, host memory, links. See `offload.probe.results` for what comes out."""
