"""Docstrings mark code as reStructuredText does, with two colons; Markdown wants one and the same indentation."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_TWO_COLONS = re.compile(r"::(?=\n\n[ ]{4})")


class LiteralBlocks(Extension):
    """Let `Equivalent to::` and the indented lines below it be read as Markdown."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a function, class, module or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _TWO_COLONS.sub(":", obj.docstring.value)
