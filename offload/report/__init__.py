"""What a measurement or a run found, for people and programs: text, Markdown, JSON, a page."""

__all__: list[str] = []
