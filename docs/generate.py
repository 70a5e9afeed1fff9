"""Write docs/structures.md from the registered structures and docs/claims.md from the results of the claims.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from gramian.ops import structures

HERE = Path(__file__).parent
MADE = "<!-- made by docs/generate.py; edit that, or the docstrings -->\n"


def first_sentence(cls: type[Any]) -> str:
    """Of the docstring, on one line."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|")


def catalogue() -> str:
    """One line for every structure."""
    lines = [
        MADE,
        "# Every structure",
        "",
        "| name | class | what it is | dense matrices project on it |",
        "|---|---|---|---|",
    ]
    for kind, cls in sorted(structures().items()):
        if cls.__module__.startswith("gramian."):
            sizes = cls.sizes((256, 256), 0.5) if cls.fittable else []
            example = f"yes, e.g. `{json.dumps(sizes[0])}`" if sizes else "yes" if cls.fittable else ""
            lines.append(f"| `{kind}` | `{cls.__name__}` | {first_sentence(cls)} | {example} |")
    return "\n".join(lines) + "\n"


def claims() -> str:
    """One line for every claim that was run."""
    lines = [
        MADE,
        "# Claims of the papers, run again",
        "",
        "Each at laptop scale, by `claims/NAME.py`; the numbers are in `claims/results/NAME.json`.",
        "",
        "| claim | paper | claimed | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((HERE.parent / "claims" / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cells = [f"{found['claim']} (`{path.stem}`)", found["paper"], flat(found["claimed"]), flat(found["measured"])]
        lines.append(f"| {' | '.join(cells)} | **{found['verdict']}** |")
    return "\n".join(lines) + "\n"


def flat(value: Any) -> str:
    """Nested results as text."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {flat(inner)}" if not isinstance(inner, dict) else f"{key} ({flat(inner)})"
                         for key, inner in value.items())  # fmt: skip
    if isinstance(value, list):
        return ", ".join(flat(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    (HERE / "structures.md").write_text(catalogue(), encoding="utf-8")
    (HERE / "claims.md").write_text(claims(), encoding="utf-8")
