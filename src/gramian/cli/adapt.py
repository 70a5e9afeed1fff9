"""``gramian adapt``: fine-tune a model by structured updates, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gramian.errors import GramianError


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(), required=True, help="UTF-8 text, or JSON lines with text and label.")
@click.option("--out", type=click.Path(), required=True, help="Directory for the result; must not exist or be empty.")
@click.option("--recipe", default="lora", show_default=True, help="lora, pissa, lora_xs, ...; auto plans each layer.")
@click.option("--rank", type=int, default=8, show_default=True, help="Of every layer.")
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the recipe, e.g. alpha=32 (repeatable)."
)
@click.option("--task", metavar="lm|classify", help="Default: classify for JSON lines with labels, else lm.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers of this name (shell style; repeatable).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave layers of this name alone (repeatable).")
@click.option("--steps", type=int, help="Optimiser steps, at most. Default: as many as --epochs takes.")
@click.option("--epochs", type=float, default=3, show_default=True, help="Passes over the data, without --steps.")
@click.option("--rate", type=float, default=3e-4, show_default=True, help="Peak learning rate.")
@click.option("--batch", type=int, default=16, show_default=True, help="Sequences a step.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Passes a step: less memory.")
@click.option("--max-length", type=int, help="Tokens of a sequence. Default: 256, or what the model takes.")
@click.option("--every", type=int, default=0, help="Steps between evaluations. Default: a twentieth of all.")
@click.option(
    "--patience", type=int, default=5, show_default=True, help="Evaluations without a better one; 0: any number."
)
@click.option("--merge", is_flag=True, help="Also write the model with the adapter folded in, to OUT/merged.")
@click.option("--lossy", is_flag=True, help="Merge even where rounding loses more than 5 % of a layer's update.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Check names, data, ranks and disk, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def adapt(
    model: str, data: str, out: str, dry_run: bool, as_json: bool, options: tuple[str, ...], **given: Any
) -> None:
    """Fine-tune a model by small structured updates of its weights; the weights themselves stay as they are.

    MODEL is the directory of a Hugging Face model, perhaps one that gramian compress made. Every tenth sequence is held out:
    the loss on it decides when to stop and which step's values are kept. OUT holds the adapter, in the format of the peft
    library too where that can hold it, and a page, report.html. An interrupted run goes on when started again.
    """
    from gramian.cli.main import _guard, _quiet_threads

    _quiet_threads()
    _guard(lambda: run_adapt(model, data, out, options=options, dry_run=dry_run, json_output=as_json, **given), as_json)


def run_adapt(
    model: str,
    data: str,
    out: str,
    *,
    options: tuple[str, ...] = (),
    dry_run: bool = False,
    json_output: bool = False,
    **given: Any,
) -> None:
    """Do the work of ``gramian adapt``.

    Args:
        model: directory of the model.
        data: text file.
        out: directory for the result.
        options: "NAME=VALUE" of the recipe.
        dry_run: check and stop.
        json_output: print one JSON object.
        given: the other fields of ``gramian.adapt.job.Settings``.

    Raises:
        GramianError: bad input; nothing is at `out` then.
    """
    from gramian.adapt.job import AdaptJob, Settings
    from gramian.cli.main import _Progress
    from gramian.models.journal import finite

    lists: dict[str, Any] = {key: tuple(given[key]) for key in ("include", "exclude") if key in given}
    settings = Settings(options=_options(options), **{**given, **lists})
    if dry_run:
        facts = AdaptJob(model, data, Path(out), settings).check()
        if json_output:
            click.echo(json.dumps(facts))
        else:
            _print_facts(facts)
        return
    from gramian.report.adapt_page import render

    with _Progress(enabled=not json_output) as progress:
        report = AdaptJob(model, data, Path(out), settings, progress, render).run()
    if json_output:
        click.echo(json.dumps(finite({**report, "out": out}), allow_nan=False))
        return
    _print(report, out)


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``alpha=32`` as ``{"alpha": 32}``; what is no JSON value is a text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise GramianError(f"--option {pair!r}: expected NAME=VALUE, e.g. alpha=32")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="dry run: nothing was done", show_header=False)
    for key, value in facts.items():
        if key in ("disk_needed", "disk_free") or value == []:
            continue
        shown = f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", " "), Text(shown))
    table.add_row("disk", f"{facts['disk_needed'] / 1e6:,.0f} MB needed, {facts['disk_free'] / 1e6:,.0f} MB free")
    Console().print(table)


def _print(report: dict[str, Any], out: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gramian.report.page import count, number, percent, printable, shorten

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading, justify in (("held-out", "left"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    before, after = report["quality"]["before"], report["quality"]["after"]
    table.add_row("loss", number(before["loss"], 4), number(after["loss"], 4))
    if "perplexity" in after:
        table.add_row("perplexity", number(before["perplexity"], 4), number(after["perplexity"], 4))
    if after["accuracy"] is not None:
        table.add_row("accuracy", percent(before["accuracy"]), percent(after["accuracy"]))
    console = Console()
    console.print()
    console.print(table)
    console.print()
    trainable, training = report["trainable"], report["training"]
    head = f" and {count(trainable['head'])} of the head" if trainable["head"] else ""
    lines = [
        ("Trained", f"{count(trainable['adapter'])} parameters of the adapter{head}, {percent(trainable['share'], 2)} of the "
         f"model, in {len(report['layers'])} layers"),
        ("Steps", f"{training['steps']:,}{', stopped early' if training['stopped'] else ''}; kept the values of step "
         f"{training['best']:,}"),
        ("PEFT", "written too" if report["peft"]["written"] else f"not representable: {report['peft']['reason']}"),
    ]  # fmt: skip
    if report["merged"]:
        lines.append(("Merged", f"{report['merged']['path']}; rounding lost at most "
                      f"{percent(report['merged']['worst_rounding_loss'], 3)} of a layer's update"))  # fmt: skip
    lines += [("Warning", warning) for warning in report["warnings"]]
    for name, text in lines:
        console.print(Text.assemble((f"{name}: ", "bold"), shorten(printable(text), 400)))
    console.print(Text(f"adapter {out}\nreport  {Path(out) / 'report.html'}"), soft_wrap=True)
