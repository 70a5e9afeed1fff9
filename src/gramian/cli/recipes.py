"""``gramian recipes``: search the catalogue."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from gramian.errors import GramianError


def run_recipes(words: Sequence[str], *, json_output: bool = False) -> None:
    """Print the recipes in which every word occurs; one match alone is shown in full.

    Raises:
        GramianError: none matches.
    """
    from gramian.compression.recipes import RECIPES, Recipe, find_recipes

    found = [RECIPES[words[0]]] if len(words) == 1 and words[0] in RECIPES else find_recipes(words)
    if not found:
        raise GramianError(f"no recipe mentions {' '.join(words)}; known: {', '.join(RECIPES)}")

    def axes(recipe: Recipe) -> dict[str, str]:
        return {
            "structure": recipe.structures,
            "weighting": recipe.weighting,
            "solver": recipe.solver,
            "allocation": recipe.allocation or "exact; uniform without gradients",
            "healing": recipe.healing,
            "costs": ", ".join(recipe.costs),
        }

    if json_output:
        rows = [
            {"name": r.name, "paper": r.paper, "formula": r.formula, "departs": r.departs, **axes(r)} for r in found
        ]
        click.echo(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(found) == 1:
        recipe = found[0]
        table = Table(show_header=False, title=recipe.name)
        for key, value in {"paper": recipe.paper, "formula": recipe.formula, **axes(recipe)}.items():
            table.add_row(key, value)
        table.add_row("departs from the paper", recipe.departs or "no")
        console.print(table)
        return
    table = Table(title="gramian compress --recipe NAME")
    for column in ("name", "paper", "structure", "weighting", "allocation", "costs"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for recipe in found:
        own = axes(recipe)
        paper = recipe.paper.partition(":")[0]
        table.add_row(recipe.name, paper, *(own[key] for key in ("structure", "weighting", "allocation", "costs")))
    console.print(table)
