"""A disk in memory that is slow, reorders, fails and forgets on request, behind the engine's Protocols.

For tests: nothing here is reachable from `open_engine`, and no user sees it. No threads, no real time:
the same seed and the same calls give the same journal and the same bytes.

>>> disk = SimDisk(seed=1, faults=[Fault(0, "EIO", of="sync")])
>>> with SimEngine(disk) as engine, engine.open("/sim/data", "x+") as file:
...     engine.submit("write", file, bytes(4096), 0).wait()
...     after_power_loss = disk.crash(seed=7)
...     engine.sync(file)  # StorageError: what was not durable is lost
4096
"""

from offload.aio.sim.disk import SimDisk
from offload.aio.sim.engine import SimEngine, SimFile, SimRequest
from offload.aio.sim.faults import Fault, FaultKind, Operation, OperationKind, SimCrash, SimStuckError

__all__ = [
    "Fault",
    "FaultKind",
    "Operation",
    "OperationKind",
    "SimCrash",
    "SimDisk",
    "SimEngine",
    "SimFile",
    "SimRequest",
    "SimStuckError",
]
