"""Errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GramianError(ValueError):
    """Bad input, met at the door.

    The message names the culprit (a layer, an argument, a file), what was found, what was expected and what
    to do about it. The command line prints it on one line and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean a, b?)"`` for a mistyped `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(matches)}?)" if matches else ""
