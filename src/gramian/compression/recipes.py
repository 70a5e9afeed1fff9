"""Published ways to compress a network, as choices of the same few things.

A recipe says which structures may be used, which Grams measure an error, what finds the approximation, how the budget is
divided, and what is trained afterwards. ``plan_recipe`` carries out the choices that make a plan; ``gramian.compress`` and
``gramian compress --recipe NAME`` do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gramian.compression.layer import Layer, resolve_weighting
from gramian.compression.options import COSTS
from gramian.compression.plan import Plan, make_plan
from gramian.errors import GramianError, nearest
from gramian.grams import Joint


@dataclass(frozen=True)
class Recipe:
    """The choices of one paper.

    Attributes:
        name: how to ask for it.
        paper: authors, year, title.
        formula: what is minimised, and by what.
        structures: names with commas between; "auto" takes those that suit the cost, or what the user names.
        weighting: which Grams measure an error (``layer.WEIGHTINGS``).
        solver: what finds the approximation.
        allocation: how the budget is divided (``allocation.ALLOCATIONS``); None for "exact" where errors of layers compare
            and "uniform" elsewhere.
        costs: what can be counted; the first is the default.
        layers: "linear", or "embeddings" alone.
        healing: what training after the fit changes.
        departs: where it departs from the paper.
        fixed: entries that every size of a single layer gets.
        train: "module:function" of the recipe's own training, in the place of healing: called as ``train(small, model,
            names, workload, steps=, seed=, progress=)`` it changes `small` in place.
        steps: of that training where the user names none.
        run: "module:function" of a recipe that acts on modules and not on a plan's entries: called as ``run(model,
            workload, keep=, cost=, heal_steps=, seed=, progress=, note=)`` it returns a smaller model of the same kind, which
            is saved in the format of the original; ``note`` is given (step, loss) of training.
    """

    name: str
    paper: str
    formula: str
    structures: str
    weighting: str = "two-sided"
    solver: str = ""
    allocation: str | None = "uniform"
    costs: tuple[str, ...] = COSTS
    layers: str = "linear"
    healing: str = "the factors of all changed layers"
    departs: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    train: str = ""
    steps: int = 0
    run: str = ""

    @property
    def needs(self) -> str:
        """What calibration must collect: "nothing", "inputs", "gradients", or "gradients, if they can be had"."""
        if self.weighting == "two-sided":
            return "gradients, if they can be had"
        return resolve_weighting(self.weighting).needs

    def objective(self, asked: str) -> str:
        """The objective to collect Grams with.

        Args:
            asked: the user's, or "auto".

        Raises:
            GramianError: the recipe needs gradients and the user wants no backward pass.
        """
        if asked == "none" and self.needs == "gradients":
            raise GramianError(f"recipe {self.name} needs gradients: objective 'none'; expected auto, features or lm")
        return "none" if asked == "auto" and self.needs in ("nothing", "inputs") else asked

    def check(self, cost: str | None, structures: Sequence[str] | str = "auto", **others: Any) -> str:
        """Raise on what the recipe cannot do.

        Args:
            cost: None for the recipe's default.
            structures: the user's own choice.
            others: further choices by name; a recipe that makes the model as a whole has no use for any.

        Returns:
            The cost.

        Raises:
            GramianError: a cost it does not lower, structures named beside a recipe that brings its own, or a choice of layers
                or of an objective for one that makes the model as a whole.
        """
        given = [name for name, value in {"structures": structures, **others}.items() if value and value != "auto"]
        if self.run and given:
            raise GramianError(f"recipe {self.name} acts on the model as a whole; leave out {', '.join(given)}")
        if cost is not None and cost not in COSTS:
            raise GramianError(f"unknown cost {cost!r}{nearest(cost, COSTS)}; expected one of {', '.join(COSTS)}")
        if cost is not None and cost not in self.costs:
            raise GramianError(
                f"recipe {self.name} cannot lower the {cost}; expected a cost of {' or '.join(self.costs)}"
            )
        if self.structures != "auto" and structures != "auto":
            raise GramianError(
                f"recipe {self.name} brings its own structures ({self.structures}); leave structures out, or take recipe auto"
            )
        return cost or self.costs[0]

    def options(self, structures: Sequence[str] | str = "auto") -> dict[str, Any]:
        """The choices as ``make_plan`` takes them.

        Args:
            structures: the user's, for a recipe that leaves them open.
        """
        return {
            "structures": structures if self.structures == "auto" else self.structures,
            "weighting": self.weighting,
            "allocation": self.allocation,
            "fixed": self.fixed,
        }


PARAMETERS = ("params", "bytes", "flops", "latency")
STORAGE = ("params", "bytes")
PAIR = "low_rank"

_ALL = [
    Recipe(
        "auto",
        "this library: two-sided Grams, all structures in one knapsack",
        "min sum_l 1/2 tr(H_l D_l G_l D_l^T) over structures and sizes of all layers, subject to the budget",
        "auto",
        solver="closed forms: reduced rank, pivoted Nystrom, rounding with feedback",
        allocation=None,
    ),
    Recipe(
        "svd",
        "Eckart, Young 1936: The approximation of one matrix by another of lower rank",
        "min ||W - A||_F over rank(A) <= r",
        PAIR,
        "none",
        "truncated SVD",
        costs=PARAMETERS,
        departs="none; a baseline that needs no data and is useless on activations far from isotropic",
    ),
    Recipe(
        "asvd",
        "Yuan et al. 2023: ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
        "min ||(W - A) S||_F, S = diag(rms(x_j)^(1/2))",
        PAIR,
        "root-diagonal",
        "truncated SVD of W S",
        costs=PARAMETERS,
        departs="root mean squares in the place of mean absolute values; uniform ranks, not a search by perplexity",
    ),
    Recipe(
        "svd-llm",
        "Wang et al. 2024: SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        "min E ||(W - A) x||^2 over rank(A) <= r: the SVD of W S with S S^T = E x x^T",
        PAIR,
        "input",
        "eigenvectors of W G W^T: no Cholesky factor, no inverse",
        costs=PARAMETERS,
        departs="singular second moments are allowed; calibrated in parallel, without the update of U",
    ),
    Recipe(
        "fwsvd",
        "Hsu et al. 2022: Language model compression with weighted low-rank factorization (FWSVD)",
        "min ||diag(f)^(1/2) (W - A)||_F, f_i = sum_j E (dL/dW_ij)^2",
        PAIR,
        "fisher-rows",
        "truncated SVD of diag(f)^(1/2) W",
        costs=PARAMETERS,
        departs="the Fisher information of labels drawn from the model, or of probes of its output; inputs centred",
    ),
    Recipe(
        "fwsvd-columns",
        "Hsu et al. 2022 (FWSVD), with weights on both sides as in Hua et al. 2022: Numerical Optimizations for Weighted "
        "Low-rank Estimation on Language Model",
        "min ||diag(f)^(1/2) (W - A) diag(c)^(1/2)||_F, f_i c_j ~ E (dL/dW_ij)^2",
        PAIR,
        "fisher-rows-columns",
        "truncated SVD of diag(f)^(1/2) W diag(c)^(1/2)",
        costs=PARAMETERS,
        departs="columns weigh by the inputs' variance: the Kronecker factorisation of the Fisher information",
    ),
    Recipe(
        "lord",
        "Kaushal et al. 2023: LoRD: Low Rank Decomposition of Monolingual Code LLMs for One-Shot Compression",
        "A = U U^T W, U the top eigenvectors of Cov(W x); b' = b + (W - A) E x",
        PAIR,
        "centred",
        "eigenvectors of W Cov(x) W^T",
        costs=PARAMETERS,
        departs="none; a layer without a bias gains one",
    ),
    Recipe(
        "welore",
        "Jaiswal et al. 2024: From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
        "rank r_l = #{i : (s_i - s_min) / (s_max - s_min) >= k}, one k for all layers",
        PAIR,
        "none",
        "truncated SVD",
        "threshold",
        costs=PARAMETERS,
        healing="the factored layers; what stays dense stays frozen",
        departs="the budget counts what is stored, not ranks: a layer is factored where that makes it smaller",
    ),
    Recipe(
        "modegpt",
        "Lin et al. 2024: MoDeGPT: Modular Decomposition for Large Language Model Compression",
        "MLP: neurons J and W_down C[:, J] C[J, J]^-1; q, k: rotary pairs, or the SVD of G^(1/2) W_q^T W_k G^(1/2); v, o: the "
        "SVD of W_o W_v G^(1/2), stacked over the queries that share a value head",
        "neurons,query_key,rotary_halves,rotary_neighbours,value_output",
        "two-sided",
        "pivoted Nystrom; least predicted loss pair by pair; reduced rank",
        "entropic",
        costs=PARAMETERS,
        departs="two-sided Grams; pivots in the place of leverage scores; the reader of the values is refitted at the end; a "
        "share of the budget for each module, not for each block; heads and blocks get widths of their own, which no class of "
        "transformers has: the result loads with gramian (recipe modegpt-uniform gives an ordinary model)",
    ),
    Recipe(
        "modegpt-uniform",
        "Lin et al. 2024 (MoDeGPT), its MLP part alone",
        "neurons J and W_down C[:, J] C[J, J]^-1, as many in every block",
        "neurons",
        "two-sided",
        "pivoted Nystrom",
        costs=PARAMETERS,
        departs="attention stays as it is; one width for all blocks: the result is an ordinary model of the same class, with a "
        "smaller intermediate size",
    ),
    Recipe(
        "depth",
        "Kim et al. 2024: Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
        "the blocks whose removal changes predictions least on calibration text go, one after another",
        "auto",
        solver="greedy removal",
        costs=("params", "flops"),
        healing="the linear layers of the blocks that are left",
        departs="scored by the divergence from the original's predictions, again after each removal",
        run="gramian.models.depth:depth",
    ),
    Recipe(
        "low-rank-clone",
        "Hao et al. 2025: A Token is Worth over 1,000 Tokens: Efficient Knowledge Distillation through Low-Rank Clone",
        "W_student = W P or P^T W with trained projections P (d, d'); min KL(predictions) + MSE(inner states)",
        "auto",
        solver="P starts as the principal directions of the residual stream; AdamW",
        costs=("params", "flops"),
        healing="the projections and norms",
        departs="starts from principal directions, not from noise; norms are folded into the projections first",
        run="gramian.models.clone:clone",
    ),
    Recipe(
        "blast",
        "Lee et al. 2024: BLAST: Block-Level Adaptive Structured Matrices for Efficient Deep Neural Network Inference",
        "W_ij ~ U_i diag(s_ij) V_j",
        "blast",
        "two-sided",
        "alternating least squares under both Grams from the low-rank optimum",
        costs=PARAMETERS,
        departs="exact alternating least squares in the place of preconditioned gradient descent; 2 to 16 blocks a side",
    ),
    Recipe(
        "monarch",
        "Dao et al. 2022: Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
        "W ~ P L P^T R, L and R block-diagonal: a truncated SVD of every block of the permuted matrix",
        "monarch",
        "two-sided",
        "SVD of each block; block-coordinate descent under both Grams",
        costs=PARAMETERS,
        departs="blocks of any rank and number; weighted by Grams",
    ),
    Recipe(
        "dsformer",
        "Chand et al. 2023: DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
        "W ~ C D, D dense, s entries in each row of C",
        "dictionary",
        "two-sided",
        "alternating sparse codes and atoms under both Grams",
        costs=STORAGE,
        healing="codes, their support by the straight-through estimator, and atoms",
    ),
    Recipe(
        "sltrain",
        "Han et al. 2024: SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        "W ~ B A + S, S sparse",
        "low_rank_sparse",
        "two-sided",
        "alternating the low-rank optimum of W - S and a sparse approximation of W - B A",
        costs=("params", "bytes", "flops"),
        departs="made from a trained weight, with the support chosen; the paper trains from a random one",
    ),
    Recipe(
        "higgs",
        "Malinovskii et al. 2024: Pushing the Limits of Large Language Model Quantization via the Linearity Theorem",
        "min sum_l alpha_l t^2(bits_l) subject to the bytes; t^2 a constant of the Gaussian grid after a Hadamard rotation",
        "quantized",
        "none",
        "rounding to the nearest level of the rotated weight, scaled by its root mean square",
        "measured",
        costs=("bytes",),
        healing="biases",
        departs="scalar grids of 2 to 8 bits; groups of 128; two rounds of rotation; alpha_l measured on calibration data",
        fixed={"feedback": False, "scaling": "rms", "rotation": 1024, "rounds": 2},
    ),
    Recipe(
        "gptq",
        "Frantar et al. 2023: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers; at 4 bits a "
        "bfloat16 model runs as in Shen et al. 2023: Efficient LLM Inference on CPUs",
        "min tr(D G D^T), D = W - Q, column after column; later ones make up for the errors of earlier ones",
        "quantized",
        "input",
        "rounding with feedback of the input Gram, then coordinate descent on codes and scales",
        costs=("bytes",),
        healing="biases",
        departs="symmetric grids, groups of 128 inputs; columns in the order of the Gram's diagonal",
        fixed={"rotate": False, "grid": "uniform"},
    ),
    Recipe(
        "lrq",
        "Lee et al. 2024: LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank "
        "Weight-Scaling Matrices",
        "Q = s round(W / (s exp(L U + r + c))), min ||f(x; W) - f(x~; Q)||^2 block by block",
        "quantized",
        "none",
        "gradient descent on L, U, r, c through the rounding",
        costs=("bytes",),
        healing="the low-rank scales, block by block; what is stored stays codes and scales",
        departs="symmetric grids, groups of 128 inputs; rank an eighth of the smaller side",
        fixed={"feedback": False, "rotate": False, "grid": "uniform"},
        train="gramian.models.reconstruct:reconstruct",
        steps=200,
    ),
    Recipe(
        "reallm",
        "Leconte et al. 2024: ReALLM: A general framework for LLM compression and fine-tuning",
        "W ~ L + Q, rank(L) <= r, Q rounded to a few bits",
        "low_rank_quantized",
        "two-sided",
        "alternating the low-rank optimum of W - Q and rounding of W - L with feedback",
        allocation=None,
        costs=("bytes",),
        healing="the low-rank factors",
        departs="a Gaussian grid after rotation in the place of a neural decoder of vector codes",
    ),
    Recipe(
        "embedding",
        "Liu et al. 2024: OFA: A Framework of Initializing Unseen Subword Embeddings for Efficient Large-scale Multilingual "
        "Continued Pretraining",
        "E ~ F P, min sum_v frequency_v ||E_v - F_v P||^2",
        PAIR,
        "input",
        "truncated SVD of the table, its rows weighed by frequency",
        costs=STORAGE,
        layers="embeddings",
        departs="rows weigh by how often calibration used them; compression.new_rows gives coordinates to unseen tokens",
    ),
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
"""By name. A further recipe is one more entry."""


def resolve_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        GramianError: unknown name; the message lists the nearest ones.
    """
    if name not in RECIPES:
        raise GramianError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def find_recipes(words: Sequence[str] = ()) -> list[Recipe]:
    """The recipes in which every one of the words occurs, whatever its case and in whichever field."""
    wanted = [word.casefold() for word in words]

    def text(recipe: Recipe) -> str:
        return " ".join(str(value) for value in vars(recipe).values()).casefold()

    return [recipe for recipe in RECIPES.values() if all(word in text(recipe) for word in wanted)]


def plan_recipe(
    recipe: Recipe,
    layers: Mapping[str, Layer],
    joints: Sequence[Joint],
    *,
    keep: float,
    cost: str | None = None,
    structures: Sequence[str] | str = "auto",
    sensitivity: Mapping[str, float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The plan that a recipe makes of some layers.

    Args:
        recipe: see ``resolve_recipe``.
        layers: by name; those that the recipe is not for are left out of the plan.
        joints: as in ``make_plan``.
        keep: share of the cost of the layers that the recipe is for.
        cost: what is counted; None for the recipe's default.
        structures: what may compete, for a recipe that leaves it open.
        sensitivity: by layer name, for a recipe of measured sensitivities.
        progress: as in ``make_plan``.

    Raises:
        GramianError: what the recipe cannot do; no layer of its kind; as ``make_plan``.
    """
    cost = recipe.check(cost, structures)
    if recipe.layers == "embeddings":
        layers, joints = {name: layer for name, layer in layers.items() if layer.embedding}, []
        if not layers:
            raise GramianError(
                f"recipe {recipe.name} is for embeddings of words; this model shows none that can be factored"
            )
    if recipe.allocation == "measured" and sensitivity is None:
        raise GramianError(
            f"recipe {recipe.name} needs the layers' measured sensitivities (models.sensitivity.measure)"
        )
    return make_plan(
        layers,
        joints,
        keep=keep,
        cost=cost,
        sensitivity=sensitivity,
        progress=progress,
        **recipe.options(structures),
    )


__all__ = ["RECIPES", "Recipe", "find_recipes", "plan_recipe", "resolve_recipe"]
