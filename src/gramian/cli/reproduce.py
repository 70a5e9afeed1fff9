"""``gramian reproduce``: published claims about state tracking, measured here and now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from gramian.errors import GramianError, nearest

Measured = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A claim that one command checks.

    Args:
        name: as in ``gramian reproduce NAME``.
        paper: where it is from.
        claimed: in words.
        minutes: of processor time, about.
        measure: seed, line printer -> what was measured.
        holds: whether that bears the claim out.
    """

    name: str
    paper: str
    claimed: str
    minutes: float
    measure: Callable[[int, Callable[[str], None]], Measured]
    holds: Callable[[Measured], bool]


def _trained(
    runs: dict[str, dict[str, Any]], task: str, lengths: tuple[int, ...]
) -> Callable[[int, Callable[[str], None]], Measured]:
    """Runs of ``track``, by what tells them apart."""

    def measure(seed: int, say: Callable[[str], None]) -> Measured:
        from gramian.sequence.tracking import track

        found = {}
        for label, options in runs.items():

            def progress(now: Any, length: int, label: str = label) -> None:
                if now.step % 50 == 0:
                    say(f"{task}, {label}: step {now.step}, words of {length}, loss {now.loss:.4f}")

            found[label] = track(task, test_lengths=lengths, seed=seed, progress=progress, **options)
        return found

    return measure


def _constructed(seed: int, say: Callable[[str], None]) -> Measured:
    from gramian.sequence.tracking import constructed

    found = {}
    for label, factors, strength in (
        ("4 reflections", 4, 2.0),
        ("2 reflections", 2, 2.0),
        ("4 factors, eigenvalues in [0, 1]", 4, 1.0),
    ):
        say(f"s5, {label}")
        found[label] = constructed("s5", factors, strength=strength, seed=seed)
    return found


def _tokens(found: Measured, label: str, length: int) -> float:
    return float(found[label]["accuracy"][length]["tokens"])


PARITY = {"train_length": 40, "dim": 32, "batch": 64}
SMALL = {"steps": 450, "batch": 64}
LARGER = {"steps": 1100, "batch": 256, "rate": 5e-3, "curriculum": True, "dim": 128, "heads": 8}
LARGEST = {**LARGER, "batch": 512, "rate": 4e-3, "steps": 1400, "hidden": 16}
FULL, HALF = "eigenvalues in [-1, 1]", "eigenvalues in [0, 1]"
TWO, ONE = "2 reflections", "1 reflection"
UNLOCKING = 'Grazzi et al. 2025, "Unlocking state-tracking in linear RNNs through negative eigenvalues"'
PRODUCT = 'Siems et al. 2025, "DeltaProduct"'

TARGETS = {
    target.name: target
    for target in (
        Target(
            "parity",
            UNLOCKING,
            "trained on 40 bits, a layer with eigenvalues in [-1, 1] gives the parity of 256 (>= 99.9 % of positions); with "
            "[0, 1] it does not (<= 60 %)",
            1.0,
            _trained(
                {
                    FULL: {**PARITY, "factors": 1, "steps": 150},
                    HALF: {**PARITY, "factors": 1, "steps": 300, "beta": "sigmoid"},
                },
                "parity",
                (256,),
            ),
            lambda found: _tokens(found, FULL, 256) >= 0.999 and _tokens(found, HALF, 256) <= 0.6,
        ),
        Target(
            "s3",
            PRODUCT,
            "permutations of three: two reflections a token hold at 8 times the training length (>= 99 % of products), one "
            "does not",
            1.0,
            _trained({TWO: {"factors": 2, **SMALL}, ONE: {"factors": 1, **SMALL}}, "s3", (256,)),
            lambda found: _tokens(found, TWO, 256) >= 0.99 > _tokens(found, ONE, 256),
        ),
        Target(
            "s4",
            PRODUCT,
            "permutations of four, two reflections a token (>= 97 % of products at 8 times the training length)",
            8.0,
            _trained({TWO: {"factors": 2, **LARGER}}, "s4", (256,)),
            lambda found: _tokens(found, TWO, 256) >= 0.97,
        ),
        Target(
            "a5",
            PRODUCT,
            "even permutations of five, two reflections a token (>= 97 % of products at 8 times the training length)",
            16.0,
            _trained({TWO: {"factors": 2, **LARGEST}}, "a5", (256,)),
            lambda found: _tokens(found, TWO, 256) >= 0.97,
        ),
        Target(
            "s5-constructive",
            PRODUCT,
            "permutations of five: four reflections a token hold every state of 4096 tokens (weights written down, not "
            "learned); two, or eigenvalues in [0, 1], do not",
            0.1,
            _constructed,
            lambda found: (
                found["4 reflections"]["states"] == 1.0
                and max(found["2 reflections"]["states"], found["4 factors, eigenvalues in [0, 1]"]["states"]) < 0.1
            ),
        ),
    )
}


def reproduce(name: str, *, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run one target.

    Args:
        name: of ``TARGETS``.
        seed: of weights and words.
        say: is told how it goes.

    Returns:
        "target", "paper", "claimed", "measured", "verdict" ("reproduced" or "not reproduced"), "seed" and "cpu_seconds".

    Raises:
        GramianError: unknown name; the message lists the nearest.
    """
    if name not in TARGETS:
        raise GramianError(
            f"reproduce {name!r} is unknown{nearest(name, TARGETS)}; expected one of {', '.join(TARGETS)}"
        )
    target, start = TARGETS[name], time.process_time()
    measured = target.measure(seed, say)
    return {
        "target": name,
        "paper": target.paper,
        "claimed": target.claimed,
        "measured": measured,
        "verdict": "reproduced" if target.holds(measured) else "not reproduced",
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def run_reproduce(name: str | None, *, json_output: bool = False, seed: int = 0) -> None:
    """Print the targets, or run one and print claimed, measured and verdict.

    Raises:
        GramianError: unknown name.
    """
    if name is None:
        rows = [
            {"target": t.name, "minutes": t.minutes, "claimed": t.claimed, "paper": t.paper} for t in TARGETS.values()
        ]
        if json_output:
            click.echo(json.dumps(rows))
            return
        _table("gramian reproduce NAME", rows)
        return
    if json_output:
        click.echo(json.dumps(reproduce(name, seed=seed)))
        return
    found = reproduce(name, seed=seed, say=lambda line: click.echo(line, err=True))
    click.echo(f"paper     {found['paper']}\nclaimed   {found['claimed']}")
    _table("measured", [row for label, values in found["measured"].items() for row in _rows(label, values)])
    click.echo(f"verdict   {found['verdict']}   ({found['cpu_seconds']} s of processor time, seed {seed})")


def _rows(label: str, values: Measured) -> list[dict[str, Any]]:
    """One row a length of words, or one for a construction."""
    if "accuracy" not in values:
        return [{"": label, "states right": f"{values['states']:.2%}", "largest error": f"{values['error']:.1e}"}]
    return [
        {
            "": label,
            "letters": length,
            "products right": f"{shares['tokens']:.2%}",
            "in the last quarter": f"{shares['last quarter']:.2%}",
            "words right throughout": f"{shares['sequences']:.2%}",
            "trained at": values["reached"],
            "steps": values["steps"],
            "CPU s": values["cpu_seconds"],
        }
        for length, shares in values["accuracy"].items()
    ]


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
