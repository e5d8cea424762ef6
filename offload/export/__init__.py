"""A trained model as a Hugging Face directory, from a runtime or from a run that is not open."""

__all__: list[str] = []
