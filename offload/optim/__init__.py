"""AdamW: its settings, the kernel and its torch reference, and the optimizer an outer loop sees."""

from .adamw import StreamedAdamW
from .chunk import ChunkMemory, SettingsRun, settings_runs, update_chunk
from .groups import AdamWOptions, ParameterSettings, default_param_groups
from .kernel import Backend, adamw_update, describe_kernel, squared_norm

__all__ = [
    "AdamWOptions",
    "Backend",
    "ChunkMemory",
    "ParameterSettings",
    "SettingsRun",
    "StreamedAdamW",
    "adamw_update",
    "default_param_groups",
    "describe_kernel",
    "settings_runs",
    "squared_norm",
    "update_chunk",
]
