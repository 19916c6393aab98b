"""From one record of training data to tokens: plain text, a prompt with its answer, or a conversation.

The chat template is run once for each sequence of roles, on placeholders, in the sandbox that models'
templates get; the records' own texts are then put between its pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from melt_edge.checkpoint import Checkpoint
from melt_edge.errors import ConfigError, FormatError
from melt_edge.export.tokenizer import chat_template
from melt_edge.runtime.template import render_chat

# Private-use characters, so that no template changes them and no text is expected to hold them.
_MARK = "\ue0d1{}\ue0d2"


@dataclass(frozen=True)
class Row:
    """Tokens of one training sequence, and which of them the student shall learn to predict.

    is_text: the row may be joined with others and cut anywhere.
    """

    tokens: list[int]
    learned: list[bool]
    is_text: bool


class Encoder:
    """Turns records into rows with a teacher's tokenizer, chat template and end token."""

    def __init__(self, checkpoint: Checkpoint, *, prompt_loss: bool) -> None:
        self.source = str(checkpoint.path)
        if checkpoint.tokenizer_path is None:
            raise FormatError(f"{checkpoint.path}: no tokenizer.json; copy the model's own into the folder")
        try:
            self.tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
        except Exception as err:  # the library raises bare Exceptions
            raise FormatError(f"{checkpoint.tokenizer_path}: not a tokenizer ({err})") from err
        self.vocab_size = checkpoint.config.vocab_size
        self.prompt_loss = prompt_loss
        self.template = _default_template(checkpoint)
        self.bos, self.eos = (_special(checkpoint.tokenizer_config, key) for key in ("bos_token", "eos_token"))
        self.eos_id = self.tokenizer.token_to_id(self.eos) if self.eos else None
        if self.eos_id is None:
            self.eos_id = checkpoint.config.eos_token_id
        added = self.tokenizer.get_added_tokens_decoder()
        self._special_ids = {token for token, entry in added.items() if entry.special}
        self._frames: dict[tuple[str, ...], list[str]] = {}

    def encode(self, record: object, where: object, *, whole: bool = True) -> Row:
        """The row of a parsed record. whole: a text ends with the end token. where: named in messages.

        Raises: FormatError for a record of another form; ConfigError for a token beyond the vocabulary.
        """
        if isinstance(record, Mapping):
            if isinstance(record.get("text"), str):
                return self._text(record["text"], where, whole=whole)
            if isinstance(record.get("prompt"), str) and isinstance(record.get("answer"), str):
                asked = {"role": "user", "content": record["prompt"]}
                return self._conversation([asked, {"role": "assistant", "content": record["answer"]}], where)
            if "messages" in record:
                return self._conversation(_messages(record["messages"], where), where)
        raise FormatError(f'{where}: expected {{"text"}}, {{"prompt", "answer"}} or {{"messages"}} with texts in them')

    def _text(self, text: str, where: object, *, whole: bool) -> Row:
        tokens = self._ids(text, where)
        if whole and self.eos_id is not None:
            tokens.append(self.eos_id)
        return Row(tokens, [True] * len(tokens), is_text=True)

    def _conversation(self, messages: Sequence[Mapping[str, str]], where: object) -> Row:
        """What the assistant says is learned, with the token that ends it; after the last one nothing follows."""
        roles = tuple(message["role"] for message in messages)
        frame = self._frame(roles, where)
        tokens, learned = self._ids(frame[0], where), []
        learned = [self.prompt_loss] * len(tokens)
        for message, after in zip(messages, frame[1:], strict=True):
            said, tail = self._ids(message["content"], where), self._ids(after, where)
            is_answer = message["role"] == "assistant"
            end = next((i + 1 for i, token in enumerate(tail) if token in self._special_ids), 0) if is_answer else 0
            tokens += said + tail
            learned += [is_answer or self.prompt_loss] * (len(said) + end) + [self.prompt_loss] * (len(tail) - end)
        last = max(i for i, flag in enumerate(learned) if flag) + 1 if any(learned) else 0
        return Row(tokens[:last], learned[:last], is_text=False)

    def _frame(self, roles: tuple[str, ...], where: object) -> list[str]:
        """The template's text before, between and after the contents of messages with these roles."""
        if roles not in self._frames:
            if self.template is None:
                self._frames[roles] = [""] * len(roles) + [self.eos or ""]
            else:
                self._frames[roles] = self._render(roles, where)
        return self._frames[roles]

    def _render(self, roles: tuple[str, ...], where: object) -> list[str]:
        marks = [_MARK.format(i) for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        assert self.template is not None
        rest = render_chat(
            self.template,
            messages,
            bos_token=self.bos,
            eos_token=self.eos,
            add_generation_prompt=False,
            source=self.source,
        )
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise FormatError(
                    f"{where}: the chat template of {self.source} does not show all messages of the roles "
                    f"{', '.join(roles)}; leave out those that it drops"
                )
            pieces.append(before)
        return [*pieces, rest]

    def _ids(self, text: str, where: object) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise ConfigError(
                f"{where}: token {max(ids)} ({self.tokenizer.id_to_token(max(ids))!r}) is beyond the teacher's "
                f"vocabulary of {self.vocab_size} tokens; use the tokenizer.json that the teacher was trained with"
            )
        return ids


def pack(rows: list[Row], length: int) -> tuple[list[Row], list[Row]]:
    """Texts joined and cut into rows of ``length`` tokens, and what is left of them; other rows cut to it."""
    texts = [row for row in rows if row.is_text]
    tokens = list(itertools.chain.from_iterable(row.tokens for row in texts))
    full = len(tokens) // length * length
    packed = [Row(tokens[i : i + length], [True] * length, is_text=True) for i in range(0, full, length)]
    rest = tokens[full:]
    left = [Row(rest, [True] * len(rest), is_text=True)] if rest else []
    others = [Row(row.tokens[:length], row.learned[:length], is_text=False) for row in rows if not row.is_text]
    return packed + others, left


def _default_template(checkpoint: Checkpoint) -> str | None:
    template = chat_template(checkpoint)
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _special(keys: Mapping[str, Any], key: str) -> str:
    value = keys.get(key)
    if isinstance(value, Mapping):  # an added token written out
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _messages(value: object, where: object) -> list[dict[str, str]]:
    ok = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not ok or not value:
        raise FormatError(f'{where}: "messages" is not a list of {{"role", "content"}} texts')
    assert isinstance(value, list)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def text_file(path: Path) -> bool:
    """True for a plain text file; everything else is read as JSON lines."""
    return path.suffix.lower() in (".txt", ".md", ".text")
