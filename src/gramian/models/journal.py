"""The work directory of a long run: files that are whole or absent, for one run at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gramian.errors import GramianError


class PassingError(GramianError):
    """What ended a run lies outside it: the journal stays for the next."""


class DamagedJournalError(PassingError):
    """A file of the work directory is not what was written there."""


def damaged(path: Path, what: str) -> DamagedJournalError:
    """The error for a file that is not what it was, with the remedy."""
    return DamagedJournalError(f"{path}: damaged journal ({what}); remove this file to make it again")


def keep(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and what JSON can say about them as one file, sealed with a checksum."""
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    content = save(whole, {"description": json.dumps(description)})
    write(path, content + hashlib.sha256(content).digest())


def recall(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What ``keep`` wrote; None if there is no such file.

    Raises:
        DamagedJournalError: any byte is different.
    """
    if not path.exists():
        return None
    sealed = path.read_bytes()
    content, seal = sealed[:-32], sealed[-32:]
    if hashlib.sha256(content).digest() != seal:
        raise damaged(path, "its checksum differs")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), json.loads(header["__metadata__"]["description"])


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, also after a crash."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)


def finite(value: Any) -> Any:
    """The same JSON-able value with NaN and Inf as null: they are not JSON."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hash_tensors(digest: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Feed the names and bytes of tensors to a hash."""
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def publish(
    work: Path, final: Path, out: Path, report: dict[str, Any], render: Callable[[dict[str, Any]], str] | None
) -> None:
    """Write the report (with `render` its page too) into `final`, which becomes `out` by one rename; `work` ends."""
    write(final / "report.json", json.dumps(finite(report), indent=1, allow_nan=False).encode())
    if render is not None:
        write(final / "report.html", render(report).encode())
    if out.exists():
        out.rmdir()
    os.rename(final, out)
    shutil.rmtree(work, ignore_errors=True)


def disk_error(error: BaseException) -> BaseException | None:
    """What the disk said, if that is why `error` was raised."""
    return next((e for e in (error, error.__cause__) if isinstance(e, OSError | SafetensorError)), None)


def check_out(out: Path) -> Path:
    """Look at a directory for a result before any work: it must not exist, or be empty.

    Returns:
        The nearest folder above it that exists.

    Raises:
        GramianError: it is something else, or cannot be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise GramianError(f"--out {out} exists and is no directory; remove it or choose another name")
    if out.exists() and any(out.iterdir()):
        raise GramianError(f"--out {out} exists and is not empty; remove it or choose another directory")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise GramianError(f"--out {out}: {parent} is a file; choose another directory")
    if not os.access(parent, os.W_OK):
        raise GramianError(f"--out {out}: no permission to write in {parent}; choose another directory")
    return parent


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """An error of the disk becomes a GramianError that says how to go on."""
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None:
            raise
        raise GramianError(
            f"--out {out} cannot be written: {cause}; see to that and run the same command again to go on"
        ) from cause


@contextmanager
def workspace(path: Path, first: str) -> Iterator[None]:
    """The work directory, for one run at a time. An error that would come again takes it along, and so does any error
    before there is something in it worth keeping.

    Args:
        path: made if need be.
        first: name of the first file that is worth keeping.

    Raises:
        GramianError: another run is using it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except ImportError:
            pass  # Windows has no such lock
        except BlockingIOError:
            raise GramianError(f"{path}: the same command is running already; wait for it to end") from None
        try:
            yield
        except BaseException as error:
            passing = isinstance(error, PassingError) or disk_error(error) is not None
            final = isinstance(error, GramianError) and not passing
            if final or not (path / first).exists():
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):
                    for folder in made:
                        folder.rmdir()
            raise
