"""AdamW: its settings, the kernel and its torch reference, an optimizer for CPU tensors, and the one that an
outer loop sees in place of the streamed update."""

from .adamw import StreamedAdamW
from .chunk import ChunkMemory, SettingsRun, settings_runs, update_chunk
from .groups import AdamWOptions, ParameterSettings, default_param_groups
from .kernel import (
    Backend,
    Moment8bit,
    adamw_update,
    adamw_update_8bit,
    describe_kernel,
    squared_norm,
)
from .torch_adamw import AdamW

__all__ = [
    "AdamW",
    "AdamWOptions",
    "Backend",
    "ChunkMemory",
    "Moment8bit",
    "ParameterSettings",
    "SettingsRun",
    "StreamedAdamW",
    "adamw_update",
    "adamw_update_8bit",
    "default_param_groups",
    "describe_kernel",
    "settings_runs",
    "squared_norm",
    "update_chunk",
]
