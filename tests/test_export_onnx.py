"""ONNX export: graphs that say their shapes, weights written once, a true manifest, the whole folder or none."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeCheckpoint
from melt_edge.checkpoint import Checkpoint
from melt_edge.errors import ConfigError, ParityError
from melt_edge.export import verify
from melt_edge.export.onnx import export_onnx
from melt_edge.export.onnx_graph import GRAPHS
from melt_edge.export.onnx_quantize import BlockFormat, dequantize_rows, quantize_rows
from melt_edge.spec import tensor_specs
from parity.test_onnx import needs_opset_24
from test_export_gguf import big_checkpoint  # noqa: F401
from tiny import tiny_checkpoint, tiny_config


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "melt_edge.json").read_text())


def graphs(folder: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    for file in sorted(folder.glob("*.onnx")):
        yield file.name, onnx.load(file, load_external_data=False)


def places(model: onnx.ModelProto) -> Iterator[tuple[str, int, int]]:
    for tensor in model.graph.initializer:
        if tensor.external_data:
            keys = {entry.key: entry.value for entry in tensor.external_data}
            assert keys["location"] == "weights.bin"
            yield tensor.name, int(keys["offset"]), int(keys["length"])


def values(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    yield from itertools.chain(model.graph.input, model.graph.output, model.graph.value_info)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Any:
    """exported(config, **options) -> folder, built once; do not write into it."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def make(config: Any, **options: Any) -> Path:
        key = repr((config, sorted(options.items())))
        if key not in made:
            made[key] = root / str(len(made))
            export_onnx(make_checkpoint(config), made[key], **{"n_ctx": 64, "verify": False, **options})
        return made[key]

    return make


KINDS = [
    tiny_config("ouro", tied=True),
    tiny_config("melt", kv_gate="none"),
    tiny_config("melt", kv_gate_init="input", tied=True, vocab=303),
]
OPTIONS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "fp16", "static": True},
    {"precision": "int8"},
    {"precision": "int4", "symmetric": False, "static": True},
    {"precision": "fp32", "portable": True, "static": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("config", KINDS, ids=["ouro", "none", "gate"])
def test_graphs_say_what_they_hold(exported: Any, config: Any, options: dict[str, Any]) -> None:
    """Names that can be read, every value with its shape, no dimension but batch and chunk left open."""
    folder = exported(config, **options)
    for name, model in graphs(folder):
        onnx.checker.check_model(folder / name, full_check=True)
        stated = {value.name: value for value in values(model)}
        for node in model.graph.node:
            assert node.name.startswith(f"/{name.split('.')[0]}"), node.name
            assert node.name.endswith(f"/{node.op_type}")
            assert all(output in stated for output in node.output if output), node.name
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
        symbols = {dim.dim_param for value in stated.values() for dim in value.type.tensor_type.shape.dim} - {""}
        fixed = name.count(".") == 2
        assert symbols <= (set() if fixed else {"batch", "chunk"})
        for value in stated.values():
            for dim in value.type.tensor_type.shape.dim:
                assert dim.WhichOneof("value") in (("dim_value",) if fixed else ("dim_value", "dim_param"))
    assert len(list(folder.glob("*.onnx"))) == len(GRAPHS) * (3 if options.get("static") else 1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_tensor_is_written_once(exported: Any, options: dict[str, Any]) -> None:
    """Graphs share places, places do not overlap, and nothing but padding lies between them."""
    folder = exported(KINDS[2], **options)
    where: dict[str, tuple[int, int]] = {}
    for _, model in graphs(folder):
        for name, offset, length in places(model):
            assert where.setdefault(name, (offset, length)) == (offset, length)
    ordered = sorted(where.values())
    for (offset, length), (following, _) in itertools.pairwise(ordered):
        assert offset + length <= following < offset + length + 4096
    assert sum(ordered[-1]) == (folder / "weights.bin").stat().st_size


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("config", KINDS, ids=["ouro", "none", "gate"])
def test_portable_graphs_use_the_standard_alone(exported: Any, config: Any, static: bool) -> None:
    for _, model in graphs(exported(config, precision="fp32", portable=True, static=static)):
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
        for node in model.graph.node:
            assert node.domain == ""
            assert not onnx.defs.get_schema(node.op_type, 24).deprecated
    domains = {n.domain for _, m in graphs(exported(config, precision="fp32")) for n in m.graph.node}
    assert domains == {"", "com.microsoft"}


def test_a_tied_table_is_stored_once_and_quantised(exported: Any) -> None:
    """The embedding reads the very bytes that the head multiplies with."""
    models = dict(graphs(exported(tiny_config("melt", tied=True), precision="int4")))
    assert [n.op_type for n in models["embed.onnx"].graph.node] == ["GatherBlockQuantized"]
    assert [n.op_type for n in models["head.onnx"].graph.node] == ["MatMulNBits"]
    embed, head = ({name: place for name, *place in places(models[f"{graph}.onnx"])} for graph in ("embed", "head"))
    assert embed == head


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_do_not_fill_a_block_fall_back(make_checkpoint: MakeCheckpoint, tmp_path: Path, tied: bool) -> None:
    config = tiny_config("melt", hidden_size=48, tied=tied)
    report = export_onnx(make_checkpoint(config), tmp_path / "o", precision="int8", n_ctx=64)
    assert report.verified
    assert any("the embedding stays float32" in note for note in report.notes)


def test_the_manifest_is_true(exported: Any) -> None:
    folder = exported(KINDS[2], precision="int4", symmetric=False, static=True)
    keys = manifest(folder)
    listed = {file.name for file in folder.iterdir()} - {"melt_edge.json"}
    assert set(keys["files"]) == listed
    for name, about in keys["files"].items():
        data = (folder / name).read_bytes()
        assert about == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(keys["static"]) == {"1", "8"}
    for name, graph in itertools.chain(keys["graphs"].items(), keys["static"]["8"].items()):
        model = onnx.load(folder / graph["file"], load_external_data=False)
        assert model.graph.name == name
        for told, found in zip(
            graph["inputs"] + graph["outputs"], [*model.graph.input, *model.graph.output], strict=True
        ):
            tensor = found.type.tensor_type
            dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            assert (told["name"], told["shape"]) == (found.name, dims)
            assert np.dtype(told["dtype"]) == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    assert keys["quantisation"] == {"bits": 4, "block_size": 32, "symmetric": False, "accuracy_level": 4}
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["pad_token_id"]) == (1, 2, 0)
    assert keys["sampling"]["temp"] == 0.7


def test_no_dimension_grows_with_the_loops(exported: Any) -> None:
    one, many = (manifest(exported(tiny_config("melt", num_loops=n)))["graphs"]["loop"] for n in (1, 8))
    assert one == many


def test_special_tokens_are_put_right(tmp_path: Path) -> None:
    """As in the GGUF export: Ouro's config names token 0 for all, its chat ends turns with another."""
    config = tiny_config("ouro", bos_token_id=0, eos_token_id=0)
    report = export_onnx(tiny_checkpoint(tmp_path / "c", config), tmp_path / "o", verify=False)
    assert manifest(tmp_path / "o")["eos_token_id"] == 2
    assert json.loads((tmp_path / "o" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((tmp_path / "o" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert any("eos_token_id is 2" in note for note in report.notes)


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=needs_opset_24) if o.get("portable") else o for o in OPTIONS],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_small_models_are_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any]) -> None:
    report = export_onnx(make_checkpoint(KINDS[2]), tmp_path / "o", n_ctx=64, **options)
    assert report.verified is True


def test_share_kv_is_verified_against_what_it_says(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = export_onnx(make_checkpoint(tiny_config("ouro")), tmp_path / "o", share_kv=True, chunk_size=3)
    keys = manifest(tmp_path / "o")
    assert (report.verified, keys["architecture"], keys["kv_gate"], keys["chunk_size"]) == (True, "melt", "none", 3)


def test_a_folder_that_computes_something_else_is_not_put_in_place(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verify.reference_model

    def perturbed(source: Checkpoint, config: Any) -> Any:
        model = original(source, config)
        model.model.layers[1].self_attn.kv_gate.h_proj.weight.data *= 1.02
        return model

    monkeypatch.setattr(verify, "reference_model", perturbed)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "old").touch()
    with pytest.raises(ParityError, match="fp32 file does not compute"):
        export_onnx(make_checkpoint(KINDS[2]), tmp_path / "o", force=True)
    assert os.listdir(tmp_path) == ["o"]
    assert os.listdir(tmp_path / "o") == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "precision is 'int3', expected one of fp32, fp16, int8, int4"),
        ({"precision": "int4", "portable": True}, "with portable use fp32 or fp16"),
        ({"precision": "int4", "block_size": 48}, "block_size is 48, expected one of 16, 32"),
        ({"precision": "int8", "accuracy_level": 2}, "accuracy_level is 2, expected one of 0, 1, 4"),
        ({"block_size": 32}, "block_size is of int8 and int4, but precision is fp32"),
        ({"n_ctx": 513}, "n_ctx is 513, expected 1 to 512"),
        ({"chunk_size": 4}, "no chunks"),
        ({}, "exists already"),
    ],
    ids=str,
)
def test_bad_options_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if not options:
        (tmp_path / "o").mkdir()
    with pytest.raises(ConfigError, match=message):
        export_onnx(make_checkpoint(tiny_config("ouro")), tmp_path / "o", **options)
    assert os.listdir(tmp_path) == ([] if options else ["o"])


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 130),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    scale=st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e20]),
    seed=st.integers(0, 99),
)
def test_blocks_hold_their_values(
    rows: int, columns: int, bits: int, block_size: int, symmetric: bool, scale: float, seed: int
) -> None:
    """No value is off by more than a step, and zero stays zero."""
    values = (scale * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)
    values[0, 0] = 0
    fmt = BlockFormat(bits, block_size, symmetric)
    blocks = quantize_rows(values, fmt)
    assert blocks.data.shape == fmt.data_shape(rows, columns)
    assert blocks.scales.shape == fmt.scales_shape(rows, columns)
    assert (blocks.zeros is None) == symmetric
    assert blocks.zeros is None or blocks.zeros.shape == fmt.zeros_shape(rows, columns)
    found = dequantize_rows(blocks, fmt, columns)
    steps = np.abs(np.repeat(blocks.scales, block_size, axis=1)[:, :columns])
    assert found[0, 0] == 0
    assert (np.abs(found - values) <= steps * 1.001 + 2e-38).all()


EXPORT_AND_MEASURE = """
import re, sys
from melt_edge.export.onnx import export_onnx
export_onnx(sys.argv[1], sys.argv[2], precision=sys.argv[3], verify=False)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int4"])  # matrices turned whole, and row by row
def test_peak_memory_at_1_6_b(big_checkpoint: Path, tmp_path: Path, precision: str) -> None:  # noqa: F811
    """The process as a whole stays below the largest tensor in float32 plus 500 MB, as for GGUF."""
    out = tmp_path / "o"
    command = [sys.executable, "-c", EXPORT_AND_MEASURE, str(big_checkpoint), str(out), precision]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    with Checkpoint.open(big_checkpoint) as checkpoint:
        largest = max(spec.shape[0] * spec.shape[-1] for spec in tensor_specs(checkpoint.config).values()) * 4
    (out / "weights.bin").unlink()
    assert peak < largest + 500e6, f"peak {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB"
