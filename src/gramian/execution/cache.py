"""Where what was measured or compiled on a machine is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """``$GRAMIAN_CACHE``, or gramian's folder in the user's cache directory; it need not exist."""
    root = os.environ.get("GRAMIAN_CACHE")
    if root is not None:
        return Path(root)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "gramian"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gramian"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gramian"


__all__ = ["cache_directory"]
