"""One figure a file: each takes a ``Study`` and returns a ``content.Figure``, or None where nothing was measured."""
