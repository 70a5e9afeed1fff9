"""Post-training compression: what each structure and size of each layer would lose, and the best choice under a budget."""

from gramian.compression.allocation import ALLOCATIONS, entropic_shares, resolve_allocation
from gramian.compression.embedding import new_rows
from gramian.compression.knapsack import solve, solve_lagrangian
from gramian.compression.layer import WEIGHTINGS, Layer, resolve_weighting
from gramian.compression.options import JOINT, Built, Candidate, Cost, dense_cost, op_cost
from gramian.compression.plan import Entry, Plan, build_entry, count, make_plan, resolve_structures
from gramian.compression.recipes import RECIPES, Recipe, find_recipes, plan_recipe, resolve_recipe

__all__ = [
    "ALLOCATIONS",
    "JOINT",
    "RECIPES",
    "WEIGHTINGS",
    "Built",
    "Candidate",
    "Cost",
    "Entry",
    "Layer",
    "Plan",
    "Recipe",
    "build_entry",
    "count",
    "dense_cost",
    "entropic_shares",
    "find_recipes",
    "make_plan",
    "new_rows",
    "op_cost",
    "plan_recipe",
    "resolve_allocation",
    "resolve_recipe",
    "resolve_structures",
    "resolve_weighting",
    "solve",
    "solve_lagrangian",
]
