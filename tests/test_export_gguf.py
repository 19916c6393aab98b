"""GGUF export: keys and values are the checkpoint's, and the target is the whole new file or the old one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import melt_edge
from conftest import MakeCheckpoint
from melt_edge.checkpoint import Checkpoint, save_checkpoint
from melt_edge.config import REAL_LIMITS, LoopConfig
from melt_edge.errors import ConfigError, FormatError, ParityError, SpecError
from melt_edge.export import verify
from melt_edge.export.gguf import export_gguf
from melt_edge.names import checkpoint_name
from melt_edge.runtime.gguf_check import check_gguf, config_from_gguf
from melt_edge.runtime.gguf_keys import GENERAL_KEYS, INTERPRETED_NAMES, KeyRule
from melt_edge.spec import tensor_specs
from tiny import CHAT_TEMPLATE, tiny_checkpoint, tiny_config, tiny_tensors

# type -> largest error of a stored value, as a share of the largest value of its row
VALUE_ERROR = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 220, "q4_0": 1 / 7.9}


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Metadata, float32 tensors by checkpoint name, and their types, through the gguf package."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {checkpoint_name(t.name): gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return keys, tensors, {checkpoint_name(t.name): t.tensor_type.name for t in reader.tensors}


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
@pytest.mark.parametrize("type", list(VALUE_ERROR))
def test_every_value_is_in_the_file(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, type: str
) -> None:
    config = tiny_config(model_type)
    report = export_gguf(make_checkpoint(config), tmp_path / "m.gguf", type=type, verify=False)
    _, found, types = read(tmp_path / "m.gguf")
    expected = tiny_tensors(config)
    assert set(found) == set(expected)
    for name, spec in tensor_specs(config).items():
        vector = spec.role in ("norm", "bias", "exit")
        assert types[name] == ("F32" if vector else type.upper())
        assert found[name].shape == expected[name].shape
        error = np.abs(found[name] - expected[name]).max(axis=-1)
        assert (error <= (0 if vector else VALUE_ERROR[type]) * np.abs(expected[name]).max(axis=-1)).all(), name
    assert report.bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.verified is None
    assert report.notes == []


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("ouro", tied=True, num_loops=7),
        tiny_config("melt", kv_gate="none", chunk_size=3, early_exit_threshold=0.5),
        tiny_config("melt", kv_gate_init="input", n_head_kv=4, vocab=303),
    ],
)
def test_the_configuration_comes_back_and_the_strict_check_passes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, config: LoopConfig
) -> None:
    export_gguf(make_checkpoint(config), tmp_path / "m.gguf", type="f32", verify=False)
    assert config_from_gguf(check_gguf(tmp_path / "m.gguf")) == replace(
        config, early_exit_threshold=float(np.float32(config.early_exit_threshold))
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_stored_precision_goes_through_unchanged(tmp_path: Path, dtype: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("melt"), dtype=dtype, shards=3)
    export_gguf(folder, tmp_path / "m.gguf", type=dtype.lower(), verify=False)
    _, found, _ = read(tmp_path / "m.gguf")
    with Checkpoint.open(folder) as checkpoint:
        assert all(np.array_equal(found[name], checkpoint.read(name)) for name in checkpoint.tensors)


def test_template_sampling_defaults_and_provenance_go_in(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "Looped-Tiny", tiny_config("melt"))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# card\n")
    export_gguf(folder, tmp_path / "m.gguf", type="q8_0", verify=False)
    keys, _, _ = read(tmp_path / "m.gguf")
    assert keys["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert keys["general.sampling.temp"] == pytest.approx(0.7)
    assert keys["general.sampling.top_p"] == pytest.approx(0.9)
    assert keys["general.sampling.top_k"] == 40
    assert keys["general.name"] == keys["general.source"] == "Looped-Tiny"
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.file_type"] == 7
    weights = (folder / "model.safetensors").read_bytes()
    assert keys["melt_edge.source_sha256"] == hashlib.sha256(weights).hexdigest()
    assert str(tmp_path) not in str(keys)


@pytest.mark.parametrize("word", list(INTERPRETED_NAMES))
def test_a_folder_named_like_another_model_is_exported(tmp_path: Path, word: str) -> None:
    """Was refused with the whole file written, and no other file name helped."""
    folder = tiny_checkpoint(tmp_path / f"Melt-{word.title()}-1B", tiny_config("melt"))
    report = export_gguf(folder, tmp_path / "m.gguf", type="f32", verify=False)
    keys, _, _ = read(tmp_path / "m.gguf")
    assert keys["general.name"] == f"Melt-{INTERPRETED_NAMES[word]}-1B"
    assert keys["general.source"] == folder.name
    assert any(keys["general.name"] in note and folder.name in note for note in report.notes)
    with melt_edge.load(tmp_path / "m.gguf", n_threads=1) as model:
        assert model.info.name == keys["general.name"]


def test_share_kv_writes_an_ouro_as_a_melt_without_a_gate(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tiny_config("ouro"))
    export_gguf(folder, tmp_path / "m.gguf", type="f32", share_kv=True, chunk_size=5, verify=False)
    config = config_from_gguf(check_gguf(tmp_path / "m.gguf"))
    assert (config.model_type, config.kv_gate, config.chunk_size) == ("melt", "none", 5)
    with pytest.raises(ConfigError, match="shared already"):
        export_gguf(make_checkpoint(tiny_config("melt")), tmp_path / "n.gguf", share_kv=True)
    with pytest.raises(ConfigError, match="no chunks"):
        export_gguf(folder, tmp_path / "n.gguf", chunk_size=5)


def test_without_the_exit_gate(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    export_gguf(make_checkpoint(tiny_config("ouro")), tmp_path / "m.gguf", type="f32", exit_gate=False, verify=False)
    keys, found, _ = read(tmp_path / "m.gguf")
    assert "ouro.exit_threshold" not in keys
    assert not any("early_exit" in name for name in found)


def test_rows_that_do_not_fill_a_block_fall_back(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    config = tiny_config("melt", hidden_size=48, head_dim=16)  # 48 is no multiple of 32, 64 and 96 are
    report = export_gguf(make_checkpoint(config), tmp_path / "m.gguf", type="q4_0", verify=False)
    _, _, types = read(tmp_path / "m.gguf")
    assert types["model.layers.0.self_attn.q_proj.weight"] == "F16"
    assert types["model.layers.0.mlp.down_proj.weight"] == "Q4_0"
    assert any("stored as f16" in note for note in report.notes)


def test_progress_reaches_the_end(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    export_gguf(
        make_checkpoint(tiny_config("melt")),
        tmp_path / "m.gguf",
        verify=False,
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert {what for _, _, what in seen} == {"checking", "writing"}
    assert seen[-1][0] == seen[-1][1] > 0


# --- the comparison with the reference


@pytest.mark.parametrize("model_type", ["ouro", "melt"])
@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
def test_small_models_are_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, type: str) -> None:
    report = export_gguf(make_checkpoint(tiny_config(model_type)), tmp_path / "m.gguf", type=type)
    assert report.verified is True


@pytest.mark.parametrize("exit_gate", [True, False])
def test_shared_and_early_exit_files_are_verified_against_what_they_say(tmp_path: Path, exit_gate: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro", early_exit_threshold=0.6))
    options: dict[str, Any] = {"type": "f32", "share_kv": True, "chunk_size": 3, "exit_gate": exit_gate}
    assert export_gguf(folder, tmp_path / "m.gguf", verify=True, **options).verified is True


def test_a_file_that_computes_something_else_is_not_put_in_place(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("melt")
    original = verify.reference_model

    def perturbed(source: Checkpoint, config: LoopConfig) -> Any:
        model = original(source, config)
        model.model.layers[1].self_attn.kv_gate.h_proj.weight.data *= 1.02
        return model

    monkeypatch.setattr(verify, "reference_model", perturbed)
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(ParityError, match="f32 file does not compute"):
        export_gguf(make_checkpoint(config), tmp_path / "m.gguf", type="f32", force=True)
    assert (tmp_path / "m.gguf").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_the_kl_limits_refuse_unrelated_logits() -> None:
    rng = np.random.default_rng(0)
    a, b = (2 * rng.standard_normal((20, 301)).astype(np.float32) for _ in range(2))
    assert verify.kl_divergence(a, a).max() == pytest.approx(0, abs=1e-12)
    for type in verify.MAX_MEAN_KL:
        with pytest.raises(ParityError, match="KL"):
            verify.compare(a, b, type, what="x")
    with pytest.raises(ParityError, match="not finite"):
        verify.compare(a, np.full_like(a, np.nan), "f16", what="x")


# --- what goes wrong


def test_nothing_is_written_for_a_bad_checkpoint(tmp_path: Path) -> None:
    config = tiny_config("melt")
    folder = tiny_checkpoint(tmp_path / "model", config)
    with Checkpoint.open(folder) as checkpoint:
        at = checkpoint.tensors["model.norm.weight"].offset
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[at : at + 4] = np.float32("nan").tobytes()
    (folder / "model.safetensors").write_bytes(data)
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        export_gguf(folder, out, force=True)
    with pytest.raises(ConfigError, match="exists already"):
        export_gguf(folder, out)
    with pytest.raises(ConfigError, match="did you mean q4_k_m"):
        export_gguf(folder, out, type="q4_km", force=True)
    (folder / "model.safetensors").write_bytes(data[:9_000])
    with pytest.raises(FormatError, match="cut short"):
        export_gguf(folder, out, force=True)
    (folder / "tokenizer.json").unlink()
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "model"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("top_k", "3e9"),
        ("top_k", "40.5"),
        ("top_k", "1" + "0" * 400),
        ("top_p", "1.01"),
        ("temperature", "1e300"),
        ("temperature", "-1"),
        ("temperature", "NaN"),
        ("temperature", '"hot"'),
        ("repetition_penalty", "0"),
    ],
)
def test_sampling_values_are_checked_before_anything_is_written(tmp_path: Path, key: str, text: str) -> None:
    """Was a struct.error, an OverflowError, or a refusal of the whole written file under its temporary name."""
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro"))
    (folder / "generation_config.json").write_text(f'{{"{key}": {text}}}')
    seen: list[int] = []
    with pytest.raises(ConfigError, match=rf"generation_config\.json: key '{key}' is .*, expected a .*number from"):
        export_gguf(folder, tmp_path / "m.gguf", progress=lambda done, total, what: seen.append(done))
    assert (os.listdir(tmp_path), seen) == (["model"], [])


def test_configuration_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    """Was written in full, and then refused with the GGUF key and the temporary name."""
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro"))
    config = json.loads((folder / "config.json").read_text())
    for key, (low, high) in REAL_LIMITS.items():
        for value in (low * 0.9, high * 1.1, 10**400):
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            with pytest.raises(ConfigError, match=rf"config\.json: key '{key}' is .*, expected a number from"):
                export_gguf(folder, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
def test_the_limits_themselves_make_a_file_that_loads(tmp_path: Path, end: int) -> None:
    """0.01 becomes a float32 below itself, which neither the check of the file nor llama.cpp may refuse."""
    limits = {key: both[end] for key, both in REAL_LIMITS.items()}
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro", **limits))
    sampling = {key: (rule.low, rule.high)[end] for key, rule in sampling_rules().items()}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    export_gguf(folder, tmp_path / "m.gguf", type="f32", verify=False)
    info = check_gguf(tmp_path / "m.gguf")
    config = config_from_gguf(info)
    assert {key: getattr(config, key) for key in limits} == limits
    with melt_edge.load(tmp_path / "m.gguf", n_threads=1) as model:
        assert model.sampling_defaults.repeat_penalty == sampling["repetition_penalty"]


def sampling_rules() -> dict[str, KeyRule]:
    """generation_config.json's keys and what the check of a file says of each."""
    names = {"temperature": "temp", "repetition_penalty": "penalty_repeat"}
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {key: GENERAL_KEYS[f"sampling.{names.get(key, key)}"] for key in keys}


def test_a_value_that_the_type_cannot_hold(tmp_path: Path) -> None:
    config = tiny_config("ouro")
    tensors = tiny_tensors(config)
    tensors["lm_head.weight"][3, 5] = 1e5
    folder = tiny_checkpoint(tmp_path / "source", config)
    tokenizer = (folder / "tokenizer.json").read_text()
    folder = save_checkpoint(tmp_path / "model", config, tensors, tokenizer_json=tokenizer)
    with pytest.raises(FormatError, match=r"lm_head\.weight holds 100000"):
        export_gguf(folder, tmp_path / "m.gguf", type="f16", verify=False)
    assert not (tmp_path / "m.gguf").exists()
    for type in ("bf16", "f32", "q8_0"):
        export_gguf(folder, tmp_path / f"{type}.gguf", type=type, verify=False)


def test_a_broken_checkpoint_is_not_an_export(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_config("ouro"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        export_gguf(folder, tmp_path / "m.gguf")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(SpecError, match="11 tensor"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["model"]


KILLED = """
import sys, time
from melt_edge.export import gguf
from melt_edge.export.tensors import encoded_blocks
def slowly(*args):
    for block in encoded_blocks(*args):
        yield block
        print("block", flush=True)
        time.sleep(0.05)
gguf.encoded_blocks = slowly
gguf.export_gguf(sys.argv[1], sys.argv[2], type="f32", verify=False, force=True)
"""


@pytest.mark.parametrize("old", [b"old", None])
def test_a_killed_export_leaves_the_old_file_or_none(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, old: bytes | None
) -> None:
    out = tmp_path / "m.gguf"
    if old is not None:
        out.write_bytes(old)
    command = [sys.executable, "-c", KILLED, str(make_checkpoint(tiny_config("melt"))), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert child.stdout.readline() == "block\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (out.read_bytes() if out.exists() else None) == old
    export_gguf(make_checkpoint(tiny_config("melt")), out, type="f32", verify=False, force=True)
    check_gguf(out)


# --- memory, at the size of the real models

# VmHWM and not getrusage's ru_maxrss, which a child inherits from the process that forked it.
EXPORT_AND_MEASURE = """
import re, sys
from melt_edge.export.gguf import export_gguf
export_gguf(sys.argv[1], sys.argv[2], type=sys.argv[3], verify=False)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024)
"""


class OneAtATime(dict[str, np.ndarray]):
    """Weights of the 1.6 B shape that exist only while they are written."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(dict.fromkeys(tensor_specs(config)))
        self.specs = tensor_specs(config)
        self.noise = np.random.default_rng(0).standard_normal(2**20).astype(np.float32) * 0.02

    def __getitem__(self, name: str) -> np.ndarray:
        return np.resize(self.noise, self.specs[name].shape)


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of MELT-1.6B's shape; pytest removes it with the session's folders."""
    config = tiny_config(
        "melt", hidden_size=2048, layers=24, n_head=16, n_head_kv=16, head_dim=128, vocab=49152,
        intermediate_size=5632, torch_dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("big")
    source = tiny_checkpoint(folder / "vocabulary", tiny_config("ouro", vocab=49152, hidden_size=8, head_dim=2))
    tokenizer = (source / "tokenizer.json").read_text()
    return save_checkpoint(
        folder / "model", config, OneAtATime(config), tokenizer_json=tokenizer, shard_bytes=2 * 2**30
    )


@pytest.mark.slow
@pytest.mark.parametrize("type", ["q8_0", "q6_k"])  # written directly, and by the quantizer
def test_peak_memory_at_1_6_b(big_checkpoint: Path, tmp_path: Path, type: str) -> None:
    """The process as a whole stays below the largest tensor in float32 plus 500 MB."""
    out = tmp_path / "m.gguf"
    started = time.monotonic()
    command = [sys.executable, "-c", EXPORT_AND_MEASURE, str(big_checkpoint), str(out), type]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    seconds = time.monotonic() - started
    with Checkpoint.open(big_checkpoint) as checkpoint:
        assert sum(info.n_elements for info in checkpoint.tensors.values()) > 1.6e9
        largest = max(info.n_elements for info in checkpoint.tensors.values()) * 4
    out.unlink()
    assert peak < largest + 500e6, f"peak {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB"
    assert seconds < 600
