"""Directories that appear under their name complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gramian.errors import GramianError


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh directory beside `path` to write in; it takes the name `path` when the block ends without an error.

    Everything is on disk before the name changes, so a reader or a crash sees the whole directory or none. An error
    removes what was written. (A killed process can leave a hidden ``.<name>.<random>.partial`` beside `path`.)

    Raises:
        GramianError: `path` exists and is not an empty directory, or cannot be written.
    """
    final = Path(path).absolute()
    if final.is_symlink() or (final.exists() and not final.is_dir()) or (final.is_dir() and any(final.iterdir())):
        raise GramianError(f"{path} exists and is not an empty directory; remove it or choose another name")
    partial = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for folder, _, files in os.walk(partial):
            for name in [*files, "."]:
                flush(Path(folder, name))
        if final.exists():
            final.rmdir()  # empty; renaming on to it works on POSIX only
        os.rename(partial, final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise GramianError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
