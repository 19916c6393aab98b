"""tokenizer.json and its chat template as the GGUF keys that llama.cpp reads.

Byte-level BPE only, and only with a pre-tokenizer whose splitting llama.cpp has; everything else is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from melt_edge.checkpoint import Checkpoint
from melt_edge.config import read_json_object
from melt_edge.errors import FormatError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# Splitting steps -> (llama.cpp's name, whether it looks whole words up before merging).
PRE_TOKENIZERS = {
    ("digits", "gpt2-regex"): ("smollm", False),
    ("gpt2-regex",): ("gpt-2", False),
    (_LLAMA3_SPLIT, "bytes"): ("llama-bpe", True),
    (_QWEN2_SPLIT, "bytes"): ("qwen2", False),
}


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that generation needs; None where the model has none."""

    bos: int
    eos: int
    pad: int | None
    unk: int | None


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary as GGUF wants it; tokens and types have vocab_size entries."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    ids: dict[str, int]
    special: frozenset[str]


@dataclass(frozen=True)
class CheckpointTokenizer:
    """What a checkpoint says about its tokenizer, special ids put right. notes: what that was."""

    vocabulary: Vocabulary
    ids: SpecialIds
    template: str | list[dict[str, str]] | None
    add_bos: bool
    add_eos: bool
    notes: list[str]


def read_tokenizer(checkpoint: Checkpoint) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint.

    Raises: FormatError for a tokenizer that is missing, larger than vocab_size, or that llama.cpp
    would not split the same way.
    """
    if checkpoint.tokenizer_path is None:
        raise FormatError(
            f"{checkpoint.path}: tokenizer.json is missing; an exported model needs the tokenizer with it"
        )
    path = checkpoint.tokenizer_path
    source = read_json_object(path, max_bytes=512 * 2**20)
    notes: list[str] = []
    vocabulary = read_vocabulary(source, checkpoint.config.vocab_size, path, notes)
    template = chat_template(checkpoint)
    ids = special_ids(checkpoint, vocabulary, template, notes)
    add_bos, add_eos = _adds(source, checkpoint.tokenizer_config, ids)
    if template is None:
        notes.append("the checkpoint has no chat template: chat needs one to be given")
    return CheckpointTokenizer(vocabulary, ids, template, add_bos, add_eos, notes)


def write_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> list[str]:
    """Add vocabulary, merges, special ids and chat template; returns notes on what was put right.

    Raises: as read_tokenizer.
    """
    tokenizer = read_tokenizer(checkpoint)
    add_tokenizer(writer, tokenizer)
    return tokenizer.notes


def add_tokenizer(writer: GGUFWriter, tokenizer: CheckpointTokenizer) -> None:
    """Add the keys of a tokenizer that was read."""
    vocabulary, ids = tokenizer.vocabulary, tokenizer.ids
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(ids.bos)
    writer.add_eos_token_id(ids.eos)
    if ids.pad is not None:
        writer.add_pad_token_id(ids.pad)
    if ids.unk is not None:
        writer.add_unk_token_id(ids.unk)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)


def read_vocabulary(source: dict[str, Any], vocab_size: int, path: Path, notes: list[str]) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json, padded to vocab_size with unused tokens."""
    model = source.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        found = model.get("type") if isinstance(model, dict) else model
        raise FormatError(f"{path}: model type is {found!r}, expected a byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(key):
            raise FormatError(f"{path}: model.{key} is {model[key]!r}, which llama.cpp's BPE does not know")
    pre = _pre_tokenizer(source, bool(model.get("ignore_merges")), path)
    normalizer = source.get("normalizer")
    if normalizer is not None:
        if normalizer.get("type") != "NFC":
            raise FormatError(f"{path}: normalizer is {json.dumps(normalizer)[:200]}, expected none (or NFC)")
        notes.append("the tokenizer normalises text to NFC, llama.cpp does not: decomposed accents may split otherwise")

    by_id: dict[int, str] = {}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{path}: model.vocab is missing or empty")
    types: dict[int, TokenType] = {}
    special = set()
    for token, token_id in vocab.items():
        _place(by_id, token_id, token, path)
    for added in source.get("added_tokens") or []:
        token, token_id = added["content"], added["id"]
        _place(by_id, token_id, token, path)
        # Upstream's converter takes what looks like a control token for one, whatever its flag says.
        control = added.get("special") or re.fullmatch(r"<\|.*\|>", token)
        types[token_id] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        special.add(token)
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            notes.append(
                f"token {token!r} strips the blanks around it, llama.cpp does not: such text may split otherwise"
            )
    ids = {token: token_id for token_id, token in by_id.items()}
    if len(ids) != len(by_id):
        twice = [token for token, count in Counter(by_id.values()).items() if count > 1]
        raise FormatError(f"{path}: {len(twice)} token(s) have two ids, first {twice[0]!r}; expected one each")
    if max(by_id) >= vocab_size:
        raise FormatError(
            f"{path}: token id {max(by_id)} does not fit vocab_size = {vocab_size} of config.json; "
            "the tokenizer is of another model"
        )
    tokens, token_types = [], []
    for token_id in range(vocab_size):
        if token_id in by_id:
            tokens.append(by_id[token_id])
            token_types.append(types.get(token_id, TokenType.NORMAL))
        else:
            tokens.append(_unused_name(token_id, ids))
            token_types.append(TokenType.UNUSED)
    if len(by_id) < vocab_size:
        notes.append(f"{vocab_size - len(by_id)} of {vocab_size} token ids have no token and are marked as unused")
    return Vocabulary(tokens, token_types, _merges(model, ids, path), pre, ids, frozenset(special))


def chat_template(checkpoint: Checkpoint) -> str | list[dict[str, str]] | None:
    """The chat template of a checkpoint: chat_template.jinja, else tokenizer_config.json's key."""
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = checkpoint.tokenizer_config.get("chat_template")
    if template is None or isinstance(template, str):
        return template or None
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if not named:
        raise FormatError(
            f"{checkpoint.path / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}, "
            "expected a string or a list of {name, template}"
        )
    return template or None


def special_ids(
    checkpoint: Checkpoint, vocabulary: Vocabulary, template: str | list[dict[str, str]] | None, notes: list[str]
) -> SpecialIds:
    """bos, eos, pad and unk, corrected from the tokenizer where config.json would break chat.

    The released Ouro checkpoints name token 0 as bos, eos and pad at once, but their chat template ends
    turns with <|im_end|>: with config.json's eos generation never stops. The token that the template
    ends turns with is the eos; tokenizer_config.json comes next, config.json last.
    """
    config = checkpoint.config
    named = {
        role: _named_id(checkpoint.tokenizer_config.get(f"{role}_token"), vocabulary)
        for role in ("bos", "eos", "pad", "unk")
    }
    opener, closer = _turn_tokens(_default_template(template), vocabulary, named["eos"])
    eos = _first(closer, named["eos"], config.eos_token_id)
    if eos is None:
        raise FormatError(
            f"{checkpoint.path}: neither config.json, tokenizer_config.json nor the chat template names an end token; "
            "set eos_token_id in config.json"
        )
    # One id for bos and eos is a placeholder as soon as chat opens and closes turns with two others.
    shared = config.bos_token_id is not None and config.bos_token_id == config.eos_token_id
    bos = _first(named["bos"] if named["bos"] != eos else None, None if shared else config.bos_token_id)
    if opener is not None and (bos is None or bos in (config.eos_token_id, config.pad_token_id)) and shared:
        bos = opener
    bos = _first(bos, named["bos"], config.bos_token_id, eos)
    pad = _first(
        config.pad_token_id if config.pad_token_id != eos else None,
        named["pad"] if named["pad"] != eos else None,
        config.pad_token_id,
        named["pad"],
    )
    assert bos is not None
    for role, used, stated in (("bos", bos, config.bos_token_id), ("eos", eos, config.eos_token_id)):
        if used != stated:
            said = "nothing" if stated is None else f"{stated} {vocabulary.tokens[stated]!r}"
            notes.append(
                f"{role}_token_id is {used} {vocabulary.tokens[used]!r}, as the tokenizer and its chat template say; "
                f"config.json says {said}"
            )
    return SpecialIds(bos, eos, pad, named["unk"])


def _default_template(template: str | list[dict[str, str]] | None) -> str:
    if template is None or isinstance(template, str):
        return template or ""
    by_name = {entry["name"]: entry["template"] for entry in template}
    return by_name.get("default", template[0]["template"])


def _turn_tokens(template: str, vocabulary: Vocabulary, eos: int | None) -> tuple[int | None, int | None]:
    """The tokens a chat template writes before a role and after a content, by far the most often."""
    words = sorted((token for token in vocabulary.special if token in template), key=len, reverse=True)
    if eos is not None:
        words.append("eos_token")
    if not words:
        return None, None
    pattern = re.compile("|".join(map(re.escape, words)))
    found = [(match.start(), match.group()) for match in pattern.finditer(template)]
    openers: Counter[str] = Counter()
    closers: Counter[str] = Counter()
    for role in re.finditer(r"\brole\b['\"\]]*\s*(?:\+|\}\})", template):
        before = [token for at, token in found if at < role.start()]
        openers.update(before[-1:])
    opener = openers.most_common(1)[0][0] if openers else None
    for content in re.finditer(r"\bcontent\b", template):
        after = [token for at, token in found if at > content.start()]
        closers.update(token for token in after[:1] if token != opener)
    closer = closers.most_common(1)[0][0] if closers else None

    def token_id(word: str | None) -> int | None:
        return eos if word == "eos_token" else vocabulary.ids.get(word or "")

    return token_id(opener), token_id(closer)


def _named_id(token: object, vocabulary: Vocabulary) -> int | None:
    if isinstance(token, dict):
        token = token.get("content")
    return vocabulary.ids.get(token) if isinstance(token, str) else None


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _adds(source: dict[str, Any], tokenizer_config: dict[str, Any], ids: SpecialIds) -> tuple[bool, bool]:
    """Whether encoding puts bos in front and eos at the end: the post-processor decides, if it has a say."""
    post = source.get("post_processor") or {}
    steps = post.get("processors", []) if post.get("type") == "Sequence" else [post]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            single = step.get("single") or []
            edges = [entry.get("SpecialToken", {}).get("id") if isinstance(entry, dict) else None for entry in single]
            return bool(edges and edges[0]), bool(edges and edges[-1])
    add_bos, add_eos = tokenizer_config.get("add_bos_token"), tokenizer_config.get("add_eos_token")
    return add_bos is True, add_eos is True


def _pre_tokenizer(source: dict[str, Any], ignore_merges: bool, path: Path) -> str:
    """llama.cpp's name for a pre-tokenizer, from its structure."""
    pre = source.get("pre_tokenizer")
    steps = pre.get("pretokenizers", []) if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    shape = tuple(_step(step) for step in steps)
    name, ignores = PRE_TOKENIZERS.get(shape, (None, None))
    if name is None or ignores != ignore_merges:
        known = ", ".join(sorted(entry[0] for entry in PRE_TOKENIZERS.values()))
        raise FormatError(
            f"{path}: pre_tokenizer {json.dumps(pre)[:600]} with ignore_merges {ignore_merges} is none that "
            f"llama.cpp splits the same way; expected one of {known}"
        )
    return name


def _step(step: Any) -> str:
    """One pre-tokenizer step in the words of PRE_TOKENIZERS."""
    if not isinstance(step, dict):
        return repr(step)
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits") is True:
        return "digits"
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return "gpt2-regex" if step.get("use_regex", True) else "bytes"
    pattern = step.get("pattern")
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    if kind == "Split" and isolated and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        return str(pattern["Regex"])
    return json.dumps(step)


def _place(by_id: dict[int, str], token_id: object, token: object, path: Path) -> None:
    if not isinstance(token, str) or not token or not isinstance(token_id, int) or token_id < 0:
        raise FormatError(f"{path}: token {token!r} has id {token_id!r}, expected text and an id from 0 on")
    if by_id.setdefault(token_id, token) != token:
        raise FormatError(f"{path}: id {token_id} is both {by_id[token_id]!r} and {token!r}; expected one token per id")


def _unused_name(token_id: int, taken: dict[str, int]) -> str:
    name = f"[PAD{token_id}]"
    while name in taken:  # llama.cpp aborts on two equal tokens
        name = f"[{name}]"
    return name


def _merges(model: dict[str, Any], ids: dict[str, int], path: Path) -> list[str]:
    """Merges as "left right" lines, from either of tokenizer.json's spellings."""
    merges = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise FormatError(f"{path}: merge {merge!r} is not a pair of tokens")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            raise FormatError(f"{path}: merge {merge!r} does not give a token of the vocabulary")
        merges.append(f"{left} {right}")
    if not merges:
        raise FormatError(f"{path}: model.merges is empty, which llama.cpp does not take")
    return merges
