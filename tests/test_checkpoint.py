"""Checkpoints: what is written is read back; every damage is one typed error that names file and tensor."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conftest import MakeCheckpoint
from melt_edge.checkpoint import Checkpoint, load_model, save_checkpoint
from melt_edge.errors import ConfigError, FormatError, SpecError
from melt_edge.weights import INDEX_FILE, WEIGHTS_FILE, bfloat16_bits
from tiny import tiny_checkpoint, tiny_config, tiny_tensors

# largest rounding error of a value of size up to 4
ROUNDING = {"F32": 0.0, "F16": 2.0**-9, "BF16": 2.0**-6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A one-file MELT checkpoint that the test may damage."""
    return tiny_checkpoint(tmp_path / "model", tiny_config("melt"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in three shards."""
    return tiny_checkpoint(tmp_path / "model", tiny_config("melt"), shards=3)


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    keys = json.loads(path.read_text())
    change(keys)
    path.write_text(json.dumps(keys))


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, model_type: str, dtype: str, shards: int, tied: bool) -> None:
    config = tiny_config(model_type, tied=tied, head_dim=16)
    folder = tiny_checkpoint(tmp_path / "model", config, seed=3, dtype=dtype, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) == shards
    with Checkpoint.open(folder) as checkpoint:
        assert replace(checkpoint.config, torch_dtype="float32") == config
        assert {info.dtype for info in checkpoint.tensors.values()} == {dtype}
        for name, expected in tiny_tensors(config, seed=3).items():
            found = checkpoint.read(name)
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() <= ROUNDING[dtype]
            assert np.array_equal(checkpoint.read_rows(name, 0, 1), found[:1])
            assert np.array_equal(checkpoint.read_rows(name, len(found) // 2, len(found)), found[len(found) // 2 :])


def test_other_writers_files_are_read(folder: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {name: t.to(torch.bfloat16) for name, t in load_torch(folder / WEIGHTS_FILE).items()}
    save_torch(tensors, folder / WEIGHTS_FILE)
    with Checkpoint.open(folder) as checkpoint:
        for name, tensor in tensors.items():
            assert np.array_equal(checkpoint.read(name), tensor.float().numpy())


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 1e3
    values[:4] = (0.0, -0.0, 1.00390625, 1.01171875)  # two ties, one to each side
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat16_bits(values), expected)


def test_the_whole_folder_is_there(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.generation_config["temperature"] == 0.7
        assert checkpoint.tokenizer_config["eos_token"] == "<|im_end|>"
        assert checkpoint.tokenizer_path == folder / "tokenizer.json"
        assert checkpoint.notes == []
        assert checkpoint.nbytes == sum(4 * t.size for t in tiny_tensors(tiny_config("melt")).values())


@pytest.mark.parametrize("tied", [False, True])
def test_load_model_has_the_checkpoints_weights(make_checkpoint: MakeCheckpoint, tied: bool) -> None:
    config = tiny_config("melt", tied=tied)
    model = load_model(make_checkpoint(config))
    assert not model.training
    state = model.state_dict()
    for name, expected in tiny_tensors(config).items():
        assert np.array_equal(state[name].numpy(), expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_trained_models_state_is_saved(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    config = tiny_config("ouro", tied=True)
    model = load_model(make_checkpoint(config))
    save_checkpoint(tmp_path / "again", config, model.state_dict())
    tokens = torch.arange(10)[None]
    assert torch.equal(load_model(tmp_path / "again")(tokens).logits, model(tokens).logits)
    with pytest.raises(ConfigError, match="exists already"):
        save_checkpoint(tmp_path / "again", config, model.state_dict())


def test_sha256_is_what_sha256sum_says(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.sha256() == hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_sha256_of_shards_and_its_progress(sharded: Path) -> None:
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    lines = [f"{hashlib.sha256((sharded / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    seen: list[tuple[int, int]] = []
    with Checkpoint.open(sharded) as checkpoint:
        found = checkpoint.scan(lambda done, total: seen.append((done, total)))
    assert found == hashlib.sha256("".join(lines).encode()).hexdigest()
    size = sum((sharded / name).stat().st_size for name in names)
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- damage --------------------------------------------------------------------------------------------


def refuses(folder: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert word in str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_reported_together(folder: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"], tensors["model.early_exit_gate.weight"]
        tensors["model.layers.0.surplus.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 64), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)

    edit_weights(folder, change)
    refuses(
        folder,
        SpecError,
        str(folder),
        "5 tensor(s)",
        "model.norm.weight: missing",
        "model.early_exit_gate.weight: missing",
        "surplus.weight: not a tensor",
        "shape [5, 64], expected [128, 64]",
        "dtype F64",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_nan_and_inf_name_every_tensor_and_file(tmp_path: Path, value: float, dtype: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("melt"), dtype=dtype)
    bad = ("model.norm.weight", "model.layers.1.mlp.down_proj.weight")
    with Checkpoint.open(folder) as checkpoint:
        raw = np.array([value], np.float32)
        bits = {"F32": raw, "F16": raw.astype(np.float16), "BF16": bfloat16_bits(raw)}[dtype].tobytes()
        data = bytearray((folder / WEIGHTS_FILE).read_bytes())
        for name in bad:
            at = checkpoint.tensors[name].offset + 7 * len(bits)
            data[at : at + len(bits)] = bits
    (folder / WEIGHTS_FILE).write_bytes(data)
    with Checkpoint.open(folder) as checkpoint:
        for name in bad:
            with pytest.raises(FormatError, match=name):
                checkpoint.read(name)
        with pytest.raises(FormatError) as caught:
            checkpoint.scan()
    assert "2 tensor(s) hold NaN or Inf" in str(caught.value)
    assert all(f"{WEIGHTS_FILE}: {name}" in str(caught.value) for name in bad)


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro", tied=True))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    with Checkpoint.open(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
        assert "left out" in checkpoint.notes[0]
    edit_weights(folder, lambda t: t["lm_head.weight"].__setitem__((300, 63), 9.0))
    refuses(folder, SpecError, "tie_word_embeddings is true", "lm_head.weight differs")


def test_an_untied_head_must_be_there(folder: Path) -> None:
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    refuses(folder, SpecError, "lm_head.weight: missing, expected shape [301, 64]")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5_000, -1])
def test_a_file_cut_short(folder: Path, keep: int) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:keep])
    refuses(folder, FormatError, WEIGHTS_FILE, "cut short")


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,16]}}',
        b'{"a":' * 2_000,
    ],
)
def test_a_broken_header(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises((FormatError, SpecError), match=r"safetensors|tensor\(s\)"):
        Checkpoint.open(folder)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        data = (folder / WEIGHTS_FILE).read_bytes()
        (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
        with pytest.raises(FormatError, match="cut short"):
            checkpoint.read("lm_head.weight")
        with pytest.raises(FormatError, match="cut short"):
            checkpoint.scan()
        (folder / WEIGHTS_FILE).unlink()
        with pytest.raises(FormatError, match="cannot be read"):
            checkpoint.read("lm_head.weight")


@pytest.mark.parametrize("disguise", ["torch zip", "plain pickle", "protocol 5"])
def test_a_pickle_in_disguise_is_refused_by_content(folder: Path, tmp_path: Path, disguise: str) -> None:
    file = folder / WEIGHTS_FILE
    if disguise == "torch zip":
        torch.save({"a": torch.zeros(3)}, tmp_path / "x.bin")
        assert zipfile.is_zipfile(tmp_path / "x.bin")
        shutil.copy(tmp_path / "x.bin", file)
    else:
        file.write_bytes(pickle.dumps({"a": list(range(100))}, protocol=2 if disguise == "plain pickle" else 5))
    refuses(folder, FormatError, WEIGHTS_FILE, "pickle", "convert")


def test_a_folder_of_pickles_says_what_to_do(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "pytorch_model.bin")
    refuses(folder, FormatError, "pytorch_model.bin", "pickle", "convert")


def test_not_a_checkpoint(tmp_path: Path, folder: Path) -> None:
    refuses(tmp_path / "nowhere", FormatError, "found nothing")
    refuses(folder / WEIGHTS_FILE, FormatError, "found a file")
    (folder / WEIGHTS_FILE).unlink()
    refuses(folder, FormatError, "no model.safetensors")
    (folder / "config.json").unlink()
    refuses(folder, ConfigError, "config.json", "cannot be read")


# --- shards --------------------------------------------------------------------------------------------


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuses(sharded, FormatError, "model-00002-of-00003.safetensors", "not there")


def test_a_shard_the_index_does_not_name(sharded: Path) -> None:
    shutil.copy(sharded / "model-00002-of-00003.safetensors", sharded / "model-00004-of-00004.safetensors")
    refuses(sharded, FormatError, "model-00004-of-00004.safetensors", "not named")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first = load_file(sharded / "model-00001-of-00003.safetensors")
    second = load_file(sharded / "model-00002-of-00003.safetensors")
    second["model.embed_tokens.weight"] = first["model.embed_tokens.weight"]
    save_file(second, sharded / "model-00002-of-00003.safetensors")
    refuses(sharded, FormatError, "model.embed_tokens.weight", "also in model-00001-of-00003.safetensors")


def test_an_index_that_disagrees_with_the_files(sharded: Path) -> None:
    def change(index: dict) -> None:
        index["weight_map"]["model.embed_tokens.weight"] = "model-00003-of-00003.safetensors"
        del index["weight_map"]["lm_head.weight"]

    edit_json(sharded / INDEX_FILE, change)
    refuses(
        sharded, FormatError, "2 entries disagree", "model.embed_tokens.weight", "lm_head.weight", "not in the index"
    )


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    refuses(sharded, FormatError, "3 weight files but no", INDEX_FILE)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": []}', "{}", '{"weight_map": {"a": 7}}'])
def test_an_index_of_another_kind(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    refuses(sharded, FormatError, INDEX_FILE)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "c:x", "a\0b"]
)
def test_an_index_that_points_outside(sharded: Path, name: str) -> None:
    edit_json(sharded / INDEX_FILE, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    refuses(sharded, FormatError, INDEX_FILE, "plain name")


def test_a_link_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS_FILE).rename(tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere.safetensors")
    refuses(folder, FormatError, "outside the checkpoint folder")


def test_the_hugging_face_caches_links_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--Looped-1B"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(folder.iterdir()):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    with Checkpoint.open(snapshot) as checkpoint:
        assert np.isfinite(checkpoint.read("lm_head.weight")).all()


# --- writing -------------------------------------------------------------------------------------------


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    config = tiny_config("ouro")
    good = tiny_tensors(config)
    for change, error, words in (
        ({"model.norm.weight": np.full(64, np.nan, np.float32)}, FormatError, "NaN or Inf"),
        ({"model.norm.weight": np.ones(63, np.float32)}, SpecError, r"shape \[63\]"),
        ({"surplus": np.ones(1, np.float32)}, SpecError, "surplus: not a tensor"),
    ):
        with pytest.raises(error, match=words):
            save_checkpoint(tmp_path / "model", config, {**good, **change})
    with pytest.raises(SpecError, match=r"lm_head\.weight: missing"):
        save_checkpoint(tmp_path / "model", config, {n: t for n, t in good.items() if n != "lm_head.weight"})
    with pytest.raises(FormatError, match="as F16"):  # 70000 is Inf in half precision
        save_checkpoint(
            tmp_path / "model",
            replace(config, torch_dtype="float16"),
            {**good, "model.norm.weight": np.full(64, 7e4, np.float32)},
        )
    with pytest.raises(ConfigError, match="torch_dtype"):
        save_checkpoint(tmp_path / "model", replace(config, torch_dtype="int8"), good)
    assert list(tmp_path.iterdir()) == []
