"""Values that go in and out of the client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Sequence, TypedDict, Union


class Message(TypedDict):
    """One turn of a conversation; the model's chat template applies."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None: the model's generation config, then the engine's default."""

    max_tokens: Optional[int] = None
    temperature: Optional[float] = None  # 0: greedy
    top_k: Optional[int] = None
    top_p: Optional[float] = None
    min_p: Optional[float] = None
    repetition_penalty: Optional[float] = None  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Optional[int] = None
    stop: Union[str, Sequence[str]] = ()  # one, or several
    stop_token_ids: Sequence[int] = ()
    logprobs: int = -1  # -1: none; n: of every token and its n likeliest
    min_tokens: int = 0
    ignore_eos: bool = False
    prompt_logprobs_from: int = -1  # k >= 1: also those of prompt tokens k, k + 1, ...


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class Logprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Part of an answer. `index` is that of tokens[0] in the completion."""

    id: str
    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: str = "none"  # none, stop, length, cancelled or error
    usage: Usage = Usage()
    model: str = ""  # digests in hex, on the first and the last chunk
    adapter: str = ""  # "": the base itself
    cached: bool = False
    queue_us: int = 0
    first_token_us: int = 0
    prompt_logprobs: tuple[float, ...] = ()  # complete, in one chunk


@dataclass
class Generation:
    """A whole answer."""

    id: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str = "none"
    usage: Usage = Usage()
    model: str = ""
    adapter: str = ""
    cached: bool = False
    queue_us: int = 0
    first_token_us: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.id = chunk.id
        self.text += chunk.text
        self.tokens.extend(chunk.tokens)
        self.logprobs.extend(chunk.logprobs)
        self.prompt_logprobs.extend(chunk.prompt_logprobs)
        if chunk.model:
            self.model, self.adapter = chunk.model, chunk.adapter
        self.cached = self.cached or chunk.cached
        if chunk.finish != "none":
            self.finish, self.usage = chunk.finish, chunk.usage
            self.queue_us, self.first_token_us = chunk.queue_us, chunk.first_token_us
