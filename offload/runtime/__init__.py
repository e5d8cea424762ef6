"""A model that is attached: its units run streamed, its steps end in commits."""

__all__: list[str] = []
