"""Shared fixtures: a tiny text encoder with its tokenizer, made on the spot."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Forms of products are then chosen by counting, on a machine with a calibration as on one without.
os.environ["GRAMIAN_CACHE"] = str(Path(tempfile.gettempdir()) / "gramian-tests-without-a-calibration")

import pytest
import torch

from gramian.models.data import python_topics


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return python_topics().calibration[:60]


@pytest.fixture(scope="session")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Hugging Face directory: BERT of two blocks (64 wide, 4 heads, 128 neurons) and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=500, special_tokens=special))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=raw.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=256,
        hidden_dropout_prob=0.1,
    )
    model = BertModel(config).eval()
    with torch.no_grad():  # a random model's neurons matter equally; make some matter more, as training does
        for layer in model.encoder.layer:
            layer.intermediate.dense.weight.mul_(torch.linspace(0.1, 12, 128)[torch.randperm(128), None])
    directory = tmp_path_factory.mktemp("models") / "encoder"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def encoder(encoder_directory: Path) -> torch.nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(encoder_directory).eval()


@pytest.fixture
def tokenizer(encoder_directory: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(encoder_directory)
