"""ONNX folders that are damaged, foreign or hostile: one typed error before onnxruntime sees anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import melt_edge
from melt_edge.errors import ConfigError, FormatError, MeltError
from melt_edge.runtime import onnx_files
from melt_edge.runtime.onnx_folder import open_folder
from tiny import tiny_config

Change = Callable[[Any], object]


@pytest.fixture
def folder(melt_onnx: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(melt_onnx, tmp_path / "model"))


def reseal(folder: Path, change: Change | None = None) -> None:
    """Write the manifest anew, sizes and digests as the files are, so that only ``change`` is wrong."""
    keys = json.loads((folder / "melt_edge.json").read_text())
    for name, entry in keys["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if change is not None:
        change(keys)
    (folder / "melt_edge.json").write_text(json.dumps(keys))


def change_graph(folder: Path, name: str, change: Change) -> None:
    model = onnx.load_model(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    reseal(folder)


def refused(folder: Path, message: str, error: type[MeltError] = FormatError) -> None:
    """Loading says this and makes no session."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("melt_edge.runtime.ort.open_sessions", lambda *args, **more: asked.append(args))
        with pytest.raises(error, match=message):
            melt_edge.load(folder, n_threads=1)
    assert asked == []


def test_a_whole_copy_works(folder: Path) -> None:
    reseal(folder)
    with melt_edge.load(folder, n_threads=1) as model:
        assert model.generate("hi", max_tokens=1).tokens


# -- files


@pytest.mark.parametrize("name", ["weights.bin", "loop.onnx", "tokenizer.gguf", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, rf"{name}: cannot be read \(No such file or directory\); export the folder again")


@pytest.mark.parametrize("name", ["weights.bin", "head.onnx", "tokenizer.gguf", "generation_config.json"])
def test_a_changed_or_cut_file_is_seen(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    refused(folder, rf"{name}: has {len(data) - 1} bytes, melt_edge.json says {len(data)}; it is cut off")
    middle = len(data) // 2
    (folder / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    refused(folder, rf"{name}: has the sha256 .*, the manifest says .*; the file is damaged")


@pytest.mark.parametrize("name", ["weights.bin", "loop.onnx", "melt_edge.json"])
def test_links_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    os.link(elsewhere, folder / name)
    refused(folder, rf"{name}: is a link, expected a plain file; copy the folder with its links followed")
    (folder / name).unlink()
    (folder / name).symlink_to(elsewhere)
    refused(folder, rf"{name}: leads out of its folder")
    if hasattr(os, "mkfifo"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, rf"{name}: is no plain file")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", ".hidden", "a/b/c", "", "x\0y", "a:b"]
)
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    reseal(folder, lambda keys: keys["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    refused(folder, "names the file .*, expected a plain name inside the folder")


def test_a_folder_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    open_folder(tmp_path / "link").check_weights()


# -- weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    values = np.fromfile(folder / "weights.bin", "<f4")
    values[70] = value
    values.tofile(folder / "weights.bin")
    reseal(folder)
    refused(folder, r"tensor 'model.embed_tokens.weight' has values that are not finite \(NaN or Inf\)")


def test_half_precision_is_looked_through_too(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_onnx(tiny_config("melt"), precision="fp16"), tmp_path / "model"))
    values = np.fromfile(folder / "weights.bin", "<f2")
    values[70] = 65504.0
    values.tofile(folder / "weights.bin")
    reseal(folder)
    open_folder(folder).check_weights()
    values[71] = np.nan
    values.tofile(folder / "weights.bin")
    reseal(folder)
    refused(folder, "are not finite")


def test_truncated_weights_with_digests_that_fit(folder: Path) -> None:
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[:-4])
    reseal(folder)
    refused(folder, rf"bytes at \d+, expected \d+ inside the {len(data) - 4} bytes of weights.bin")


def test_large_weights_are_checked_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp holds for the very file: any write, another file or another graph is another check."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(onnx_files, "STAMP_FROM_BYTES", 0)
    hashed: list[Path] = []
    digest = onnx_files._digest
    monkeypatch.setattr(onnx_files, "_digest", lambda path: hashed.append(path) or digest(path))
    for _ in range(3):
        open_folder(folder).check_weights()
    assert hashed == [folder / "weights.bin"]
    (stamp,) = (tmp_path / "cache" / "melt-edge" / "checked").iterdir()
    stamp.write_text("{}")
    open_folder(folder).check_weights()
    assert len(hashed) == 2
    data = bytearray((folder / "weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(FormatError, match="has the sha256"):
        open_folder(folder).check_weights()
    data[100] ^= 1
    before = (folder / "weights.bin").stat()
    (folder / "weights.bin").write_bytes(data)
    os.utime(folder / "weights.bin", ns=(before.st_atime_ns, before.st_mtime_ns))  # the change time stays honest
    open_folder(folder).check_weights()
    assert len(hashed) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="folders that cannot be written are POSIX's")
def test_a_cache_that_cannot_be_written_costs_the_check_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(onnx_files, "STAMP_FROM_BYTES", 0)
    open_folder(folder).check_weights()


# -- manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.update(format_version=2), "has format version 2, this melt-edge reads 1"),
        (lambda keys: keys.update(layout="genai"), "is a folder for onnxruntime-genai, which runs it as it is"),
        (lambda keys: keys.pop("graphs"), "key 'graphs' is missing"),
        (lambda keys: keys.update(architecture="llama"), "key 'architecture' is 'llama', tokenizer.gguf says 'melt'"),
        (lambda keys: keys.update(num_loops=0), "key 'num_loops' is 0, tokenizer.gguf says 4"),
        (lambda keys: keys.update(chunk_size=9), "key 'chunk_size' is 9, tokenizer.gguf says 8"),
        (lambda keys: keys["shapes"].update(head_dim=16), "key 'shapes.head_dim' is 16, tokenizer.gguf says 32"),
        (lambda keys: keys["shapes"].update(n_ctx=10**9), "key 'shapes.n_ctx' is 1000000000, expected 1 to 512"),
        (lambda keys: keys["shapes"].update(n_ctx=True), "key 'shapes.n_ctx' is True"),
        (lambda keys: keys["shapes"].update(n_ctx=64), "is not what the configuration asks for"),
        (lambda keys: keys["dtypes"].update(kv="float16"), "key 'dtypes.kv' is float16, expected float32"),
        (lambda keys: keys["dtypes"].update(activations="int8"), "key 'dtypes.activations' is 'int8', expected one of"),
        (lambda keys: keys.update(precision="int2"), "key 'precision' is 'int2', expected one of fp32"),
        (lambda keys: keys.update(sampling={"temp": float("nan")}), "key 'sampling.temp' is nan"),
        (lambda keys: keys.update(eos_token_id=5), "key 'eos_token_id' is 5, tokenizer.gguf says 2"),
        (lambda keys: keys["graphs"]["loop"].update(file="tokenizer.json"), "is no ONNX graph"),
        (lambda keys: keys["graphs"]["loop"].update(file="../x"), "which is not among its files"),
        (lambda keys: keys["graphs"]["loop"]["inputs"].pop(), "is not what the configuration asks for"),
        (lambda keys: keys["files"].pop("weights.bin"), "lists 0 files of weights"),
        (lambda keys: keys["files"].pop("tokenizer.gguf"), "lists no tokenizer.gguf"),
        (lambda keys: keys["files"].update(x=3), "file 'x' is 3, expected its size and sha256"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: Change, message: str) -> None:
    reseal(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": ' * 5000])
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / "melt_edge.json").write_text(text)
    refused(folder, "melt_edge.json: ", ConfigError)


# -- graphs


def attribute(op_type: str, name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == op_type)
        for each in list(node.attribute):
            if each.name == name:
                node.attribute.remove(each)
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def external(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


def rename_operator(model: Any) -> None:
    model.graph.node[0].op_type = "Identity"


def add_body(model: Any) -> None:
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", body))


def read_late(model: Any) -> None:
    """Let the last layer's gate read the latent of the first, which is overwritten by then."""
    node = next(node for node in model.graph.node if "h.1" in node.input)
    node.input[list(node.input).index("h.1")] = "h.0"


def add_function(model: Any) -> None:
    model.functions.add(name="Add", domain="x")


def short_tables(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith("rotary."):
            tensor.dims[0] = 64
            next(entry for entry in tensor.external_data if entry.key == "length").value = str(64 * 16 * 4)


HEADS = "GroupQueryAttention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attribute(HEADS, "num_heads", 0), r"has the attribute num_heads = 0, which it may not have"),
        (attribute(HEADS, "num_heads", 3), r"has num_heads 3, the manifest says 4"),
        (attribute(HEADS, "kv_num_heads", 4), r"has kv_num_heads 4, the manifest says 2"),
        (attribute(HEADS, "kv_num_heads", None), r"has no attribute kv_num_heads"),
        (attribute(HEADS, "local_window_size", 8), r"has the attribute local_window_size = 8"),
        (attribute(HEADS, "scale", float("nan")), r"has the attribute scale = nan"),
        (attribute(HEADS, "anything", 1), r"has the attribute anything = 1"),
        (attribute("RMSNormalization", "epsilon", -1.0), r"has the attribute epsilon = -1.0"),
        (external("location", "../weights.bin"), r"lies in '../weights.bin', expected 'weights.bin'"),
        (external("location", "/etc/passwd"), r"lies in '/etc/passwd'"),
        (external("location", "tokenizer.json"), r"lies in 'tokenizer.json'"),
        (external("offset", "-4"), r"lies at '-4'"),
        (external("offset", "99999999999"), r"inside the \d+ bytes of weights.bin"),
        (external("length", "8"), r"has 8 bytes at"),
        (rename_operator, r"is :Identity, which is not an operator of these models"),
        (add_body, r"has the attribute body = None, which it may not have"),
        (read_late, r"may read h.0 after it is overwritten"),
        (add_function, r"has functions, expected none"),
        (short_tables, r"reads a rotary table of 64 positions, expected 128"),
        (lambda model: setattr(model, "ir_version", 99), r"has the IR version 99"),
        (lambda model: model.opset_import.add(domain="ai.onnx.ml", version=3), r"needs version 3 of the operators"),
        (lambda model: model.metadata_props.add(key="ort_config", value="{}"), r"brings settings of its own"),
        (lambda model: model.graph.output.pop(), r"has other outputs than its configuration asks for \(exit_prob\)"),
        (lambda model: model.graph.initializer.add().CopyFrom(model.graph.initializer[0]), r"twice, or it is an input"),
    ],
)
def test_a_hostile_graph_is_refused(folder: Path, change: Change, message: str) -> None:
    change_graph(folder, "loop.onnx", change)
    refused(folder, message)


def test_bytes_that_are_no_graph(folder: Path) -> None:
    (folder / "embed.onnx").write_bytes(b"\xff" * 100)
    reseal(folder)
    refused(folder, r"embed.onnx: is no ONNX graph")


@pytest.mark.parametrize("name", [b"input_ids", b"embed_tokens", b"/embed/Gather", b"batch"])
def test_names_that_are_no_text(folder: Path, name: bytes) -> None:
    """Protobuf gives them as bytes, which sorted and regular expressions do not take: a TypeError before."""
    data = (folder / "embed.onnx").read_bytes()
    assert name in data
    (folder / "embed.onnx").write_bytes(data.replace(name, b"\xff" + name[1:], 1))
    reseal(folder)
    refused(folder, r"embed.onnx: has names that are not UTF-8")


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_every_precision_passes_and_runs(make_onnx: Callable[..., Path], precision: str) -> None:
    for arch in ("melt", "ouro"):
        with melt_edge.load(make_onnx(tiny_config(arch), precision=precision), n_threads=1) as model:
            assert model.info.quantisation == precision
            assert model.info.kv_type == ("f16" if precision == "fp16" else "f32")
            assert model.generate("What is 12", max_tokens=4, temperature=0).tokens


def test_packed_weights_must_fit_their_attributes(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    base = make_onnx(tiny_config("melt"), precision="int4")
    for number, (name, value) in enumerate([("K", 128), ("N", 64 * 301), ("bits", 8), ("block_size", 16)]):
        folder = Path(shutil.copytree(base, tmp_path / str(number)))
        change_graph(folder, "loop.onnx", attribute("MatMulNBits", name, value))
        refused(folder, r"\(MatMulNBits\) reads packed weights of shape")
    folder = Path(shutil.copytree(base, tmp_path / "embedding"))
    change_graph(folder, "embed.onnx", attribute("GatherBlockQuantized", "block_size", 64))
    refused(folder, r"\(GatherBlockQuantized\) reads scales of shape")


def test_inspect_tells_what_a_folder_is(melt_onnx: Path, folder: Path) -> None:
    from melt_edge.cli.describe import describe

    found = describe(melt_onnx)
    assert (found["kind"], found["architecture"], found["quantisation"]) == ("onnx", "melt", "fp32")
    assert (found["parameters"], found["kv_cache"]["type"], found["kv_cache"]["n_ctx"]) == (153_985, "f32", 128)
    assert found["kv_cache"]["shared"]["bytes_per_token"] * 4 == found["kv_cache"]["per_loop"]["bytes_per_token"]
    assert found["tokenizer"]["tokens"] == 301
    (folder / "loop.onnx").unlink()
    with pytest.raises(FormatError, match=r"loop\.onnx"):
        describe(folder)
