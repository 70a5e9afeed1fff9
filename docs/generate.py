"""Write docs/structures.md from the registered structures, docs/recipes.md from the table of recipes and docs/claims.md from
the results of the claims.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from gramian.compression import ALLOCATIONS, RECIPES, WEIGHTINGS
from gramian.ops import structures

HERE = Path(__file__).parent
MADE = "<!-- made by docs/generate.py; edit that, or the docstrings -->\n"


def first_sentence(cls: Any) -> str:
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


def recipes() -> str:
    """One section for every recipe, after tables of what they choose from."""
    lines = [
        MADE,
        "# Recipes of compression",
        "",
        "Each is a few choices over one core: `gramian compress MODEL --recipe NAME`, or",
        '`gramian.compress(model, data, recipe="NAME")`. `auto` is the default.',
        "",
        "| recipe | structures | weighting | allocation | costs |",
        "|---|---|---|---|---|",
    ]
    for r in RECIPES.values():
        allocation = r.allocation or "exact (uniform without gradients)"
        cells = [f"[`{r.name}`](#{r.name})", f"`{r.structures}`", f"`{r.weighting}`", allocation, ", ".join(r.costs)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "An error D of a weight costs `tr(G_out D G_in D^T)`. The weightings:",
        "",
        "| weighting | Grams | bias |",
    ]
    lines += ["|---|---|---|"]
    lines += [f"| `{name}` | `{w.formula}` | {w.bias} |" for name, w in WEIGHTINGS.items()]
    lines += ["", "The ways to divide a budget:", "", "| allocation | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {first_sentence(rule)} |" for name, rule in ALLOCATIONS.items()]
    for r in RECIPES.values():
        facts = {
            "Paper": r.paper,
            "Formula": f"`{r.formula}`",
            "Solver": r.solver,
            "Calibration collects": r.needs,
            "Training changes": r.healing,
            "Departs from the paper": r.departs or "no",
        }
        lines += ["", f"## {r.name}", "", *(f"- {key}: {value}" for key, value in facts.items())]
    return "\n".join(lines) + "\n"


def claims() -> str:
    """A table of all claims that were run, then a section with the numbers of each."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((HERE.parent / "claims" / "results").glob("*.json"))
    }
    lines = [
        MADE,
        "# Claims of the papers, run again",
        "",
        "Each at laptop scale, by `claims/NAME.py` (`make claims` runs all); the numbers are in `claims/results/NAME.json`.",
        "",
        "| name | claim, as tested | verdict |",
        "|---|---|---|",
    ]
    lines += [f"| [{name}](#{name}) | {claim['claim']} | **{claim['verdict']}** |" for name, claim in found.items()]
    for name, claim in found.items():
        lines += ["", f"## {name}", "", f"**{claim['verdict'].capitalize()}.** {claim['paper']}", ""]
        lines += ["Claimed:", "", *entries(claim["claimed"]), "", "Measured:", "", *entries(claim["measured"])]
    return "\n".join(lines) + "\n"


def entries(value: Any, depth: int = 0) -> list[str]:
    """Nested results as a list; what holds nothing nested is one line."""
    if not isinstance(value, dict):
        return [f"- {flat(value)}"]
    lines = []
    for key, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(x, dict) for x in inner.values()):
            lines += [f"{'    ' * depth}- {key}:", *entries(inner, depth + 1)]
        else:
            lines.append(f"{'    ' * depth}- {key}: {flat(inner)}")
    return lines


def flat(value: Any) -> str:
    """On one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        between = "; " if any(isinstance(inner, dict) for inner in value) else ", "
        return between.join(map(flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    (HERE / "structures.md").write_text(catalogue(), encoding="utf-8")
    (HERE / "recipes.md").write_text(recipes(), encoding="utf-8")
    (HERE / "claims.md").write_text(claims(), encoding="utf-8")
