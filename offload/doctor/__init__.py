"""Looks at a machine and says what keeps `offload` from working, or from working fast, and the cure of each.

`collect` takes the facts, `checks` judges them, `screen` and `document` show both.
"""

__all__: list[str] = []
