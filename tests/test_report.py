"""The report: its schema, its page in a real browser, its closing table on terminals of any width."""

from __future__ import annotations

import copy
import html.parser
import io
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import gramian.report
from gramian.errors import GramianError
from gramian.report import charts, compress_page, page, terminal

KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}


def example(blocks: int = 6, keep: float = 0.5) -> dict:
    """A report as the sentence encoder gives it: neurons picked in the MLPs, skeletons and dense layers elsewhere."""
    rng = random.Random(0)
    layers = []
    for block in range(blocks):
        for kind, (out, inputs) in KINDS.items():
            name = f"encoder.layer.{block}.{kind}"
            total, smaller = out * inputs, min(out, inputs)
            joint: list[str] = []
            if "attention" not in kind and block % 3 != 2:
                neurons = int(1536 * keep * rng.uniform(0.7, 1.3))
                structure, size, after = "neurons", {"neurons": neurons}, neurons * 384
                other = "output.dense" if kind == "intermediate.dense" else "intermediate.dense"
                joint = [f"encoder.layer.{block}.{other}"]
            elif kind.endswith("value") and block == 5:
                structure, size, after = "dense", {}, total
            else:
                rank = int(keep * total / (out + inputs) * rng.uniform(0.7, 1.7) / 8) * 8
                structure, size, after = "skeleton", {"rank": rank}, rank * (out + inputs - rank)
            dense = structure == "dense"
            predicted = 0.0 if dense else 0.004 * math.exp(rng.gauss(0, 0.9)) * (0.6 + 0.3 * block)
            decay = rng.uniform(2.5, 4.5)
            plain = [(1 - i / 32) ** (decay / 1.6) for i in range(33)]
            weighted = [(1 - i / 32) * math.exp(-decay * 2.4 * i / 32) for i in range(33)]
            layers.append(
                {
                    "name": name,
                    "shape": [out, inputs],
                    "structure": structure,
                    "size": size,
                    "params_before": total,
                    "params_after": after,
                    "bytes_before": 4 * total,
                    "bytes_after": 4 * after,
                    "flops_before": 2 * total,
                    "flops_after": 2 * after,
                    "predicted": predicted,
                    "measured": 0.0 if dense else predicted * math.exp(rng.gauss(-0.05, 0.12)),
                    "relative": 0.0 if dense else min(1.0, 0.05 + 3 * predicted),
                    "effective_rank": smaller / decay,
                    "gram_rank": inputs - rng.randrange(12),
                    "spectrum": {"plain": plain, "weighted": weighted},
                    "joint": joint,
                }
            )
    before, after = sum(x["params_before"] for x in layers), sum(x["params_after"] for x in layers)
    rest = 12_095_616
    held_out = {
        "texts": 812,
        "mean": 0.9523,
        "p5": 0.9011,
        "relative_error": 0.3087,
        "rank_correlation": 0.9512,
        "neighbours": 0.8131,
    }
    return {
        "schema": 1,
        "gramian_version": "0.1.0",
        "command": "compress",
        "model": {
            "source": "models/all-MiniLM-L6-v2",
            "class": "BertModel",
            "parameters": before + rest,
            "load": [
                "import gramian",
                "from transformers import AutoModel",
                'model = AutoModel.from_pretrained("small")',
            ],
        },
        "settings": {
            "keep": keep,
            "cost": "params",
            "structures": ["skeleton", "block_low_rank", "neurons"],
            "objective": "features",
            "heal": 600,
            "seed": 0,
            "calibration": {
                "source": "pydoc_data.topics, 60 % of the paragraphs",
                "texts": 1240,
                "tokens": 98_304,
                "fingerprint": "sha256:5f0c7bb1a3e94a20",
            },
        },
        "budget": {"cost": "params", "keep": keep, "asked": int(before * keep), "used": after},
        "kept": {"layers": after / before, "model": (after + rest) / (before + rest)},
        "size": {
            "params_before": before,
            "params_after": after,
            "bytes_before": 4 * before,
            "bytes_after": 4 * after,
            "flops_before": 2 * before,
            "flops_after": 2 * after,
            "model_params_before": before + rest,
            "model_params_after": after + rest,
            "file_before": 4 * (before + rest) + 70_000,
            "file_after": 4 * (after + rest) + 90_000,
        },
        "quality": {
            "metric": "cosine of sentence embeddings",
            "held_out": held_out,
            "before_healing": {**held_out, "mean": 0.9338, "p5": 0.8702, "relative_error": 0.3639},
        },
        "speed": [
            {"batch": 16, "tokens": 128, "before_ms": 412.3, "after_ms": 287.9},
            {"batch": 1, "tokens": 16, "before_ms": 9.81, "after_ms": 8.02},
        ],
        "layers": layers,
        "left_alone": [
            {"name": "embeddings.word_embeddings", "reason": "an embedding; pass --embeddings to include it"},
            {"name": "pooler.dense", "reason": "not used by the outputs that calibration saw"},
        ],
        "warnings": ["encoder.layer.2.output.dense: 98,304 tokens for a Gram of 1,536: shrunk by 0.01"],
        "heal": {
            "steps": 600,
            "loss": [[s, 0.066 + 0.07 * math.exp(-s / 110) + rng.gauss(0, 0.0015)] for s in range(0, 601, 10)],
        },
        "times": {
            "collect": 21.4,
            "plan": 9.7,
            "fit": 6.2,
            "heal": 118.0,
            "evaluate": 8.3,
            "save": 0.9,
            "total": 164.5,
        },
        "environment": {"python": "3.11.2", "torch": "2.13.0", "platform": "Linux x86_64", "threads": 2},
    }


@pytest.fixture(scope="module")
def report() -> dict:
    return example()


def edited(report: dict, **changes: object) -> dict:
    return {**copy.deepcopy(report), **changes}


# The schema ----------------------------------------------------------------------------------------------------------


def test_the_example_and_its_json_are_valid(report):
    gramian.report.validate(report)
    gramian.report.validate(json.loads(json.dumps(report)))


def test_the_schema_describes_every_key_of_the_example(report):
    def compare(value: object, rule: dict, where: str) -> None:
        if isinstance(value, dict) and "properties" in rule:
            assert set(value) <= set(rule["properties"]), where
            for name in value:
                compare(value[name], rule["properties"][name], f"{where}.{name}")
        if isinstance(value, list) and value and "items" in rule:
            compare(value[0], rule["items"], f"{where}[]")

    compare(report, gramian.report.schema(), "report")


def at(report: dict, path: str) -> tuple[object, object]:
    """The container of what `path` names, and its key there."""
    *walk, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in walk:
        report = report[part]
    return report, last


@pytest.mark.parametrize(
    "path", ["schema", "budget.used", "kept.model", "layers.3.predicted", "speed.1.after_ms", "quality.held_out.mean"]
)
def test_a_missing_key_is_named(report, path):
    broken = copy.deepcopy(report)
    container, key = at(broken, path)
    del container[key]
    where = path.rpartition(".")[0].replace(".3", "[3]").replace(".1", "[1]")
    with pytest.raises(GramianError, match=re.escape(f"{f'report.{where}' if where else 'report'} lacks {key!r}")):
        gramian.report.validate(broken)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("budget.used", 1.5, "report.budget.used is float '1.5', expected integer"),
        ("budget.used", True, "report.budget.used is bool 'True', expected integer"),
        ("budget.cost", "euros", "report.budget.cost is 'euros', expected one of 'params'"),
        ("layers.0.shape", [3], "report.layers[0].shape has 1 items, expected 2"),
        ("layers.0.measured", "small", "expected number or null"),
        ("layers.0.joint", "another", "expected array"),
        ("schema", 2, "report.schema is 2"),
    ],
)
def test_a_wrong_value_is_named(report, path, value, message):
    broken = copy.deepcopy(report)
    container, key = at(broken, path)
    container[key] = value
    with pytest.raises(GramianError, match=re.escape(message)):
        gramian.report.validate(broken)


@pytest.mark.parametrize(
    "path", ["quality.held_out", "heal", "size.file_after", "layers.0.spectrum", "layers.0.relative"]
)
def test_what_may_be_null_may_be_null(report, path):
    changed = copy.deepcopy(report)
    container, key = at(changed, path)
    container[key] = None
    gramian.report.validate(changed)


# Numbers and text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001234, "0.00123"),
        (12.345, "12.3"),
        (4.561e-7, "4.56e-7"),
        (12345, "12,345"),
        (0.0, "0"),
        (9.999, "10.0"),
        (999.96, "1,000"),
        (1.5e9, "1.50e9"),
        (-0.5, "-0.500"),
        (math.nan, page.NOTHING),
        (-math.inf, page.NOTHING),
        (None, page.NOTHING),
    ],
)
def test_number(value, text):
    assert page.number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (10_616_832, "", "10.6 M"),
        (999_950, "", "1.0 M"),
        (949, "", "949"),
        (42_467_328, "B", "42.5 MB"),
        (0, "B", "0 B"),
    ],
)
def test_count(value, unit, text):
    assert page.count(value, unit).replace("\N{NO-BREAK SPACE}", " ") == text


def test_shorten_keeps_both_ends():
    assert page.shorten("a" * 50 + "b" * 50, 21) == "a" * 10 + "…" + "b" * 10
    assert page.shorten("short", 21) == "short"


def test_groups_and_blocks_of_names():
    assert compress_page.group_of("encoder.layer.11.output.dense") == "encoder.layer.*.output.dense"
    assert compress_page.block_of("encoder.layer.11.output.dense") == "encoder.layer.11"
    assert compress_page.block_of("h.3.mlp.experts.7.up") == "h.3"
    assert compress_page.block_of("classifier.dense") == "classifier"
    assert compress_page.block_of("fc1") == "fc1"
    assert compress_page.common_prefix(["a.b.c", "a.b.d", "a.b.cc.e"]) == "a.b."
    assert compress_page.common_prefix(["only.one"]) == ""


def test_rank_correlation_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    first = [rng.randrange(8) for _ in range(40)]
    second = [value + rng.randrange(6) for value in first]
    found = compress_page._rank_correlation(first, second)
    assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("most", [3, 6])
def test_ticks_are_few_round_and_inside(log, most):
    rng = random.Random(2)
    for _ in range(300):
        low = 10 ** rng.uniform(-9, 5)
        high = low * 10 ** rng.uniform(0.05 if not log else 1.0, 8)
        ticks = charts._ticks(low, high, most, log)
        assert 1 <= len(ticks) <= most + 3
        assert all(low * (1 - 1e-6) <= value <= high * (1 + 1e-6) for value, _ in ticks)
        labels = [label for _, label in ticks]
        assert len(set(labels)) == len(labels), (low, high, labels)
        for value, label in ticks:
            assert float(label.replace(",", "")) == pytest.approx(value, rel=0.006), (low, high, label)


# The page ------------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and gathers the text and the tags."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts).replace("\N{NO-BREAK SPACE}", " ")


def test_page_is_whole_and_says_what_matters(report):
    text = compress_page.render(report)
    reader = Reader(text)
    kept = report["kept"]
    for wanted in (
        "all-MiniLM-L6-v2, compressed",
        f"{100 * kept['layers']:.1f} %",
        f"{100 * kept['model']:.1f} %",
        f"{report['budget']['asked']:,} parameters",
        "0.9523",
        "1.43\N{MULTIPLICATION SIGN}",
        "4.intermediate.dense",
        "with intermediate.dense",
        "rank 96",
        "shrunk by 0.01",
        "pooler.dense",
        "sha256:5f0c7bb1a3e94a20",
        'model = AutoModel.from_pretrained("small")',
    ):
        assert wanted in reader.text, wanted
    curves = [attributes for tag, attributes in reader.tags if attributes.get("class") == "curve"]
    assert len(curves) == 2 * len(report["layers"]) + 1
    points = [attributes for tag, attributes in reader.tags if attributes.get("class") == "point"]
    assert len(points) == sum(layer["structure"] != "dense" for layer in report["layers"])


def test_page_reaches_for_nothing_outside(report):
    reader = Reader(compress_page.render(report))
    text = compress_page.render(report)
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttp", text)
    links = [value for _, attributes in reader.tags for name, value in attributes.items() if name in {"href", "src"}]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>"\'&\x1b[31m[red]\x00\ud800'


def poisoned(value: object) -> object:
    """`value` with hostile text in every string that is free."""
    if isinstance(value, dict):
        fixed = {"cost", "command"}
        return {key: item if key in fixed else poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_hostile_text_stays_text(report):
    text = compress_page.render(poisoned(report))
    reader = Reader(text)
    text.encode()
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.tags)
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "broken" in reader.text
    Reader(page.page(HOSTILE, HOSTILE, [(HOSTILE, page.table([HOSTILE], [[HOSTILE]]))] * 3))


@pytest.mark.parametrize("cost", ["params", "bytes", "flops"])
def test_page_without_anything_optional(report, cost):
    bare = edited(report, speed=[], heal=None, left_alone=[], warnings=[])
    bare["budget"]["cost"] = bare["settings"]["cost"] = cost
    bare["quality"].update(held_out=None, before_healing=None)
    bare["size"].update(file_before=None, file_after=None)
    bare["times"] = {"total": None}
    del bare["model"]["load"]
    for layer in bare["layers"]:
        layer.update(predicted=None, measured=None, relative=None, effective_rank=None, gram_rank=None, spectrum=None)
    gramian.report.validate(bare)
    reader = Reader(compress_page.render(bare))
    assert "not measured" in reader.text
    assert "Neither was computed" in reader.text
    assert "None" not in reader.text
    assert "from_pretrained" not in reader.text
    terminal.summary(bare, Console(file=io.StringIO(), width=80))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e300])
def test_odd_numbers_show_and_do_not_break(report, bad):
    odd = copy.deepcopy(report)
    odd["kept"].update(layers=bad, model=bad)
    odd["quality"]["held_out"].update(mean=bad, p5=bad, relative_error=bad)
    odd["speed"][0].update(before_ms=bad, after_ms=bad)
    odd["heal"]["loss"] = [[0, bad], [1, 1.0], [2, bad]]
    for layer in odd["layers"]:
        layer.update(predicted=bad, measured=bad, relative=bad, effective_rank=bad)
        layer["spectrum"]["plain"][3] = bad
        layer["spectrum"]["weighted"] = [bad] * 33
    text = compress_page.render(odd)
    Reader(text)
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S)
    )
    terminal.summary(odd, Console(file=io.StringIO(), width=80))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_few_layers(report, layers):
    few = edited(report, layers=report["layers"][:layers])
    text = Reader(compress_page.render(few)).text
    assert f"{layers} linear layer{'s' if layers != 1 else ''} of" in text
    terminal.summary(few, Console(file=io.StringIO(), width=80))


@pytest.mark.parametrize(("blocks", "length"), [(50, 0), (500, 300)])
def test_a_large_model_gives_a_page_below_a_megabyte_that_says_what_it_leaves_out(blocks, length):
    large = example(blocks)
    for layer in large["layers"]:
        layer["name"] = layer["name"].replace("dense", "dense" + "<" * length)
    large["left_alone"] = [{"name": f"<embedding>.{i}", "reason": f"reason {i % 90}"} for i in range(2000)]
    large["warnings"] = ["<warning>" * 100] * 400
    large["heal"]["loss"] = [[step, 1 / (step + 1)] for step in range(50_000)]
    text = compress_page.render(large)
    assert len(text.encode()) < 1_000_000
    words = Reader(text).text
    assert f"Of {6 * blocks} layers, the 48 with the largest predicted error are shown" in words
    assert f"{blocks - 48} more blocks are not shown" in words
    assert "350 more warnings are in report.json" in words
    assert "50 more reasons are in report.json" in words
    assert (f"The 500 largest of {6 * blocks} layers are shown" in words) == (blocks > 100)


def test_text_has_contrast_in_both_themes():
    themes = re.findall(r":root\{(.*?)\}", page._STYLE, flags=re.S)

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert len(themes) == 3  # light, dark, paper
    for theme in themes:
        colour = dict(re.findall(r"--([\w-]+):#(\w+)", theme))
        for text, ground in (("ink", "paper"), ("muted", "paper"), ("muted", "surface"), ("accent", "paper")):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        assert contrast(colour["ink"], colour["warn-paper"]) >= 4.5
        for index in range(7):
            assert contrast(colour[f"c{index}"], colour["surface"]) >= 2.9, index


# The page in a browser -----------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def browse(folder: Path, text: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the browser wrote to the console (errors, refused requests)."""
    (folder / "report.html").write_text(text, "utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def instrumented(text: str, script: str) -> str:
    return text.replace("</body>", f"<script>{script}</script></body>")


@browser
def test_the_browser_notices_what_these_tests_look_for(tmp_path):
    """The tests below would see a script that fails and a page that reaches out."""
    bad = '<img src="http://127.0.0.1:9/x.png">'
    _, console = browse(tmp_path, instrumented(page.page("t", "s", [("a", bad)]), "undefinedFunction()"))
    assert any("Content Security Policy" in line for line in console)
    assert any("undefinedFunction" in line for line in console)


@browser
def test_in_a_browser_the_page_runs_sorts_and_fits_a_phone(report, tmp_path):
    mixed = copy.deepcopy(report)
    mixed["layers"][7]["predicted"] = math.nan
    text = compress_page.render(mixed)
    script = """
    const table = document.querySelector("table[data-sortable]"), found = {};
    const heads = [...table.tHead.rows[0].cells];
    const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText.split("\\n")[0]);
    const click = text => heads.find(head => head.textContent.startsWith(text)).querySelector("button").click();
    click("Predicted"); found.ascending = names();
    found.state = heads.map(head => head.getAttribute("aria-sort")).filter(Boolean);
    click("Predicted"); found.descending = names();
    click("Layer"); found.layer = names();
    const frame = document.createElement("iframe");
    frame.style = "width:380px;height:700px;border:0";
    frame.srcdoc = document.documentElement.outerHTML.replaceAll(/<script>[^]*?<\\/script>/g, "");
    frame.onload = () => {
      const inner = frame.contentDocument.documentElement;
      found.phone = [inner.scrollWidth, frame.contentWindow.innerWidth, inner.querySelectorAll("tbody tr").length];
      const style = getComputedStyle(document.body);
      found.colours = [style.color, style.backgroundColor];
      document.body.dataset.found = JSON.stringify(found);
    };
    document.body.append(frame);
    """
    document, console = browse(tmp_path, instrumented(text, script))
    assert console == []
    attributes = next(attributes for tag, attributes in Tags(document).tags if tag == "body")
    found = json.loads(attributes["data-found"])
    ready = [a["data-sortable"] for tag, a in Tags(document).tags if tag == "table" and "data-sortable" in a]
    assert ready
    assert set(ready) == {"ready"}

    def key(layer: dict) -> float:
        return layer["predicted"]

    def short(layers: list[dict]) -> list[str]:
        return [layer["name"].removeprefix("encoder.layer.") for layer in layers]

    known = sorted((layer for layer in mixed["layers"] if math.isfinite(layer["predicted"])), key=key)
    unknown = mixed["layers"][7]
    assert found["ascending"] == short([*known, unknown])
    assert found["descending"] == short([*reversed(known), unknown])
    assert found["state"] == ["ascending"]
    assert found["layer"] == sorted(short(mixed["layers"]))
    width, available, rows = found["phone"]
    assert rows >= 36
    assert width <= available == 380
    assert len(set(found["colours"])) == 2


class Tags(html.parser.HTMLParser):
    """The tags of a document that a browser wrote."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


# The terminal --------------------------------------------------------------------------------------------------------


def printed(report: dict, width: int = 100) -> str:
    stream = io.StringIO()
    terminal.summary(report, Console(file=stream, width=width))
    return stream.getvalue().replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_closing_table_fits_and_always_says_kept_twice(report, width):
    text = printed(report, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    kept = report["kept"]
    layers, model = (f"{100 * kept[which]:.1f} % of the" for which in ("layers", "model"))
    assert f"Kept: {layers} chosen layers (parameters), {model} whole" in words
    for wanted in (
        f"{report['budget']['asked']:,}",
        ": met",
        "0.9523",
        "1.43\N{MULTIPLICATION SIGN}",
        "68.6 MB",
        "4 neurons, 2",
        "shrunk by",
    ):
        assert wanted in words, wanted


def test_the_closing_table_warns_of_a_budget_that_was_not_met(report):
    over = copy.deepcopy(report)
    over["budget"]["used"] = over["budget"]["asked"] + 1
    assert "NOT met" in printed(over)
    assert "NOT met" in Reader(compress_page.render(over)).text


def test_hostile_text_does_not_reach_the_terminal(report):
    text = printed(poisoned(report))
    assert "\x1b" not in text
    assert "[red]" in text  # shown, not taken for markup
    text.encode()
