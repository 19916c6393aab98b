"""What answers the problems: a model file or ONNX folder in the runtime, a checkpoint in the reference model.

Both put the question into the model's own chat template, decode greedily, and give the text of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from melt_edge.config import LoopConfig
from melt_edge.errors import FormatError

if TYPE_CHECKING:
    from melt_edge.checkpoint import Checkpoint
    from melt_edge.modeling import LoopLM
    from melt_edge.runtime.model import Model

# Tokens that a prompt and its answer have room for in a file's cache: more would only be cleared each time.
ROOM = 1024
# Below this size a second thread waits longer for the first than it helps.
_ONE_THREAD_BYTES = 32 * 2**20
# A private-use character that no template changes, to find where the question goes.
_MARK = "\ue0d1"


class Solver(Protocol):
    """Answers questions. loops: passes over the layers; chunk: tokens of a prompt run together, None for Ouro."""

    loops: int
    chunk: int | None

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, str]]:
        """(index of the question, text of the answer), in any order, each as soon as it is there."""


class FileSolver:
    """A GGUF file or ONNX folder, one question after the other. A context manager that closes the model."""

    def __init__(
        self,
        path: Path,
        *,
        loops: int | None = None,
        chunk: int | None = None,
        threads: int | None = None,
        kv_type: str | None = None,
        exit_threshold: float | None = None,
        max_tokens: int = 16,
    ) -> None:
        """threads: default one for a small model, else the physical cores. Raises: as melt_edge.load."""
        from melt_edge.runtime.header import read_header
        from melt_edge.runtime.loading import load

        header = read_header(path)
        n_ctx = min(ROOM, header.most_ctx)
        if threads is None and header.file_bytes < _ONE_THREAD_BYTES:
            threads = 1
        self._model: Model = load(
            path,
            loops=loops,
            # A prompt that fits is one chunk for every size above it.
            chunk_size=None if chunk is None else min(chunk, n_ctx),
            n_ctx=n_ctx,
            n_threads=threads,
            kv_type=kv_type,
            exit_threshold=exit_threshold,
        )
        self._max_tokens = max_tokens
        self.loops = self._model.info.num_loops
        self.chunk = _chunk(header.config, chunk)

    def __enter__(self) -> FileSolver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.close()

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, str]]:
        """In order. Raises: as Model.generate."""
        model = self._model
        before, after = "", ""
        if model.has_chat_template:
            before, after = _frame(lambda text: model.render_chat([_message(text)]), str(model.info.path))
        for index, question in enumerate(questions):
            prompt = model.tokenize(f"{before}{question}{after}", add_special=not before)
            found = model.generate(prompt, temperature=0.0, repeat_penalty=1.0, max_tokens=self._max_tokens)
            yield index, found.text


class ReferenceSolver:
    """The reference model, questions of one length together."""

    def __init__(
        self,
        model: LoopLM,
        tokenizer: Tokenizer,
        *,
        frame: tuple[str, str],
        end_tokens: frozenset[int],
        chunk: int | None = None,
        max_tokens: int = 16,
    ) -> None:
        """frame: what the chat template writes before and after a question."""
        self._model, self._tokenizer = model, tokenizer
        self._frame, self._end_tokens = frame, end_tokens
        self._given_chunk, self._max_tokens = chunk, max_tokens
        self.loops = model.config.num_loops
        self.chunk = _chunk(model.config, chunk)

    @classmethod
    def open(
        cls, path: Path, *, loops: int | None = None, chunk: int | None = None, max_tokens: int = 16
    ) -> ReferenceSolver:
        """The solver of a checkpoint folder, in float32 on the CPU.

        Raises: as Checkpoint.open; FormatError without a usable tokenizer; BackendUnavailableError without torch.
        """
        from melt_edge.checkpoint import Checkpoint, reference_model

        with Checkpoint.open(path) as checkpoint:
            tokenizer, frame, end_tokens = checkpoint_text(checkpoint)
            config = checkpoint.config if loops is None else checkpoint.config.with_loops(loops)
            model = reference_model(checkpoint, config)
        return cls(model, tokenizer, frame=frame, end_tokens=end_tokens, chunk=chunk, max_tokens=max_tokens)

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Ordered by length."""
        from melt_edge.tasks.greedy import greedy

        before, after = self._frame
        texts = [f"{before}{question}{after}" for question in questions]
        prompts = [self._tokenizer.encode(text, add_special_tokens=not before).ids for text in texts]
        found = greedy(
            self._model,
            prompts,
            end_tokens=self._end_tokens,
            max_tokens=self._max_tokens,
            chunk_size=self._given_chunk,
        )
        for index, tokens in found:
            yield index, self._tokenizer.decode(tokens)


def checkpoint_text(checkpoint: Checkpoint) -> tuple[Tokenizer, tuple[str, str], frozenset[int]]:
    """The tokenizer of a checkpoint, what its chat template writes around a question, its end tokens.

    The end tokens are those of the exported file, so that both stop at the same one.
    Raises: FormatError for a tokenizer that is missing or cannot be exported.
    """
    from melt_edge.config import read_json_object
    from melt_edge.export.tokenizer import chat_template, read_vocabulary, special_ids
    from melt_edge.runtime.template import render_chat

    path = checkpoint.tokenizer_path
    if path is None:
        raise FormatError(f"{checkpoint.path}: tokenizer.json is missing; copy the model's own into the folder")
    vocabulary = read_vocabulary(read_json_object(path, max_bytes=512 * 2**20), checkpoint.config.vocab_size, path, [])
    template = chat_template(checkpoint)
    ids = special_ids(checkpoint, vocabulary, template, [])
    stated = checkpoint.generation_config.get("eos_token_id")
    end_tokens = {ids.eos, ids.pad, checkpoint.config.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", template[0]["template"])
    frame = ("", "")
    if template is not None:
        text: str = template
        tokens = vocabulary.tokens
        frame = _frame(
            lambda question: render_chat(
                text,
                [_message(question)],
                bos_token=tokens[ids.bos],
                eos_token=tokens[ids.eos],
                source=str(checkpoint.path),
            ),
            str(checkpoint.path),
        )
    return Tokenizer.from_file(str(path)), frame, frozenset(token for token in end_tokens if isinstance(token, int))


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _frame(render: Callable[[str], str], source: str) -> tuple[str, str]:
    """What a template writes around a question; rendered once, since each time takes a process."""
    before, found, after = render(_MARK).partition(_MARK)
    if not found or _MARK in after:
        raise FormatError(f"{source}: the chat template does not show the user's message once; expected it to")
    return before, after


def _chunk(config: LoopConfig, chunk: int | None) -> int | None:
    return config.chunk_size if chunk is None and config.shares_kv else chunk
