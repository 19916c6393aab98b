"""What a request to `melt-edge serve` may ask for: everything that reaches llama.cpp unchecked otherwise.

Imported only when a server is made: it needs the server extra.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from llama_cpp.server import app as server
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest, DetokenizeInputRequest
from pydantic import BaseModel, ValidationError

from melt_edge.errors import ConfigError, MeltError
from melt_edge.runtime.model import Model

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CreateCompletionRequest,
    "/v1/engines/copilot-codex/completions": CreateCompletionRequest,
    "/v1/chat/completions": CreateChatCompletionRequest,
    "/extras/detokenize": DetokenizeInputRequest,
}
_MAX_SEED = 2**32 - 1
_MAX_BIAS = 1e30  # what a float32 logit can still be added to


def request_check(model: Model) -> Callable[..., Awaitable[Any]]:
    """A dependency in the place of the server's own `authenticate`, which every route has.

    Answers 4xx with one sentence where the library would end the process or the stream.
    """

    async def authenticate_and_check(
        request: Request,
        settings: Annotated[Any, Depends(server.get_server_settings)],
        authorization: Annotated[Any, Depends(server.bearer_scheme)],
    ) -> Any:
        allowed = await server.authenticate(settings, authorization)
        kind = _BODIES.get(request.url.path)
        if kind is not None and request.method == "POST":
            try:
                check_body(kind.model_validate(await request.json()), model)
            except ValidationError as err:
                first = err.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise HTTPException(422, f"{where}: {first['msg']}") from err
            except MeltError as err:
                raise HTTPException(400, str(err)) from err
        return allowed

    return authenticate_and_check


def check_body(body: BaseModel, model: Model) -> None:
    """Raises: MeltError for a value of a request that the library must not see."""
    if isinstance(body, DetokenizeInputRequest):
        model.detokenize(body.tokens)
        return
    assert isinstance(body, CreateCompletionRequest | CreateChatCompletionRequest)
    for name in ("temperature", "repeat_penalty", "presence_penalty", "frequency_penalty", "mirostat_tau"):
        value = getattr(body, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}, expected a number")
    if not 0.01 <= body.repeat_penalty <= 100:
        raise ConfigError(f"repeat_penalty is {body.repeat_penalty:g}, expected a number from 0.01 to 100")
    if body.seed is not None and not 0 <= body.seed <= _MAX_SEED:
        raise ConfigError(f"seed is {body.seed}, expected a whole number from 0 to {_MAX_SEED}")
    if body.top_k > 2**31 - 1:
        raise ConfigError(f"top_k is {body.top_k}, expected a whole number from 0 to {2**31 - 1}")
    _check_bias(body.logit_bias or {}, model.info.n_vocab, as_text=body.logit_bias_type == "tokens")
    if body.grammar is not None:
        model.check_grammar(body.grammar)


def _check_bias(bias: dict[str, float], n_vocab: int, *, as_text: bool) -> None:
    for token, value in bias.items():
        if not abs(value) <= _MAX_BIAS:
            raise ConfigError(f"logit_bias of {token[:20]!r} is {value}, expected a number within {_MAX_BIAS:g}")
        if not as_text and not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < n_vocab):
            raise ConfigError(f"logit_bias has token {token[:20]!r}, expected an id from 0 to {n_vocab - 1}")
