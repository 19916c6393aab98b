"""A GGUF file as a checkpoint folder again: the same configuration, weights and tokens."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import melt_edge
from conftest import MakeCheckpoint, MakeGGUF
from melt_edge.checkpoint import Checkpoint
from melt_edge.config import LoopConfig
from melt_edge.errors import FormatError
from melt_edge.export.from_gguf import checkpoint_from_gguf
from melt_edge.models import shipped_model_path
from tiny import tiny_config

TEXTS = ("What is 12 plus 30?", "<|im_start|>user\nA1b2  c<|im_end|>\n", "über\t  \n\n123'll don't", " ", "日本語 🙂")


@pytest.mark.parametrize("config", [tiny_config("melt"), tiny_config("ouro", tied=True)], ids=["melt", "ouro"])
def test_way_back(make_checkpoint: MakeCheckpoint, make_gguf: MakeGGUF, tmp_path: Path, config: LoopConfig) -> None:
    first = make_checkpoint(config)
    again = checkpoint_from_gguf(make_gguf(config), tmp_path / "again")
    with Checkpoint.open(first) as a, Checkpoint.open(again) as b:
        assert a.config == b.config
        assert set(a.tensors) == set(b.tensors)
        for name in a.tensors:
            np.testing.assert_array_equal(a.read(name), b.read(name))
        assert a.generation_config == {"do_sample": True, "eos_token_id": 2, **b.generation_config}
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (first, again)]
    for text in TEXTS:
        assert tokenizers[0].encode(text).ids == tokenizers[1].encode(text).ids


def test_tokens_of_the_shipped_model_are_llama_cpps(tmp_path: Path) -> None:
    folder = checkpoint_from_gguf(shipped_model_path(), tmp_path / "shipped")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with melt_edge.load(shipped_model_path(), n_ctx=64, n_threads=1) as model:
        for text in TEXTS:
            assert tokenizer.encode(text).ids == model.tokenize(text)


def test_a_quantised_file_is_refused(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"stored as Q8_0, expected F32, F16 or BF16"):
        checkpoint_from_gguf(make_gguf(tiny_config("melt"), "q8_0"), tmp_path / "again")
    assert not (tmp_path / "again").exists()
