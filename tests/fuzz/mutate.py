"""Mutations of a GGUF file, each a pure function of (file, seed).

The first seeds go through every key and every row of the tensor table in turn; what is done to each,
and all later seeds, come from random.Random(seed).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

from .draft import SCALAR_TYPES, TENSOR_TYPES, Draft, Key

INTEGERS = (0, 1, 2, 3, 5, 12, 31, 32, 33, 63, 64, 65, 128, 255, 500, 512, 513, 4096, 65536)
EDGES = (2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1)
REALS = (0.0, -1.0, 1.0, 0.5, 0.1, 2.0, 1e-45, 1e-6, 1e6, 3e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "x" * 5000, "none", "gpt2", "llama", "zeros", "input", "elementwise", "{{ 1 }}", "{% if %}", "é☃")
# Features of other architectures that llama.cpp reads, and asserts on, for every architecture.
FOREIGN_KEYS = (
    ("{arch}.expert_count", "u32", 4),
    ("{arch}.expert_used_count", "u32", 2),
    ("{arch}.expert_group_count", "u32", 2),
    ("{arch}.nextn_predict_layers", "u32", 1),
    ("{arch}.nextn_predict_layers", "u32", 99),
    ("{arch}.pooling_type", "u32", 1),
    ("{arch}.pooling_type", "u32", 77),
    ("{arch}.attention.causal", "bool", 0),
    ("{arch}.attention.sliding_window", "u32", 4),
    ("{arch}.attention.max_alibi_bias", "f32", 8.0),
    ("{arch}.attention.clamp_kqv", "f32", 1.0),
    ("{arch}.attention.key_length_swa", "u32", 0),
    ("{arch}.embedding_length_out", "u32", 7),
    ("{arch}.classifier.output_labels", "arr[str]", ["a", "b"]),
    ("{arch}.rope.scaling.type", "str", "yarn"),
    ("{arch}.rope.scaling.type", "str", "spiral"),
    ("{arch}.rope.scaling.factor", "f32", float("nan")),
    ("{arch}.rope.scaling.factor", "f32", 8.0),
    ("{arch}.rope.scaling.attn_factor", "f32", 0.0),
    ("{arch}.rope.freq_base_swa", "f32", 0.0),
    ("general.alignment", "u32", 8),
    ("general.alignment", "u32", 33),
    ("general.alignment", "u64", 32),
    ("general.tensor_extra.name", "arr[str]", ["token_embd.weight"]),
    ("general.type", "str", "adapter"),
    ("split.count", "u16", 2),
    ("split.count", "str", "2"),
    ("adapter.type", "str", "lora"),
    ("tokenizer.ggml.token_type_count", "u32", 2**32 - 1),
    ("tokenizer.ggml.precompiled_charsmap", "arr[u8]", [1, 2, 3]),
    ("tokenizer.ggml.suppress_tokens", "arr[i32]", [1, 2, 3]),
    ("tokenizer.ggml.add_sep_token", "bool", 1),
)


class Mutator:
    """Makes mutants of one valid file."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.raw = draft.encode()
        self.n_header = len(draft.header())
        self.arch = str(draft.key("general.architecture").value)
        self._targets = [("key", i) for i in range(len(draft.keys))] + [("row", i) for i in range(len(draft.rows))]

    @property
    def n_targets(self) -> int:
        """Keys and tensors: so many seeds visit each of them once."""
        return len(self._targets)

    def write(self, seed: int, path: Path) -> str:
        """Make ``path`` the mutant; returns what was done to it."""
        raw, what = self.mutant(seed)
        path.write_bytes(raw)
        return what

    def mutant(self, seed: int) -> tuple[bytes, str]:
        """The mutated file's bytes and what was done, in words."""
        rng = random.Random(seed)
        if seed < 8 * self.n_targets:  # each key and each tensor eight times
            kind, i = self._targets[seed % self.n_targets]
            return self._key(rng, i) if kind == "key" else self._row(rng, i)
        kinds: list[tuple[int, Callable[[random.Random], tuple[bytes, str]]]] = [
            (4, lambda rng: self._key(rng, rng.randrange(len(self.draft.keys)))),
            (3, lambda rng: self._row(rng, rng.randrange(len(self.draft.rows)))),
            (2, self._foreign),
            (2, self._truncate),
            (5, self._header_bits),
            (3, self._data),
            (2, self._header_bytes),
            (1, self._counts),
        ]
        (chosen,) = rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])
        return chosen(rng)

    def _key(self, rng: random.Random, i: int) -> tuple[bytes, str]:
        draft = copy.copy(self.draft)
        draft.keys = list(draft.keys)
        old = draft.keys[i]
        action = rng.choice(("value", "value", "value", "type", "drop", "name", "twice"))
        key = Key(old.name, old.type, old.value)
        if action == "drop":
            del draft.keys[i]
        elif action == "twice":
            draft.keys.insert(rng.randrange(len(draft.keys)), key)
        else:
            draft.keys[i] = key
        if action == "name":
            key.name = _flip_text(rng, key.name)
        elif action == "type":
            key.type, key.value = _retyped(rng, key)
        elif action == "value":
            key.value = _other_value(rng, str(key.type), key.value)
        return draft.encode(), f"key {old.name}: {action} -> {key.name} {key.type} {str(key.value)[:60]!r}"

    def _row(self, rng: random.Random, i: int) -> tuple[bytes, str]:
        draft = copy.copy(self.draft)
        draft.rows = [copy.copy(row) for row in draft.rows]
        row = draft.rows[i]
        old = row.name
        action = rng.choice(("drop", "twice", "name", "swap", "type", "type", "size", "ne", "n_dims", "offset"))
        if action == "drop":
            del draft.rows[i]
        elif action == "twice":
            draft.rows.insert(rng.randrange(len(draft.rows)), copy.copy(row))
        elif action == "name":
            row.name = rng.choice((_flip_text(rng, old), "rope_freqs.weight", "blk.0.attn_q.bias", old + ".scale"))
        elif action == "swap":  # two names change places: right names, wrong shapes (or not)
            other = rng.choice(draft.rows)
            row.name, other.name = other.name, row.name
        elif action == "type":
            row.type = rng.choice((*TENSOR_TYPES.values(), 4, 5, 31, 36, 42, 43, 99, 2**31, 2**32 - 1))
        elif action == "size":  # a type whose bytes fit: what the shape says is then all there is
            name = rng.choice(("F16", "BF16", "I8", "I16", "I32", "F64", "Q8_0", "Q4_0", "Q8_1", "TQ2_0", "MXFP4"))
            row.type = TENSOR_TYPES[name]
            row.data = (row.data * 2)[: _n_bytes(name, row.ne)]
        elif action == "ne":
            row.ne = list(row.ne)
            row.ne[rng.randrange(len(row.ne))] = rng.choice((*INTEGERS, *EDGES, 2**62, 2**63 - 1, 2**64 - 1))
        elif action == "n_dims":
            row.n_dims = rng.choice((0, 1, 2, 3, 4, 5, 2**32 - 1))
        else:
            row.offset = rng.choice((0, 1, 8, 32, 2**31, 2**62, 2**64 - 32, 2**64 - 1, len(self.raw)))
        return draft.encode(), f"tensor {old}: {action} -> {row.name} {row.ne} type {row.type}"

    def _foreign(self, rng: random.Random) -> tuple[bytes, str]:
        draft = copy.copy(self.draft)
        name, type, value = rng.choice(FOREIGN_KEYS)
        name = name.format(arch=self.arch)
        draft.keys = [key for key in draft.keys if key.name != name] + [Key(name, type, value)]
        return draft.encode(), f"foreign key {name} = {value!r}"

    def _truncate(self, rng: random.Random) -> tuple[bytes, str]:
        n = len(self.raw)
        size = rng.choice((rng.randrange(self.n_header), rng.randrange(n), n - rng.randrange(99)))
        return self.raw[:size], f"cut to {size} of {n} bytes"

    def _header_bits(self, rng: random.Random) -> tuple[bytes, str]:
        out, at = bytearray(self.raw), []
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at.append(rng.randrange(self.n_header))
            out[at[-1]] ^= 1 << rng.randrange(8)
        return bytes(out), f"header bits flipped in bytes {at}"

    def _header_bytes(self, rng: random.Random) -> tuple[bytes, str]:
        at, size = rng.randrange(self.n_header), rng.choice((1, 4, 8, 32))
        action = rng.choice(("insert", "delete", "ones", "zeros"))
        new = {"insert": rng.randbytes(size), "delete": b"", "ones": b"\xff" * size, "zeros": bytes(size)}[action]
        rest = at if action == "insert" else at + size
        return self.raw[:at] + new + self.raw[rest:], f"{action} {size} bytes at {at} of the header"

    def _data(self, rng: random.Random) -> tuple[bytes, str]:
        out, start = bytearray(self.raw), self.n_header
        if rng.random() < 0.6:
            n = rng.choice((1, 1, 8, 64, 1000))
            for _ in range(n):
                out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
            return bytes(out), f"{n} bits flipped in the data"
        size = rng.choice((2, 4, 64, 4096))
        at = rng.randrange(start, max(start + 1, len(out) - size))
        fill = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80", rng.randbytes(1)))
        out[at : at + size] = fill * size
        return bytes(out), f"{size} data bytes at {at} set to {fill!r}"

    def _counts(self, rng: random.Random) -> tuple[bytes, str]:
        draft = copy.copy(self.draft)
        what = rng.choice(("keys", "tensors", "version", "magic"))
        if what == "version":
            draft.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
        elif what == "magic":
            draft.magic = rng.choice((b"GGML", b"PK\x03\x04", b"\x80\x04\x95\x00", b"FUGG"))
        else:
            n = len(draft.keys if what == "keys" else draft.rows)
            draft.counts = {what: rng.choice((0, n - 1, n + 1, 65536, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))}
        return draft.encode(), f"{what}: {draft.version} {draft.magic!r} {draft.counts}"


def _n_bytes(name: str, ne: list[int]) -> int:
    from melt_edge.runtime.gguf_file import GGML_TYPES

    _, block, block_bytes = GGML_TYPES[TENSOR_TYPES[name]]
    n_values = 1
    for size in ne:
        n_values *= size
    return n_values // block * block_bytes


def _flip_text(rng: random.Random, text: str) -> str:
    if not text:
        return "x"
    raw = bytearray(text.encode())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw.decode("utf-8", "surrogateescape")


def _other_value(rng: random.Random, type: str, value: object) -> object:
    if isinstance(value, list):
        return _other_items(rng, type[4:-1], value)
    if type == "str":
        return rng.choice((_flip_text(rng, str(value)), rng.choice(TEXTS)))
    if type == "bool":
        return rng.choice((0, 1, 2, 255))
    if type in ("f32", "f64"):
        return rng.choice(REALS)
    assert isinstance(value, int)
    near = (value - 1, value + 1, value * 2, value // 2, value ^ (1 << rng.randrange(32)))
    return _fit(type, rng.choice((*INTEGERS, *EDGES, *near, *near)))


def _other_items(rng: random.Random, type: str, items: list[object]) -> list[object]:
    items = list(items)
    action = rng.choice(("flip", "flip", "equal", "short", "long", "empty", "swap"))
    if action == "empty" or not items:
        return []
    i, j = rng.randrange(len(items)), rng.randrange(len(items))
    if action == "short":
        return items[:i]
    if action == "long":
        return items + items[i:]
    if action == "equal":
        items[i] = items[j]
    elif action == "swap":
        items[i], items[j] = items[j], items[i]
    else:
        items[i] = _other_value(rng, type, items[i])
    return items


def _retyped(rng: random.Random, key: Key) -> tuple[str | int, object]:
    type = rng.choice((*SCALAR_TYPES, "str", "arr[str]", "arr[u32]", "arr[f32]", 9, 13, 2**32 - 1))
    if isinstance(type, int):
        return type, None
    value = key.value
    if type == "str":
        return type, str(value)[:100]
    if type == "arr[str]":
        return type, [str(value)[:100]]
    number = float(value) if isinstance(value, (int, float)) else 1.0
    if type == "arr[f32]":
        return type, [number]
    if type in ("f32", "f64"):
        return type, number
    whole = int(number) if abs(number) < 2**62 else 1
    return (type, [_fit("u32", whole)]) if type == "arr[u32]" else (type, _fit(type, whole))


def _fit(type: str, value: int) -> int:
    """The value wrapped into an integer type."""
    bits = 8 if type == "bool" else int(type[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if type[0] == "i" and value >> (bits - 1) else value
