"""The fine-tuning loop: its settings, data, output folder, signals, and what it does about bad steps."""

__all__: list[str] = []
