"""Post-training compression: what each structure and size of each layer would lose, and the best choice under a budget."""

from gramian.compression.knapsack import solve, solve_lagrangian
from gramian.compression.layer import Layer
from gramian.compression.options import JOINT, Built, Candidate, Cost, dense_cost, op_cost
from gramian.compression.plan import Entry, Plan, build_entry, count, make_plan, resolve_structures

__all__ = [
    "JOINT",
    "Built",
    "Candidate",
    "Cost",
    "Entry",
    "Layer",
    "Plan",
    "build_entry",
    "count",
    "dense_cost",
    "make_plan",
    "op_cost",
    "resolve_structures",
    "solve",
    "solve_lagrangian",
]
