"""Records on their way: where they rest, which come next, and what moves between disk, host and device."""

__all__: list[str] = []
