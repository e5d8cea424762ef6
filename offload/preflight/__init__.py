"""A look at the machine before a run, in seconds: how fast it is now, for what the run will do.

`offload bench` measures with patience and keeps the result; here each figure takes a fraction of a second.
"""

from .compare import SlowLink, slower_links
from .compute import ComputeSpeed, compute_speed
from .probe import probe_machine
from .update import update_bytes_per_s

__all__ = ["ComputeSpeed", "SlowLink", "compute_speed", "probe_machine", "slower_links", "update_bytes_per_s"]
