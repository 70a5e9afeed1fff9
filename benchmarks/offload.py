"""A model larger than memory: a generated sharded Llama-shaped checkpoint is compressed block by block, killed once in the
middle and resumed; peak resident memory against the bar of 2 GB and one block.

python benchmarks/offload.py --gigabytes 4
python benchmarks/offload.py --gigabytes 4 --include "*.self_attn.*"    (a quarter of the time)

Work grows with the cube of the width a block and a block's bytes with its square, so the checkpoint is narrow and deep: about
9 CPU seconds a block of 512, of which 4 GB hold 645.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import write

TEXTS = 24


def save_tokenizer(directory: Path, texts: list[str]) -> int:
    """A word tokenizer; returns its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=8000, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    tokenizer.save_pretrained(directory)
    return int(raw.get_vocab_size())


def generate(directory: Path, gigabytes: float, hidden: int, texts: list[str]) -> dict[str, Any]:
    """Write a random checkpoint in bf16, a shard for every few blocks, without ever holding it in memory.

    Returns:
        blocks, bytes of the checkpoint and of one block.
    """
    from transformers import LlamaConfig

    intermediate = hidden * 11 // 4 // 64 * 64
    kv = hidden // 4
    vocabulary = save_tokenizer(directory, texts)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    block = 2 * sum(a * b for a, b in shapes.values())
    outside = 2 * 2 * vocabulary * hidden
    blocks = -(-int(gigabytes * 1e9 - outside) // block)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    weights: dict[str, str] = {}
    per_shard = max(1, int(200e6) // block)
    shards = 1 + -(-blocks // per_shard)

    def store(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))

    store(
        1,
        {
            "model.embed_tokens.weight": draw(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
            "lm_head.weight": draw(vocabulary, hidden),
        },
    )
    for number in range(shards - 1):
        tensors: dict[str, torch.Tensor] = {}
        for index in range(number * per_shard, min(blocks, (number + 1) * per_shard)):
            prefix = f"model.layers.{index}"
            tensors |= {f"{prefix}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        store(number + 2, tensors)
    index = {"metadata": {"total_size": blocks * block + outside}, "weight_map": weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {
        "blocks": blocks,
        "checkpoint_bytes": size,
        "block_bytes": block,
        "hidden": hidden,
        "vocabulary": vocabulary,
    }


RUN = """
import json, resource, sys, time
from pathlib import Path
from gramian.models.job import Job, Settings
model, text, out, threads, structures, include = sys.argv[1:7]
import torch
torch.set_num_threads(int(threads))
def progress(stage, done, total):
    print(f"{stage} {done}/{total} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB", flush=True)
settings = Settings(keep=0.5, structures=structures, include=(include,) if include != "*" else ())
job = Job(model, text, Path(out), settings, progress, offload=True)
report = job.run()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
print(json.dumps({"peak": peak, "cpu_seconds": round(cpu), "kept": report["kept"]["layers"], "times": report["times"]}))
"""


def main() -> None:
    """Measure and write benchmarks/results/offload.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument(
        "--hidden", type=int, default=512, help="a multiple of 256; the work grows with its cube per block"
    )
    parser.add_argument("--structures", default="skeleton", help="what competes in the plan")
    parser.add_argument("--include", default="*", help="only layers of this name are compressed (all are swept)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where the checkpoint and the result go (twice its size)")
    parser.add_argument("--kill", type=float, default=0.5, help="share of the fits after which the first run is killed")
    arguments = parser.parse_args()
    from gramian.models.data import python_topics

    texts = [text[:400] for text in python_topics().calibration[:TEXTS]]
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        model = folder / "model"
        model.mkdir()
        (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
        started = time.perf_counter()
        facts = generate(model, arguments.gigabytes, arguments.hidden, texts)
        print(f"generated {facts} in {time.perf_counter() - started:.0f} s", flush=True)
        command = [sys.executable, "-c", RUN, model, folder / "text.txt", folder / "out", arguments.threads]
        command = [str(part) for part in (*command, arguments.structures, arguments.include)]
        environment = {**os.environ, "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(arguments.threads)}
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert first.stdout is not None
        seen = peak = 0
        for line in first.stdout:
            print(line, end="", flush=True)
            if line[:1] != "{":
                stage, count, mib, _ = line.split()
                done, total = map(int, count.split("/"))
                peak, seen = int(mib) * 2**20, seen + 1
                if stage == "fit" and done >= arguments.kill * total:
                    first.send_signal(signal.SIGKILL)
                    break
        first.stdout.close()
        assert first.wait() == -signal.SIGKILL, "the first run ended before it was killed"
        assert not (folder / "out").exists()
        second = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        again = second.stdout.splitlines()
        result = json.loads(again[-1])
        repeated = [line for line in again if line.startswith("collect")]
        from transformers import AutoModelForCausalLM

        import gramian  # noqa: F401

        index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
        compressed = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
        small = AutoModelForCausalLM.from_pretrained(folder / "out") if arguments.gigabytes < 2 else None
        if small is not None:
            assert bool(small(torch.arange(8)[None]).logits.isfinite().all())
        highest = max(peak, result["peak"])
        bar = 2e9 + facts["block_bytes"]
        summary = {
            **facts,
            "compressed_bytes": compressed,
            "tensors": len(index["weight_map"]),
            "peak_bytes_first": peak,
            "peak_bytes_second": result["peak"],
            "bar_bytes": bar,
            "within": highest <= bar,
            "collected_again": len(repeated) > facts["blocks"],
            **{key: result[key] for key in ("cpu_seconds", "kept", "times")},
        }
        summary["include"] = arguments.include
        print(json.dumps(summary, indent=1))
        write("offload", summary)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
