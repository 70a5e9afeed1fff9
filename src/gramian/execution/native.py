"""Kernels in C, compiled in a few seconds by the C compiler of the user's machine for its very processor, and kept in the
user's cache directory. Without a compiler (``$CC``, gcc, cc or clang), or on Windows, torch's own products run instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gramian.execution.cache import cache_directory
from gramian.modes import counted, watched

DTYPES = (torch.float32, torch.bfloat16)
"""Of weights and what they multiply."""
SOURCES = Path(__file__).with_name("c")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
TRIED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",))
"""For this very processor, with threads; where a compiler does not know how, the next."""


def _compiler() -> list[str] | None:
    if sys.platform == "win32":
        return None
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    # GCC first: its threads are those that torch runs on, where there are both.
    return next(([found] for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)


def _processor() -> str:
    """What compiled code may not run without: a cache directory may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.lower().startswith(("model name", "flags", "features", "cpu part"))]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *told])


def build() -> Path | None:
    """The compiled kernels of this machine, made now if they are not there; None without a compiler, or if it fails."""
    compiler, sources = _compiler(), sorted(SOURCES.glob("*.[ch]"))
    parts = [_processor(), *(compiler or []), *FLAGS, *(flag for flags in TRIED for flag in flags)]
    about = "\0".join([*parts, *(path.read_text(encoding="utf-8") for path in sources)])
    path = cache_directory() / f"kernels-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    if compiler is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            files = [str(source) for source in sources if source.suffix == ".c"]
            for flags in TRIED:
                command = [*compiler, *FLAGS, *flags, *files, "-o", str(made)]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    made.replace(path)
                    return path
    except OSError:
        pass  # no such compiler, or nowhere to write
    return None


@lru_cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they cannot be had."""
    path = build()
    if path is None:
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    try:
        found = ctypes.CDLL(str(path))
        found.gramian_few_rows.argtypes = [pointer, number, pointer, pointer, pointer, number]
        found.gramian_codes.argtypes = found.gramian_rotate.argtypes = [pointer, number, pointer, pointer, number]
        found.gramian_decode.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, pointer, number]
    except (OSError, AttributeError):
        path.unlink(missing_ok=True)  # damaged: the next process makes it again
        return None
    return found


def present() -> bool:
    """Whether there are compiled kernels, or can be."""
    return library() is not None


def readable(x: Tensor, dtype: torch.dtype, *weights: Tensor) -> bool:
    """Whether a kernel for that dtype may take x: nothing looks on that would not see it, and x is memory."""
    return x.dtype == dtype and type(x) is Tensor and not (watched(x, *weights) or counted())


__all__ = ["DTYPES", "build", "library", "present", "readable"]
