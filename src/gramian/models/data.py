"""Text: the built-in corpus (CPython's own documentation) and text files of a user."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gramian.errors import GramianError

SHORTEST, LONGEST = 120, 1200
"""Characters of a usable paragraph."""

DOCUMENTED = [
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "fractions",
    "functools",
    "heapq",
    "http.client",
    "inspect",
    "itertools",
    "json",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "socket",
    "sqlite3",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "typing",
    "unittest",
    "urllib.request",
    "uuid",
    "xml.dom.minidom",
    "zipfile",
]
"""Standard-library modules whose docstrings serve as text of another kind."""


@dataclass(frozen=True)
class Corpus:
    """Texts for calibration and, apart from them, for measuring.

    Attributes:
        source: where they come from, for the report.
        calibration: what Grams and healing may see.
        held_out: what only the measuring may see; the same as `calibration` where the source holds too little for both.
    """

    source: str
    calibration: list[str]
    held_out: list[str]

    @property
    def held_out_is_calibration(self) -> bool:
        """Whether the measuring sees no text of its own."""
        return set(self.held_out) <= set(self.calibration)

    @property
    def fingerprint(self) -> str:
        """Short hash of the calibration texts."""
        return hashlib.sha256("\0".join(self.calibration).encode()).hexdigest()[:16]


def _usable(paragraph: str) -> bool:
    if not SHORTEST <= len(paragraph) <= LONGEST:
        return False
    return sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph) >= 0.85


def _paragraphs(text: str) -> Iterable[str]:
    for block in re.split(r"\n\s*\n", text):
        yield " ".join(block.split())


def python_topics() -> Corpus:
    """English prose from CPython's language reference (``pydoc_data.topics``), split by topic: the paragraphs of about
    60 % of the topics for calibration, those of the others held out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    calibration: list[str] = []
    held_out: list[str] = []
    for key in sorted(topics):
        for paragraph in _paragraphs(topics[key]):
            if not _usable(paragraph) or paragraph in seen or paragraph.count("=") > 6:
                continue
            seen.add(paragraph)
            (calibration if zlib.crc32(key.encode()) % 5 < 3 else held_out).append(paragraph)
    return Corpus("CPython's documentation (pydoc_data.topics)", calibration, held_out)


def standard_library_docstrings() -> list[str]:
    """Docstring paragraphs of the standard library: text of another kind than the language reference."""
    out: list[str] = []
    seen: set[str] = set()
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        members = [o for _, o in inspect.getmembers(module) if inspect.isclass(o) or inspect.isroutine(o)]
        for item in (module, *members):
            for paragraph in _paragraphs(inspect.getdoc(item) or ""):
                if _usable(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    out.append(paragraph)
    return out


def read_text(path: Path) -> str:
    """What a UTF-8 text file holds.

    Raises:
        GramianError: the file is missing or binary.
    """
    if not path.is_file():
        raise GramianError(f"--data {path}: no such file; expected a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GramianError(f"--data {path}: not UTF-8 text (byte {error.start}); expected plain text") from None
    if "\0" in text:
        raise GramianError(f"--data {path}: binary data; expected plain text")
    return text


def read_corpus(path: str | Path) -> Corpus:
    """A user's text file: paragraphs (separated by blank lines) if it has any, else lines; every tenth is held out.

    Of fewer than ten, all serve for both: ``Corpus.held_out_is_calibration``.

    Raises:
        GramianError: the file is missing, binary, or holds no text.
    """
    path = Path(path)
    text = read_text(path)
    texts = [block for block in _paragraphs(text) if block]
    if len(texts) < 2:
        texts = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise GramianError(f"--data {path}: the file holds no text; expected paragraphs separated by blank lines")
    if len(texts) < 10:
        return Corpus(str(path), texts, texts)
    return Corpus(str(path), [t for i, t in enumerate(texts) if i % 10], texts[::10])
