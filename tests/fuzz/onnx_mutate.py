"""Mutations of an ONNX folder, each a pure function of (folder, seed).

Most are given sizes and digests that fit again, so that what is behind the digests is tried: graphs, manifest,
places of weights, weights. The rest must be seen by the digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

GRAPHS = ("embed.onnx", "loop.onnx", "head.onnx")
MANIFEST, WEIGHTS = "melt_edge.json", "weights.bin"
INTEGERS = (
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    3,
    5,
    7,
    16,
    31,
    64,
    127,
    129,
    4096,
    2**20,
    2**31 - 1,
    2**40,
    2**63 - 1,
)
REALS = (0.0, -1.0, 1e-30, 0.5, 1.0, 1e6, 3e38, float("inf"), float("nan"))
TEXTS = ("", "x", "../weights.bin", "/etc/passwd", "tokenizer.json", "a/b/c", "weights.bin\0x", "x" * 5000, "é")
OPERATORS = ("Add", "MatMul", "Gather", "Identity", "Loop", "If", "Scan", "Softmax", "ScatterND", "Reshape", "Cast")
VALUES: tuple[Any, ...] = (None, True, 0, -1, 1, 3, 2**31, 2**70, 0.5, 1e400, "", "x", "fp16", [], [1], {}, {"a": 1})


class OnnxMutator:
    """Makes mutants of one valid folder."""

    def __init__(self, base: Path) -> None:
        self.files = {
            file.relative_to(base).as_posix(): file.read_bytes() for file in sorted(base.rglob("*")) if file.is_file()
        }
        self.kinds: list[Callable[[random.Random, dict[str, bytes]], str]] = [
            self._attribute,
            self._attribute,
            self._node,
            self._wiring,
            self._initializer,
            self._place,
            self._constant,
            self._port,
            self._header,
            self._manifest,
            self._manifest,
            self._graph_bytes,
            self._weights,
            self._other_file,
        ]

    def write(self, seed: int, folder: Path) -> str:
        """Make ``folder`` the mutant; returns what was done to it."""
        rng = random.Random(seed)
        files = dict(self.files)
        kind = self.kinds[seed % len(self.kinds)]
        what = kind(rng, files)
        sealed = rng.random() < 0.9 and kind != self._manifest
        if sealed:
            _reseal(files)
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if rng.random() < 0.02:
            what += "; " + _link(rng, folder)
        return what + ("" if sealed or kind == self._manifest else "; digests as before")

    # -- graphs

    def _open(self, rng: random.Random, files: dict[str, bytes]) -> tuple[str, onnx.ModelProto]:
        name = rng.choice((*GRAPHS, "loop.onnx", "loop.onnx"))
        return name, onnx.load_model_from_string(files[name])

    def _attribute(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        nodes = [node for node in model.graph.node if node.attribute]
        if not nodes:
            return self._node(rng, files)
        attention = [node for node in nodes if node.op_type in ("GroupQueryAttention", "Attention", "MatMulNBits")]
        node = rng.choice(attention if attention and rng.random() < 0.6 else nodes)
        attribute = rng.choice(node.attribute)
        if rng.random() < 0.1:
            node.attribute.remove(attribute)
            what = "removed"
        elif rng.random() < 0.1:
            node.attribute.add(name=rng.choice(("softcap", "scale", "unknown", "k_quant_type")), type=2, i=1)
            what = "one more"
        elif attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = rng.choice(REALS)
            what = str(attribute.f)
        elif attribute.type == onnx.AttributeProto.INTS:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
            what = str(list(attribute.ints))
        else:
            attribute.i = rng.choice((*INTEGERS, attribute.i + 1, attribute.i - 1, 2 * attribute.i))
            what = str(attribute.i)
        files[name] = model.SerializeToString()
        return f"{name} {node.name} {attribute.name}: {what}"

    def _node(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        nodes = model.graph.node
        index = rng.randrange(len(nodes))
        node = nodes[index]
        what = rng.choice(("remove", "copy", "swap", "operator", "domain", "body"))
        about = f"{name} {node.name} {what}"
        if what == "remove":
            del nodes[index]
        elif what == "copy":
            nodes.add().CopyFrom(node)
        elif what == "swap":
            other = nodes[rng.randrange(len(nodes))]
            node.op_type, other.op_type = other.op_type, node.op_type
        elif what == "operator":
            node.op_type = rng.choice(OPERATORS)
        elif what == "domain":
            node.domain = rng.choice(("", "com.microsoft", "ai.onnx.ml", "x"))
        else:
            graph = onnx.helper.make_graph([], "body", [], [])
            node.attribute.append(onnx.helper.make_attribute("body", graph))
        files[name] = model.SerializeToString()
        return about

    def _wiring(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        graph = model.graph
        node = rng.choice(graph.node)
        names = [tensor.name for tensor in graph.initializer] + [port.name for port in graph.input]
        names += [output for other in graph.node for output in other.output] + ["", "nowhere"]
        side = node.output if rng.random() < 0.2 else node.input
        if side is node.input and rng.random() < 0.15:
            side.append(rng.choice(names))
            what = "one more input"
        elif len(side) and rng.random() < 0.1:
            del side[-1]
            what = "one less"
        else:
            index = rng.randrange(len(side))
            side[index] = rng.choice(names)
            what = f"{'output' if side is node.output else 'input'} {index} is {side[index]}"
        files[name] = model.SerializeToString()
        return f"{name} {node.name}: {what}"

    def _initializer(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        tensor = rng.choice(model.graph.initializer)
        what = rng.choice(("dims", "dims", "transpose", "type", "name", "remove", "copy"))
        if what == "dims" and tensor.dims:
            index = rng.randrange(len(tensor.dims))
            tensor.dims[index] = rng.choice((*INTEGERS, tensor.dims[index] + 1, tensor.dims[index] // 2))
        elif what == "transpose":  # as many values, another shape
            dims = list(reversed(tensor.dims))
            if dims == list(tensor.dims) and dims and dims[0] % 2 == 0:
                dims = [2, dims[0] // 2, *dims[1:]]
            del tensor.dims[:]
            tensor.dims.extend(dims)
        elif what == "type":
            tensor.data_type = rng.choice(range(0, 24))
        elif what == "remove":
            model.graph.initializer.remove(tensor)
        elif what == "copy":
            model.graph.initializer.add().CopyFrom(tensor)
        else:
            tensor.name = rng.choice(TEXTS)
        files[name] = model.SerializeToString()
        return f"{name} tensor {tensor.name[:40]}: {what} {list(tensor.dims)} {tensor.data_type}"

    def _place(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        tensor = rng.choice([each for each in model.graph.initializer if each.external_data])
        entry = rng.choice(tensor.external_data)
        if entry.key == "location":
            entry.value = rng.choice(TEXTS)
        elif rng.random() < 0.5:
            entry.value = str(int(entry.value) + rng.choice((-4, 4, 64, -64, 2**20, 1)))
        else:
            entry.value = rng.choice((*map(str, INTEGERS), *TEXTS, "0x10", "1e3", " 64"))
        if rng.random() < 0.1:
            tensor.external_data.add(key=rng.choice(("checksum", "offset", "x")), value="1")
        files[name] = model.SerializeToString()
        return f"{name} tensor {tensor.name}: {entry.key} {entry.value[:40]!r}"

    def _constant(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        inner = [tensor for tensor in model.graph.initializer if not tensor.external_data]
        if not inner:
            return self._initializer(rng, files)
        tensor = rng.choice(inner)
        raw = bytearray(tensor.raw_data)
        if raw and rng.random() < 0.8:
            if len(raw) >= 8 and rng.random() < 0.5:
                at = 8 * rng.randrange(len(raw) // 8)
                raw[at : at + 8] = rng.choice(INTEGERS).to_bytes(8, "little", signed=True)
            else:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            raw = raw[:-1] if raw else bytearray(b"x")
        tensor.raw_data = bytes(raw)
        files[name] = model.SerializeToString()
        return f"{name} constant {tensor.name}: {bytes(raw)[:16].hex()}"

    def _port(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        port = rng.choice([*model.graph.input, *model.graph.output, *model.graph.value_info[:8]])
        tensor = port.type.tensor_type
        what = rng.choice(("dim", "symbol", "type", "name", "less"))
        if what in ("dim", "symbol") and tensor.shape.dim:
            dim = rng.choice(tensor.shape.dim)
            if what == "dim":
                dim.dim_value = rng.choice(INTEGERS)
            else:
                dim.dim_param = rng.choice(("batch", "chunk", "other", ""))
        elif what == "type":
            tensor.elem_type = rng.choice(range(0, 24))
        elif what == "less" and tensor.shape.dim:
            del tensor.shape.dim[-1]
        else:
            port.name = rng.choice(TEXTS)
        files[name] = model.SerializeToString()
        return f"{name} port {port.name[:40]}: {what}"

    def _header(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name, model = self._open(rng, files)
        what = rng.choice(("ir", "opset", "domain", "no opset", "function", "ort_config", "sparse", "training"))
        if what == "ir":
            model.ir_version = rng.choice(INTEGERS)
        elif what == "opset":
            rng.choice(model.opset_import).version = rng.choice((*INTEGERS, 18, 21, 24, 99))
        elif what == "domain":
            model.opset_import.add(domain=rng.choice(TEXTS), version=1)
        elif what == "no opset":
            del model.opset_import[:]
        elif what == "function":
            model.functions.add(name="Add", domain="")
        elif what == "ort_config":
            model.metadata_props.add(key="ort_config", value='{"session_options": {"inter_op_num_threads": 5}}')
        elif what == "sparse":
            model.graph.sparse_initializer.add()
        else:
            model.training_info.add()
        files[name] = model.SerializeToString()
        return f"{name} header: {what}"

    def _graph_bytes(self, rng: random.Random, files: dict[str, bytes]) -> str:
        return _damage(rng, files, rng.choice(GRAPHS))

    # -- the rest

    def _manifest(self, rng: random.Random, files: dict[str, bytes]) -> str:
        if rng.random() < 0.15:
            return _damage(rng, files, MANIFEST)
        keys = json.loads(files[MANIFEST])
        at: Any = keys
        path: list[Any] = []
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            path.append(key)
            if not (isinstance(at[key], dict | list) and at[key]) or rng.random() < 0.1:
                break
            at = at[key]
        old = at[key]
        action = rng.random()
        if action < 0.1:
            del at[key]
        elif action < 0.2 and isinstance(at, dict):
            at[rng.choice((*TEXTS, str(key) + "x"))] = at.pop(key)
        elif isinstance(old, int) and action < 0.5:
            at[key] = rng.choice((*INTEGERS, old + 1, old - 1, -old))
        elif isinstance(old, str) and action < 0.5:
            at[key] = rng.choice((*TEXTS, "float16", "ouro", "melt", "none", "elementwise", "input", old[::-1]))
        else:
            at[key] = rng.choice(VALUES)
        files[MANIFEST] = json.dumps(keys).encode()
        return f"manifest {path}: {json.dumps(at)[:80]}"

    def _weights(self, rng: random.Random, files: dict[str, bytes]) -> str:
        if rng.random() < 0.6:
            return _damage(rng, files, WEIGHTS)
        data = bytearray(files[WEIGHTS])
        values = np.frombuffer(data, dtype="<f4")
        index = rng.randrange(len(values))
        values[index] = rng.choice((math.nan, math.inf, -math.inf, 1e30, 0.0))
        files[WEIGHTS] = bytes(data)
        return f"weights: value {index} is {values[index]}"

    def _other_file(self, rng: random.Random, files: dict[str, bytes]) -> str:
        name = rng.choice([name for name in files if name not in (*GRAPHS, MANIFEST, WEIGHTS)])
        if rng.random() < 0.2:
            del files[name]
            return f"{name}: not there"
        return _damage(rng, files, name)


def _damage(rng: random.Random, files: dict[str, bytes], name: str) -> str:
    """Some bytes changed, cut off or added."""
    data = bytearray(files[name])
    what = rng.choice(("bits", "bits", "bytes", "cut", "grow", "empty", "hole"))
    if what in ("bits", "bytes"):
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            data[at] = data[at] ^ (1 << rng.randrange(8)) if what == "bits" else rng.randrange(256)
    elif what == "cut":
        del data[rng.randrange(len(data)) :]
    elif what == "grow":
        data += rng.randbytes(rng.randrange(1, 64))
    elif what == "empty":
        data.clear()
    else:
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(1, 16)]
    files[name] = bytes(data)
    return f"{name}: {what}"


def _reseal(files: dict[str, bytes]) -> None:
    """Give every file the manifest lists its size and digest."""
    try:
        keys = json.loads(files[MANIFEST])
        for name, entry in keys["files"].items():
            if name in files:
                entry["size"], entry["sha256"] = len(files[name]), hashlib.sha256(files[name]).hexdigest()
        files[MANIFEST] = json.dumps(keys).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # the manifest itself is damaged


def _link(rng: random.Random, folder: Path) -> str:
    """Put a link in the place of a file."""
    file = rng.choice([path for path in folder.iterdir() if path.is_file()])
    kept = folder.with_name(folder.name + ".kept")
    kept.unlink(missing_ok=True)
    file.rename(kept)
    if rng.random() < 0.5:
        file.symlink_to(kept)
    else:
        os.link(kept, file)
    return f"{file.name} is a link"
