"""A model on disk, worked on block by block, gives what the model in memory gives; and its depth needs no memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import launcher, listing
from gramian.errors import GramianError
from gramian.models.blocks import Blocks, Shards, find_blocks, meta_parameters, resident, sources
from gramian.models.job import Job, Settings


def save_tokenizer(directory: Path, texts: list[str], words: int) -> int:
    """A word tokenizer for a causal model; returns its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=words, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    tokenizer.save_pretrained(directory)
    return raw.get_vocab_size()


def save_llama(
    directory: Path, texts: list[str], *, dtype: torch.dtype = torch.float32, shards: str = "200KB", **options: Any
) -> Path:
    """A random Llama-shaped checkpoint in many shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **options,
    }
    config = LlamaConfig(vocab_size=save_tokenizer(directory, texts, 300), pad_token_id=0, eos_token_id=2, **shape)
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(torch.linspace(0.1, 12, config.intermediate_size)[:, None].to(dtype))
    model.save_pretrained(directory, max_shard_size=shards)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", texts)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    file = tmp_path_factory.mktemp("short") / "text.txt"
    file.write_text("\n\n".join(text[:160] for text in texts[:60]), encoding="utf-8")
    return file


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def compare(out: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """The same plan and, up to rounding, the same weights and features."""
    a, b = (json.loads((d / "plan.json").read_text()) for d in (out, reference))
    for one, other in zip(a["entries"], b["entries"], strict=True):
        assert {**one, "predicted": 0} == {**other, "predicted": 0}
        assert one["predicted"] == pytest.approx(other["predicted"], rel=1e-4, abs=1e-12)
    found, expected = tensors(out), tensors(reference)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        difference = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-30)
        assert difference <= tolerance, (name, float(difference))
    config = [json.loads((d / "config.json").read_text()) for d in (out, reference)]
    assert config[0] == config[1]
    assert {p.name for p in out.iterdir() if p.suffix != ".safetensors"} - {"model.safetensors.index.json"} == {
        p.name for p in reference.iterdir() if p.suffix != ".safetensors"
    } - {"model.safetensors.index.json"}
    reports = [json.loads((d / "report.json").read_text()) for d in (out, reference)]
    for key in ("kept", "budget", "left_alone"):
        assert reports[0][key] == reports[1][key]
    for one, other in zip(*(report["layers"] for report in reports), strict=True):
        assert set(one) == set(other)
        assert one["relative"] == pytest.approx(other["relative"], rel=1e-3, abs=1e-9)
        assert one["gram_rank"] == other["gram_rank"]
    language = [report["language"] for report in reports]
    if all(language):
        for key in ("perplexity_before", "perplexity_after", "divergence", "same_token"):
            assert language[0][key] == pytest.approx(language[1][key], rel=1e-4, abs=1e-6), key
    mean = [report["quality"]["held_out"]["mean"] for report in reports]
    assert mean[0] == pytest.approx(mean[1], abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(keep=0.5),
        Settings(keep=0.6, objective="none"),
        Settings(keep=0.3, cost="bytes", embeddings=True, exclude=("*.1.self_attn.*",)),
    ],
    ids=["labels", "inputs", "bytes"],
)
def test_the_same_as_in_memory(settings: Settings, llama: Path, short: Path, tmp_path: Path) -> None:
    Job(str(llama), str(short), tmp_path / "whole", settings).run()
    Job(str(llama), str(short), tmp_path / "out", settings, offload=True).run()
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    compare(tmp_path / "out", tmp_path / "whole")
    from transformers import AutoModelForCausalLM

    import gramian  # noqa: F401

    ids = torch.randint(0, 200, (2, 9))
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / d)(ids).logits for d in ("out", "whole")]
    assert torch.allclose(*logits, atol=1e-4)


RUN = """
import os, signal
from pathlib import Path
from gramian.models.job import Job, Settings
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def dying(*args, rename=os.rename, left=[{renames}], **kwargs):
    left[0] -= 1
    if not left[0]:
        kill()
    return rename(*args, **kwargs)
os.rename = dying
{more}
Job({model!r}, {text!r}, Path({out!r}), Settings(keep=0.5), offload=True).run()
raise SystemExit(0)
"""


def test_killed_again_and_again(llama: Path, short: Path, tmp_path: Path) -> None:
    """Every life ends after a number of new files; the run still ends, with the bytes of an uninterrupted one."""
    launch = launcher()
    whole, out = tmp_path / "whole", tmp_path / "out"
    Job(str(llama), str(short), whole, Settings(keep=0.5), offload=True).run()
    lives = 0
    while not out.exists():
        lives += 1
        assert lives < 20
        code = RUN.format(renames=25, more="", model=str(llama), text=str(short), out=str(out))
        done = launch("--version", before=code)
        assert done.code in (0, -signal.SIGKILL), done.err
        assert done.code == 0 or not out.exists()
    assert lives > 2
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    found, expected = listing(out), listing(whole)
    assert set(found) == set(expected)
    assert not [name for name in found if name not in ("report.json", "report.html") and found[name] != expected[name]]


def test_what_is_done_is_not_done_again(llama: Path, short: Path, tmp_path: Path) -> None:
    """Killed after the Grams of one block of the second sweep: no block is swept again, and the others' Grams stay."""
    out = tmp_path / "out"
    options = {"model": str(llama), "text": str(short), "out": str(out)}
    after = """
import gramian.models.offload as offload
def collect(*args, real=offload.collect_layers, calls=iter(range(100)), **kwargs):
    return kill() if next(calls) == 2 else real(*args, **kwargs)
offload.collect_layers = collect
"""
    assert launcher()("--version", before=RUN.format(renames=10**6, more=after, **options)).code == -signal.SIGKILL
    (work,) = tmp_path.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in (work / "grams").iterdir()}
    assert sorted(kept) == ["00002.sealed", "late.sealed"]
    never = "import gramian.models.offload as offload\noffload.Offload._sweep = kill\noffload.Offload.measure = kill\n"
    assert launcher()("--version", before=RUN.format(renames=10**6, more=never, **options)).code == -signal.SIGKILL
    now = {path.name: path.stat().st_mtime_ns for path in (work / "grams").iterdir()}
    assert len(now) == 5
    assert {name: now[name] for name in kept} == kept
    # States go when nothing needs them any more; the last of the held-out texts measure the language model at the end.
    assert {path.name[:10] for path in (work / "hidden").iterdir()} == {"held-00003"}


MEMORY = """
import json, resource
from pathlib import Path
from gramian.models.job import Job, Settings
import gramian.models.job as job
settings = Settings(keep=0.5, include=("*.k_proj",), structures="skeleton")
Job({model!r}, {text!r}, Path({out!r}), settings, offload={offload}).run()
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
Path({note!r}).write_text(str(peak * 1024))
raise SystemExit(0)
"""


def test_memory_does_not_grow_with_depth(texts: list[str], tmp_path: Path) -> None:
    """A checkpoint of 180 MB (360 MB in float32) takes hardly more memory than one of 45 MB."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(t[:100] for t in texts[:12]), encoding="utf-8")
    peaks, sizes = {}, {}
    for depth in (8, 32):
        model = save_llama(
            tmp_path / f"llama{depth}", texts, dtype=torch.bfloat16, num_hidden_layers=depth, shards="20MB", **shape
        )
        sizes[depth] = Shards(model).nbytes
        note = tmp_path / "peak"
        code = MEMORY.format(
            model=str(model), text=str(text), out=str(tmp_path / f"out{depth}"), offload=True, note=str(note)
        )
        done = launcher()("--version", before=code)
        assert done.code == 0, done.err
        peaks[depth] = int(note.read_text())
    assert sizes[8] > 40e6
    # In float32, what is new would be twice as many bytes; an allocator keeps some of what it was given back.
    assert peaks[32] - peaks[8] < 0.25 * (sizes[32] - sizes[8]), (peaks, sizes)


def test_half_precision_is_widened_and_written_as_it_was(texts: list[str], short: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "llama", texts, dtype=torch.bfloat16)
    Job(str(model), str(short), tmp_path / "out", Settings(keep=0.5), offload=True).run()
    found = tensors(tmp_path / "out")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.bfloat16}
    wide = save_llama(tmp_path / "wide", texts)
    with torch.no_grad():
        from transformers import LlamaForCausalLM

        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(wide)
    Job(str(wide), str(short), tmp_path / "whole", Settings(keep=0.5)).run()
    quality = [json.loads((tmp_path / d / "report.json").read_text())["quality"]["held_out"] for d in ("out", "whole")]
    assert quality[0]["mean"] == pytest.approx(quality[1]["mean"], abs=5e-3)


def test_max_memory_decides(llama: Path, short: Path, tmp_path: Path) -> None:
    def offloaded(memory: int | None) -> bool:
        return bool(Job(str(llama), str(short), tmp_path / "out", Settings(), max_memory=memory).check()["offload"])

    assert not offloaded(None)
    assert not offloaded(10**9)
    assert offloaded(10**5)


def test_an_encoder_with_tied_sentence_features(encoder_directory: Path, short: Path, tmp_path: Path) -> None:
    settings = Settings(keep=0.5, embeddings=True)
    Job(str(encoder_directory), str(short), tmp_path / "whole", settings).run()
    Job(str(encoder_directory), str(short), tmp_path / "out", settings, offload=True).run()
    compare(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "tied"])
def test_other_architectures(architecture: str, texts: list[str], short: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    directory = tmp_path / "model"
    if architecture == "tied":
        save_llama(directory, texts, tie_word_embeddings=True, num_hidden_layers=2)
    else:
        size = save_tokenizer(directory, texts, 300)
        torch.manual_seed(0)
        ends = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
        if architecture == "gpt2":
            config = GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=4, n_positions=64, **ends)
            GPT2LMHeadModel(config).save_pretrained(directory)
        else:
            shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
            config = Qwen2Config(vocab_size=size, num_hidden_layers=2, max_position_embeddings=64, **shape, **ends)
            Qwen2ForCausalLM(config).save_pretrained(directory)
    Job(str(directory), str(short), tmp_path / "whole", Settings(keep=0.5)).run()
    Job(str(directory), str(short), tmp_path / "out", Settings(keep=0.5), offload=True).run()
    compare(tmp_path / "out", tmp_path / "whole")


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(llama: Path, short: Path, out: Path, match: str, settings: Settings | None = None) -> None:
    with pytest.raises(GramianError, match=match):
        Job(str(llama), str(short), out, settings or Settings(), offload=True).run()
    assert not out.exists()
    assert not list(out.parent.glob(".out.*"))


def test_refusals(llama: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(llama, short, tmp_path / "out", "healing needs the whole model in memory", Settings(heal=3))
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = copy / index["weight_map"].pop(name)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, short, tmp_path / "out", "up_proj.weight' is not in the checkpoint")
    bad = load_file(file)
    bad[name][3, 5] = float("nan")
    save_file(bad, file, metadata={"format": "pt"})
    shutil.copy(llama / "model.safetensors.index.json", copy)
    refused(copy, short, tmp_path / "out", r"layers.1.mlp.up_proj: 1 of .* NaN or Inf")
    save_file({**bad, name: bad[name][:, :60].contiguous()}, file, metadata={"format": "pt"})
    refused(copy, short, tmp_path / "out", r"tensor .*up_proj.weight is \[128, 60\], config.json asks for \[128, 64\]")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GramianError, match="one process"):
        Job(str(llama), str(short), tmp_path / "out", Settings(), offload=True).check()


def test_blocks_that_are_no_chain_are_refused() -> None:
    from transformers import T5Config, T5EncoderModel

    class Plain(torch.nn.Module):
        def __init__(self, backwards: bool) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            self.backwards = backwards

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in reversed(self.blocks) if self.backwards else self.blocks:
                x = block(x)
            return x

    x = torch.randn(2, 4)

    def on_x(model: torch.nn.Module) -> Callable[[], Any]:
        return lambda: model(x)

    for backwards in (False, True):
        model = Plain(backwards)
        blocks = Blocks(model)
        if backwards:
            with pytest.raises(GramianError, match="in order|never ran"):
                blocks.check(on_x(model))
        else:
            blocks.check(on_x(model))
            assert torch.equal(blocks.enter(on_x(model)), x)
            h = torch.randn(2, 4)
            made = blocks.through(1, on_x(model), h)
            assert torch.equal(made, torch.nn.functional.linear(h, model.blocks[1].weight, model.blocks[1].bias))
            with blocks.ending(h):
                assert model(x) is h
            blocks.close()
            assert not torch.equal(model(x), x)
    with pytest.raises(GramianError, match="no repeated blocks"):
        find_blocks(torch.nn.Linear(3, 3))
    config = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    t5 = T5EncoderModel(config).eval()
    blocks = Blocks(t5)
    with pytest.raises(GramianError, match="hand on more than hidden states"):
        blocks.check(lambda: t5(torch.arange(5)[None]))


def test_skeletons_hold_no_values_and_take_them_for_a_while(llama: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    with meta_parameters():
        model = LlamaForCausalLM(AutoConfig.from_pretrained(llama))
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not torch.nn.Linear(2, 2).weight.is_meta
    shards = Shards(llama)
    where = sources(model, shards)
    names = [name for name in where if name.startswith("model.layers.1.")]
    with resident(model, names, shards, where):
        assert torch.equal(
            model.model.layers[1].mlp.up_proj.weight, tensors(llama)["model.layers.1.mlp.up_proj.weight"]
        )
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert all(p.is_meta for p in model.parameters())


def test_a_result_that_is_an_ordinary_model_is_written_as_one(llama: Path, short: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = Settings(keep=0.6, structures="neurons", objective="none", include=("*.mlp.*",))
    for out, offload in ((tmp_path / "whole", False), (tmp_path / "out", True)):
        Job(str(llama), str(short), out, settings, offload=offload).run()
    plain = Settings(keep=1.0, objective="none", include=("*.mlp.*",))
    Job(str(llama), str(short), tmp_path / "same", plain, offload=True).run()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    models = [
        AutoModelForCausalLM.from_pretrained(p)
        for p in (llama, tmp_path / "same", tmp_path / "whole", tmp_path / "out")
    ]
    with torch.no_grad():
        first, same, whole, out = (model(ids).logits for model in models)
    assert torch.allclose(first, same, atol=1e-5)
    assert torch.allclose(whole, out, atol=1e-4)
