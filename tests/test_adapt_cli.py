"""``gramian adapt`` as a person runs it: results, resumption to the same bytes, and bad input met at the door."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from commands import KILL, Launcher, Result, gramian, launcher, listing
from gramian.adapt import attach, recipe
from gramian.adapt.task import load_adapted, open_task, read_texts, split
from gramian.adapt.train import Examples, Training, _passes, evaluate, fine_tune
from gramian.errors import GramianError

transformers = pytest.importorskip("transformers")

PREPARE = "import gramian.adapt.job, transformers.models.llama.modeling_llama"


@pytest.fixture(scope="session")
def launch() -> Launcher:
    return launcher()


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory, encoder_directory: Path) -> Path:
    """A random causal language model of two blocks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n\n".join(texts[:24]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Texts whose label is whether they were given a marker word."""
    file = tmp_path_factory.mktemp("data") / "labels.jsonl"
    rows = []
    for i, line in enumerate(texts):
        words = line.split()[:10]
        marked = i % 2 == 0
        rows.append({"text": " ".join([*words[:3], "expression" if marked else "object", *words[3:]]),
                     "label": "yes" if marked else "no"})  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


LM = ("--steps", 12, "--batch", 4, "--max-length", 32, "--rate", 1e-2, "--rank", 4, "--every", 3)


@pytest.fixture(scope="session")
def first(llama_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(result, its JSON) of a run in an interpreter of its own."""
    out = tmp_path_factory.mktemp("first") / "tuned"
    done = gramian("adapt", llama_directory, "--data", text, *LM, "--merge", "--out", out, "--json")
    assert done.code == 0, done.err
    assert not done.err
    assert os.listdir(out.parent) == ["tuned"]  # the work directory is gone
    return out, json.loads(done.out)


def succeed(done: Result) -> Result:
    assert done.code == 0, done.err
    return done


# What a run gives ---------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_everything(first: tuple[Path, dict[str, Any]], llama_directory: Path) -> None:
    out, report = first
    assert report.pop("out") == str(out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["command"] == "adapt"
    layers = {row["name"]: row for row in report["layers"]}
    assert len(layers) == 14  # seven linear layers a block, not the head
    assert report["trainable"]["adapter"] == sum(4 * sum(row["shape"]) for row in layers.values())
    assert report["trainable"]["adapter"] == sum(row["trainable"] for row in layers.values())
    assert all(len(row["spectrum"]) == 4 for row in layers.values())
    held_out = report["training"]["held_out"]
    assert [step for step, _ in held_out] == [0, 3, 6, 9, 12]
    before, after = report["quality"]["before"], report["quality"]["after"]
    assert after["loss"] < before["loss"] - 0.05
    assert after["loss"] == pytest.approx(min(value for _, value in held_out), rel=1e-6)
    assert before["loss"] == pytest.approx(held_out[0][1], rel=1e-6)
    assert report["merged"]["worst_rounding_loss"] < 1e-5


def test_the_merged_model_loads_in_transformers_and_is_the_adapted_one(
    first: tuple[Path, dict[str, Any]], llama_directory: Path
) -> None:
    out, report = first
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    model, tokenizer, adapted = load_adapted(llama_directory, out)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama_directory).eval()
    ids = tokenizer(["the value of the expression"], return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs, base = (m(input_ids=ids).logits for m in (model.eval(), merged, plain))
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert (ours - base).abs().max() > 1e-2
        with adapted.disabled():
            assert torch.equal(model(input_ids=ids).logits, base)
    assert transformers.AutoTokenizer.from_pretrained(out / "merged")("the").input_ids == tokenizer("the").input_ids
    # The spectra are those of the weights' differences, and the merged weights are what the report says was kept.
    row = report["layers"][0]
    weights = [m.get_submodule(row["name"]).weight.detach().double() for m in (merged, plain)]
    values = torch.linalg.svdvals(weights[0] - weights[1])[:4]
    assert torch.allclose(values, torch.tensor(row["spectrum"], dtype=torch.float64), atol=1e-5)
    assert row["relative"] == pytest.approx(float(values.norm() / weights[1].norm()), rel=1e-3)


def test_peft_loads_what_was_written(first: tuple[Path, dict[str, Any]], llama_directory: Path) -> None:
    peft = pytest.importorskip("peft")
    out, report = first
    assert report["peft"] == {"written": True, "reason": ""}
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_directory)
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    ours, tokenizer, _ = load_adapted(llama_directory, out)
    ids = tokenizer(["a sequence of values"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, ours.eval()(input_ids=ids).logits, atol=1e-5)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.found += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data if self.tag not in ("script", "style") else ""


def test_the_page_stands_alone(first: tuple[Path, dict[str, Any]]) -> None:
    page = (first[0] / "report.html").read_text(encoding="utf-8")
    parser = Links()
    parser.feed(page)
    assert all(link.startswith(("#", "data:")) for link in parser.found)
    assert "nan" not in parser.text.lower()
    for heading in ("Loss", "Where the budget went", "Spectra of the updates", "Layers", "Load the result"):
        assert heading in parser.text
    for row in first[1]["layers"]:
        assert row["name"] in parser.text
    assert page.count("<figure>") >= 1 + len(first[1]["layers"])
    assert len(page) < 1_000_000


def test_classification_trains_a_new_head_beside_the_adapter(
    encoder_directory: Path, labelled: Path, launch: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    done = launch(
        "adapt", encoder_directory, "--data", labelled, "--recipe", "pissa", "--steps", 60, "--batch", 8, "--rate", 1e-2,
        "--patience", 0, "--merge", "--out", out, before=PREPARE,
    )  # fmt: skip
    succeed(done)
    assert "accuracy" in done.out
    assert "Merged" in done.out
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["labels"] == ["no", "yes"]
    assert report["trainable"]["head"] == 2 * 64 + 2
    assert report["quality"]["after"]["accuracy"] >= 0.8
    assert not any("classifier" in row["name"] for row in report["layers"])
    model, tokenizer, _ = load_adapted(encoder_directory, out)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    assert merged.config.id2label == {0: "no", 1: "yes"}
    batch = tokenizer(["the expression is here", "the object is here"], padding=True, return_tensors="pt")
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder_directory, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        ours = model.eval()(**batch).logits
        assert torch.allclose(ours, merged(**batch).logits, atol=1e-5)
        assert torch.allclose(ours, theirs(**batch).logits, atol=1e-4)


@pytest.mark.parametrize(
    "extra",
    [
        ("--recipe", "auto"),
        ("--recipe", "lora-sb", "--option", "step=0.001"),
        ("--recipe", "riemann-lora"),
        ("--recipe", "eva", "--include", "q_proj"),
        ("--recipe", "surm_circulant"),
        ("--recipe", "lora_dropout"),
        ("--recipe", "moe_lora", "--include", "*.mlp.*"),
    ],
    ids=lambda extra: extra[1],
)
def test_recipes_of_every_kind_run(
    extra: tuple[str, ...], llama_directory: Path, text: Path, launch: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    common = ("--steps", 4, "--batch", 4, "--max-length", 32, "--rank", 2, "--every", 2, "--rate", 1e-3)
    done = launch("adapt", llama_directory, "--data", text, *common, *extra, "--out", out, "--json", before=PREPARE)
    report = json.loads(succeed(done).out)
    assert report["trainable"]["adapter"] > 0
    model, tokenizer, _ = load_adapted(llama_directory, out)
    data = split(read_texts(text), tokenizer, longest=32, batch=4)
    assert evaluate(model, data.held_out) == pytest.approx(report["quality"]["after"]["loss"], rel=1e-6)
    if extra[1] == "auto":  # within the budget of plain LoRA
        sides = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 128)
        assert report["trainable"]["adapter"] <= 2 * 2 * sides  # two blocks, rank 2
    if extra[1] == "moe_lora":
        assert not report["peft"]["written"]
        assert report["layers"][0]["spectrum"] is None


def test_compress_then_adapt(llama_directory: Path, text: Path, launch: Launcher, tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "tuned"
    done = launch(
        "compress", llama_directory, "--data", text, "--keep", 0.6, "--structures", "low_rank", "--objective", "none",
        "--include", "*mlp*", "--out", small, before=PREPARE,
    )  # fmt: skip
    succeed(done)
    succeed(launch("adapt", small, "--data", text, *LM, "--merge", "--out", out, before=PREPARE))
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["after"]["loss"] < report["quality"]["before"]["loss"]
    assert report["merged"] is not None
    model, tokenizer, _ = load_adapted(small, out)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    ids = tokenizer(["a sequence of values"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)


# Killed -------------------------------------------------------------------------------------------------------------

PATCHED = KILL + "import gramian.adapt.job as job, gramian.adapt.train as train\n"
MOMENTS = {
    "before the start": "job.attach = kill",
    "after the start": "job.load = kill",
    "early": "train._schedule = on_call(2, train._schedule)",
    "after an evaluation": "train._schedule = on_call(4, train._schedule)",
    "late": "train._schedule = on_call(12, train._schedule)",
    "while saving": "job.AdaptJob._export = on_call(1, job.AdaptJob._export)",
    "before publishing": """
def publish(old, new, rename=os.rename):
    if os.path.basename(str(new)) == "tuned":
        kill()
    rename(old, new)
os.rename = publish""",
}
TIMED = {"report.json", "report.html"}


@pytest.mark.parametrize("name", ["riemann_lora", "lora_dropout"])
def test_a_killed_run_ends_with_the_same_bytes(
    name: str, llama_directory: Path, text: Path, launch: Launcher, tmp_path: Path
) -> None:
    """Riemannian LoRA: an optimizer with a state of its own, and a start from data; dropout: random numbers in training."""

    def command(folder: str) -> tuple[Any, ...]:
        return ("adapt", llama_directory, "--data", text, *LM, "--recipe", name, "--out", tmp_path / folder / "tuned")

    succeed(launch(*command("whole"), before=PREPARE))
    whole = listing(tmp_path / "whole" / "tuned")
    for i, (moment, code) in enumerate(MOMENTS.items()):
        if name == "lora_dropout" and moment not in ("early", "late"):
            continue
        done = launch(*command(str(i)), before=PREPARE + PATCHED + code)
        assert done.code == -signal.SIGKILL, (moment, done.err)
        assert not (tmp_path / str(i) / "tuned").exists()
        again = "job.attach = kill" if i else ""  # what is there is not made again
        succeed(launch(*command(str(i)), before=PREPARE + PATCHED + again))
        assert os.listdir(tmp_path / str(i)) == ["tuned"]
        found = listing(tmp_path / str(i) / "tuned")
        assert found.keys() == whole.keys()
        assert not [file for file in found if file not in TIMED and found[file] != whole[file]], moment
        reports = [json.loads(files["report.json"]) for files in (found, whole)]
        assert reports[0]["training"] == reports[1]["training"]


# At the door --------------------------------------------------------------------------------------------------------


def broken(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


GOOD = '{"text": "a", "label": "x"}\n'
DOOR: dict[str, tuple[Callable[[Path], tuple[Any, ...]], str]] = {
    "no such file": (lambda t: ("--data", t / "none.txt"), "no such file"),
    "empty": (lambda t: ("--data", broken(t, " \n")), "the file is empty"),
    "binary": (lambda t: ("--data", broken(t, b"\xff\xfe\x00")), "not UTF-8 text"),
    "too short": (lambda t: ("--data", broken(t, "a b c", "t.txt")), "fewer than two sequences of 64"),
    "malformed": (lambda t: ("--data", broken(t, GOOD + "{oops\n")), "data.jsonl, line 2: not JSON"),
    "no text": (lambda t: ("--data", broken(t, GOOD + '{"label": "x"}\n')), 'line 2: expected an object with a string'),
    "no label": (lambda t: ("--data", broken(t, GOOD + '{"text": "b"}\n')), 'line 2: expected a string or whole number'),
    "one label": (lambda t: ("--data", broken(t, GOOD)), "one label only ('x')"),
    "recipe": (lambda t: ("--recipe", "pisa"), "--recipe 'pisa' (did you mean pissa"),
    "option": (lambda t: ("--option", "alpa=3"), "no option 'alpa' (did you mean alpha"),
    "option without value": (lambda t: ("--option", "alpha"), "expected NAME=VALUE"),
    "option of a wrong kind": (lambda t: ("--option", "alpha=big"), "wrong kind"),
    "rank": (lambda t: ("--rank", 20), "layers.0.self_attn.k_proj (16 x 32): rank 20; expected a whole number from 1 to 16"),
    "rank 0": (lambda t: ("--rank", 0), "--rank 0: expected 1 or more"),
    "no layer": (lambda t: ("--include", "q_prj"), "pattern 'q_prj' fits no layer (did you mean "),
    "rate": (lambda t: ("--rate", 0), "--rate 0: expected a learning rate above 0"),
    "too long": (lambda t: ("--max-length", 65), "the model takes at most 64 tokens"),
    "task": (lambda t: ("--task", "rank"), "--task 'rank'; expected one of lm, classify"),
    "ramp": (lambda t: ("--recipe", "singlora", "--steps", 10), "rises over 100 steps"),
    "no matrix": (lambda t: ("--recipe", "moe_lora", "--merge"), "changes a layer by no matrix"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOOR)
def test_bad_input_is_one_line_at_the_door(
    case: str, llama_directory: Path, text: Path, launch: Launcher, tmp_path: Path
) -> None:
    make, said = DOOR[case]
    extra = make(tmp_path)
    data = () if "--data" in extra else ("--data", text)
    before = set(tmp_path.iterdir())
    done = launch("adapt", llama_directory, *data, *extra, "--out", tmp_path / "tuned", "--dry-run", before=PREPARE)
    assert done.code == 2, done
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_other_doors(
    encoder_directory: Path, llama_directory: Path, text: Path, launch: Launcher, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    for model, out, said in (
        (encoder_directory, tmp_path / "new", "a causal language model is needed"),
        (llama_directory, full, "is not empty"),
        (tmp_path / "none", tmp_path / "new", "no such directory"),
    ):
        done = launch("adapt", model, "--data", text, "--out", out, "--json", before=PREPARE)
        assert done.code == 2
        assert said in done.err
        assert said in json.loads(done.out)["error"]
    done = launch("adapt", llama_directory, "--data", text, *LM, "--out", tmp_path / "new", "--dry-run", "--json")
    facts = json.loads(succeed(done).out)
    assert (facts["task"], facts["layers"], facts["steps"]) == ("lm", 14, 12)
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_refused_by_another_base(
    first: tuple[Path, dict[str, Any]], llama_directory: Path, tmp_path: Path
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(llama_directory)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "other")
    with pytest.raises(
        GramianError, match=r"another base model: 1 of 14 layers differ, first model.layers.1.mlp.up_proj"
    ):
        load_adapted(tmp_path / "other", first[0])


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys, gramian.cli.main; print('torch' in sys.modules, 'transformers' in sys.modules)"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]
    shown = gramian("adapt", "--help")
    assert "--recipe" in succeed(shown).out


# The loop ------------------------------------------------------------------------------------------------------------


def regression(seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))
    model.eval()
    target = nn.Linear(8, 3)
    xs = torch.randn(12, 10, 8)
    with torch.no_grad():
        return model, [(x, target(x)) for x in xs]


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_the_loop_leaves_the_base_alone_and_keeps_the_best() -> None:
    model, batches = regression()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = attach(model, recipe("lora"), rank=3)
    settings = Training(steps=40, rate=1e-2, every=5, patience=0)
    trained = fine_tune(adapted, batches[:9], batches[9:], settings, loss=squared)
    losses = dict(trained.held_out)
    assert losses[trained.best] == min(losses.values()) < losses[0]
    assert evaluate(model, batches[9:], squared) == losses[trained.best]
    assert not model.training
    adapted.detach()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # running statistics too


def test_accumulation_is_one_large_batch() -> None:
    """Micro-batches of unequal size weigh as their rows do."""
    results = []
    for passes in (1, 3):
        model, batches = regression()
        model[1], model[2] = nn.Identity(), nn.Identity()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        data = Examples(len(x), lambda places, x=x, y=y: (x[places], y[places]))  # type: ignore[misc]
        adapted = attach(model, recipe("lora"), rank=2)
        fine_tune(adapted, data, settings=Training(steps=5, batch=7, accumulate=passes, rate=1e-2), loss=squared)
        results.append(torch.cat([p.detach().flatten() for p in adapted.trainable_parameters()]))
    assert torch.allclose(*results, atol=1e-5)


def test_every_epoch_takes_every_example_once() -> None:
    settings = Training(batch=4, accumulate=3, seed=5)
    taken = [i for step in range(6) for indices, _ in _passes(step, 12, settings, ready=False) for i in indices]
    epochs = [taken[:12], taken[12:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert sum(share for _, share in _passes(0, 12, settings, ready=False)) == pytest.approx(1)


def test_early_stop_counts_evaluations() -> None:
    model, batches = regression()
    adapted = attach(model, recipe("lora"), rank=2)
    noise = [(x, 50 * torch.randn(10, 3)) for x, _ in batches[9:]]
    settings = Training(steps=60, rate=1e-1, every=2, patience=3)
    trained = fine_tune(adapted, batches[:9], [(-10 * x, y) for x, y in noise], settings, loss=squared)
    assert trained.stopped
    assert trained.losses[-1][0] == trained.best + 6


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model, batches = regression()
    adapted = attach(model, recipe("lora"), rank=2)
    batches[0] = (batches[0][0] * float("inf"), batches[0][1])
    with pytest.raises(GramianError, match=r"the loss became nan at step \d; lower the learning rate"):
        fine_tune(adapted, batches[:9], settings=Training(steps=9), loss=squared)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"clip": 0.0}, {"warm_up": 2.0}, {"batch": 0}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(GramianError, match=f"training: {next(iter(wrong))}"):
        Training(**wrong)


def test_the_held_out_tenth_is_disjoint_and_the_same_for_every_run(
    llama_directory: Path, encoder_directory: Path, text: Path, labelled: Path
) -> None:
    opened = open_task(llama_directory, "lm")
    data = split(read_texts(text), opened.tokenizer, longest=16, batch=4)
    train = {tuple(row) for row in data.train.take(list(range(data.train.count)))["input_ids"].tolist()}
    held_out = [tuple(row) for batch in data.held_out for row in batch["input_ids"].tolist()]
    assert not train & set(held_out)
    assert data.sequences == len(held_out)
    assert abs(data.sequences / (data.sequences + data.train.count) - 0.1) < 0.02
    texts = read_texts(labelled)
    assert texts.task == "classify"
    cut = split(texts, opened.tokenizer, longest=16, batch=4)
    labels = torch.cat([batch["labels"] for batch in cut.held_out]).bincount().tolist()
    assert labels == [3, 3]


def test_files_hold_only_what_is_named(first: tuple[Path, dict[str, Any]]) -> None:
    out, _ = first
    assert {p.name for p in out.iterdir()} == {
        "adapter.json", "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors", "merged", "report.html",
        "report.json", "task.json",
    }  # fmt: skip
    stored = load_file(out / "adapter.safetensors")
    assert sum(value.numel() for value in stored.values()) == first[1]["trainable"]["adapter"]
