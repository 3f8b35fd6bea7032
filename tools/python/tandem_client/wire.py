"""Messages to bytes and back, with the coordinator's own schemas (protocol/schema)."""

from __future__ import annotations

from operator import index
from pathlib import Path
from typing import Any, Optional, Sequence

import capnp  # type: ignore[import-untyped]

from tandem_client.errors import TandemError
from tandem_client.types import Chunk, Logprob, Message, Sampling, Usage

VERSION_MAJOR, VERSION_MINOR = 1, 2
MINORS_BEFORE = 2  # older minor versions that are understood too
FRAME_BYTES_MAX = 4 << 20
TEXT_BYTES_MAX = 1 << 20  # of one text
CALL_JSON_BYTES_MAX = FRAME_BYTES_MAX - (64 << 10)  # of a call's parameters
ID_BYTES_MAX = 256  # of a request's id or an idempotency key
NAME_BYTES_MAX = 1024  # of a model or a method
ITEMS_MAX = 1 << 18  # of one list
_NESTING_MAX = 32

capnp.remove_import_hook()
_SCHEMA = capnp.load(
    str(Path(__file__).resolve().parent / "schema" / "client.capnp"),
    imports=[str(Path(capnp.__file__).resolve().parent.parent)],
)


def _encode(message: Any) -> bytes:
    frame: bytes = message.to_bytes()
    if len(frame) > FRAME_BYTES_MAX:
        raise TandemError(
            "invalid", f"a message of {len(frame)} bytes exceeds the limit of {FRAME_BYTES_MAX}"
        )
    return frame


def _text(field: str, value: Any, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """The coordinator never answers what breaks a limit: so it is refused here."""
    if not isinstance(value, str):
        raise TandemError("invalid", f"{field} must be text, not {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise TandemError("invalid", f"{field} is not valid UTF-8") from None
    if size > bytes_max:
        raise TandemError("invalid", f"{field} has {size} bytes, the limit is {bytes_max}")
    return value


def _items(field: str, values: Sequence[Any]) -> Sequence[Any]:
    if len(values) > ITEMS_MAX:
        raise TandemError("invalid", f"{field} has {len(values)} items, the limit is {ITEMS_MAX}")
    return values


def hello(program: str, minor: int) -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    body = message.init("hello")
    body.version.major, body.version.minor = VERSION_MAJOR, minor
    body.client = _text("program", program, NAME_BYTES_MAX)
    return _encode(message)


def generate(
    request_id: str,
    model: str,
    *,
    messages: Sequence[Message] = (),
    prompt: str = "",
    tokens: Sequence[int] = (),
    raw: bool = False,
    sampling: Sampling,
    stream: bool,
    no_cache: bool,
    next_index: int,
    deadline_ms: int,
) -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    body = message.init("generate")
    try:
        body.id = _text("request_id", request_id, ID_BYTES_MAX)
        body.model = _text("model", model, NAME_BYTES_MAX)
        turns = body.input.init("messages", len(_items("messages", messages)))
        for turn, given in zip(turns, messages):
            turn.role = _text("a message's role", given["role"])
            turn.content = _text("a message's content", given["content"])
            if unknown := set(given) - {"role", "content"}:
                raise TandemError(
                    "invalid", f"a message has a role and content only, not {min(unknown)}"
                )
        body.input.prompt, body.input.raw = _text("prompt", prompt), raw
        body.input.tokens = [index(token) for token in _items("tokens", tokens)]
        for stop in _items("stop", _stops(sampling)):
            _text("stop", stop)
        _put_sampling(body.sampling, sampling)
        body.stream, body.noCache = stream, no_cache
        body.nextIndex, body.deadlineMs = next_index, deadline_ms
    except KeyError as missing:
        raise TandemError("invalid", f"a message needs {missing}") from None
    except (capnp.KjException, OverflowError, TypeError) as error:
        why = str(error).partition("\n")[0]  # pycapnp adds a stack
        raise TandemError("invalid", f"a value has the wrong type or range: {why}") from None
    return _encode(message)


def _stops(sampling: Sampling) -> Sequence[str]:
    """A text alone is one stop string, not one for each of its characters."""
    return [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop


def _put_sampling(body: Any, sampling: Sampling) -> None:
    optional = {
        "maxTokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "topK": sampling.top_k,
        "topP": sampling.top_p,
        "minP": sampling.min_p,
        "seed": sampling.seed,
    }
    for name, value in optional.items():
        if value is not None:
            getattr(body, name).value = value
    if sampling.repetition_penalty is None:
        body.repetitionPenalty.unset = None
    else:
        body.repetitionPenalty.value = sampling.repetition_penalty
    body.presencePenalty = sampling.presence_penalty
    body.frequencyPenalty = sampling.frequency_penalty
    body.stop = list(_stops(sampling))
    body.stopTokenIds = list(sampling.stop_token_ids)
    body.logprobs, body.minTokens = sampling.logprobs, sampling.min_tokens
    body.ignoreEos = sampling.ignore_eos
    body.promptLogprobsFrom = sampling.prompt_logprobs_from


def cancel(request_id: str) -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    message.init("cancel").id = _text("request_id", request_id, ID_BYTES_MAX)
    return _encode(message)


def ping() -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    message.init("ping").nonce = 1
    return _encode(message)


def call(call_id: str, key: str, method: str, params_json: str) -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    body = message.init("call")
    body.callId, body.idempotencyKey = call_id, _text("idempotency_key", key, ID_BYTES_MAX)
    body.method = _text("method", method, NAME_BYTES_MAX)
    body.paramsJson = _text("the parameters", params_json, CALL_JSON_BYTES_MAX)
    return _encode(message)


def call_cancel(call_id: str) -> bytes:
    message = _SCHEMA.ClientMessage.new_message()
    message.init("callCancel").callId = call_id
    return _encode(message)


class Reply:
    """One message of the coordinator, copied out of its frame."""

    def __init__(self, kind: str) -> None:
        self.kind = kind  # hello, chunk, callReply or pong
        self.code, self.message = "ok", ""
        self.id = ""
        self.retry_after_ms = 0
        self.version = (0, 0)
        self.server = ""
        self.heartbeat_ms = 0
        self.chunk: Optional[Chunk] = None
        self.result_json = ""
        self.more = False


def decode(frame: bytes) -> Reply:
    """Raises TandemError("corrupt") for anything that is not a message."""
    if len(frame) > FRAME_BYTES_MAX or len(frame) % 8 != 0:
        raise TandemError("corrupt", f"a frame of {len(frame)} bytes is not a message")
    try:
        with _SCHEMA.ServerMessage.from_bytes(
            frame, traversal_limit_in_words=len(frame) // 4 + 64, nesting_limit=_NESTING_MAX
        ) as message:
            return _reply(message)
    except (capnp.KjException, ValueError, KeyError, UnicodeDecodeError) as error:
        raise TandemError("corrupt", f"not a message of the coordinator: {error}") from None


def _reply(message: Any) -> Reply:
    reply = Reply(str(message.which()))
    if reply.kind == "hello":
        body = message.hello
        reply.code, reply.message = str(body.status.code), body.status.message
        reply.version = (body.version.major, body.version.minor)
        reply.server, reply.heartbeat_ms = body.server, body.heartbeatMs
    elif reply.kind == "chunk":
        body = message.chunk
        reply.code, reply.message = str(body.status.code), body.status.message
        reply.id, reply.retry_after_ms = body.id, body.retryAfterMs
        reply.chunk = _chunk(body)
    elif reply.kind == "callReply":
        body = message.callReply
        reply.code, reply.message = str(body.status.code), body.status.message
        reply.id, reply.retry_after_ms = body.callId, body.retryAfterMs
        reply.result_json, reply.more = body.resultJson, body.more
    return reply


def _chunk(body: Any) -> Chunk:
    return Chunk(
        id=body.id,
        index=body.index,
        text=body.text,
        tokens=tuple(body.tokens),
        logprobs=tuple(
            Logprob(item.token, item.logprob, tuple((t.token, t.logprob) for t in item.top))
            for item in body.logprobs
        ),
        finish=str(body.finish),
        usage=Usage(
            body.usage.promptTokens, body.usage.completionTokens, body.usage.cachedPromptTokens
        ),
        model=bytes(body.model).hex(),
        adapter=bytes(body.adapter).hex(),
        cached=body.cached,
        queue_us=body.queueUs,
        first_token_us=body.firstTokenUs,
        prompt_logprobs=tuple(body.promptLogprobs),
    )
