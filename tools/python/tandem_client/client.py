"""The synchronous client.

One thread uses a Client at a time (make one per thread); its iterators may be interleaved. The
client says hello, sends again what was lost, goes on after the coordinator was restarted (a
generation at the next token, a stream after its last event), and shows each token and event once.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections import deque
from typing import Any, Callable, Iterator, Optional, Sequence

import zmq
import zmq.utils.monitor

from tandem_client import wire
from tandem_client.errors import TandemError
from tandem_client.keys import read_key_file
from tandem_client.types import Chunk, Generation, Message, Sampling

Json = dict[str, Any]

_QUEUE_MESSAGES = 512
_HELLO_REPEAT_S = 2.0
_REPEAT_S, _REPEAT_S_MAX = 5.0, 60.0
_GAP_S = 0.05
_BUSY_DEFAULT_S, _BUSY_S_MAX = 0.25, 30.0
_REPEATS_WITHOUT_PROGRESS_MAX = 50
_REDIAL_S = 2.5
_SILENCES_MAX = 3  # heartbeats without a word before the hello is said again
_RETRY_AFTER = re.compile(r"retry after (\d{1,7}) ms")


def _scale() -> float:
    try:
        return max(float(os.environ.get("TANDEM_TIME_SCALE", "1")), 0.01)
    except ValueError:
        return 1.0


def _is_given(value: Any) -> bool:
    # An array of token ids has no truth value of its own.
    return len(value) > 0 if hasattr(value, "__len__") else bool(value)


class _Operation:
    """A generation or call under way: how to send it again, and what has arrived."""

    def __init__(self, id_: str, make: Callable[[_Operation], bytes], repeat_s: float) -> None:
        self.id = id_
        self.make = make
        self.opened = time.monotonic()
        self.due = 0.0  # when to send it (again)
        self.repeat_first = self.repeat = repeat_s
        self.busy_since: Optional[float] = None
        self.repeats = 0  # without progress
        self.next_index = 0
        self.model = ""  # digest of what answers, as soon as it said so
        self.last_seq = 0
        self.arrived: deque[wire.Reply] = deque()
        self.ended = False

    def deliver(self, reply: wire.Reply, last: bool) -> None:
        self.arrived.append(reply)
        self.ended = last
        self.repeats = 0
        self.busy_since = None
        self.repeat = self.repeat_first
        self.due = time.monotonic() + self.repeat


class Client:
    """A connection to a coordinator.

    endpoint: "ipc:///DIR/NAME", or "tcp://HOST:PORT" with key_file (the owner's key file, which
    names the coordinator's key). Times are in seconds and scaled by TANDEM_TIME_SCALE. Raises
    TandemError("unavailable") when no coordinator answers within connect_timeout.
    """

    def __init__(
        self,
        endpoint: str,
        key_file: Optional[str] = None,
        *,
        connect_timeout: float = 5.0,
        reconnect_timeout: float = 30.0,
        busy_timeout: float = 60.0,
        program: str = "tandem-python/0.1.0",
    ) -> None:
        if endpoint.startswith("tcp://") and key_file is None:
            raise TandemError("refused", f"endpoint {endpoint}: a TCP endpoint needs a key file")
        self._endpoint = endpoint
        self._program = program
        scale = _scale()
        self._reconnect_s, self._busy_s = reconnect_timeout * scale, busy_timeout * scale
        self._repeat_s = _REPEAT_S * scale
        self._minor = wire.VERSION_MINOR
        self._open: dict[str, _Operation] = {}
        self._connected = self._ready = False
        self._hello_sent = 0.0
        self._away_since = self._changed = self._heard = self._pinged = time.monotonic()
        self._heartbeat_s = 0.0
        self._refused: Optional[TandemError] = None
        self.server = ""  # name and version of the coordinator
        self.version = (0, 0)  # spoken on this connection
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._dial(key_file)
        self._monitor = self._socket.get_monitor_socket()
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise TandemError(
                "invalid", f"endpoint {endpoint}: {error}; ipc:///DIR/NAME or tcp://HOST:PORT"
            ) from None
        deadline = time.monotonic() + connect_timeout * scale
        try:
            while not self._ready:
                if self._refused is not None:
                    raise self._refused
                if time.monotonic() > deadline:
                    raise self._unreachable()
                self._step(0.05)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    # -- inference ------------------------------------------------------------------------------

    def generate(
        self,
        model: str,
        *,
        prompt: str = "",
        messages: Sequence[Message] = (),
        tokens: Sequence[int] = (),
        raw: bool = False,
        sampling: Optional[Sampling] = None,
        no_cache: bool = False,
        timeout: Optional[float] = None,
        request_id: Optional[str] = None,
        stream: bool = True,
        **settings: Any,
    ) -> Iterator[Chunk]:
        """Parts of the answer as they come. Give exactly one of prompt, messages and tokens.

        model: base, alias, alias@version, JOB@latest, JOB@step-N or a digest. Fields of Sampling
        may be given directly (max_tokens=64). Closing the iterator early cancels the request.
        """
        if sum(_is_given(value) for value in (prompt, messages, tokens)) != 1:
            raise TandemError("invalid", "give exactly one of prompt, messages and tokens")
        how = sampling if sampling is not None else Sampling(**settings)
        if sampling is not None and settings:
            raise TandemError("invalid", f"sampling and {', '.join(settings)} were both given")
        id_ = request_id or secrets.token_hex(16)
        deadline = None if timeout is None else time.monotonic() + timeout

        def make(operation: _Operation) -> bytes:
            left = 0 if deadline is None else max(1, int((deadline - time.monotonic()) * 1000))
            return wire.generate(
                id_, operation.model or model, messages=messages, prompt=prompt, tokens=tokens,
                raw=raw, sampling=how, stream=stream, no_cache=no_cache,
                next_index=operation.next_index, deadline_ms=left,
            )  # fmt: skip

        operation = _Operation(id_, make, self._repeat_s)
        make(operation)  # what cannot be sent is an error here, not where it is sent
        return self._chunks(operation, deadline)

    def complete(self, model: str, **arguments: Any) -> Generation:
        """generate(), to its end."""
        whole = Generation()
        for chunk in self.generate(model, **arguments):
            whole.add(chunk)
        return whole

    def chat(self, model: str, messages: Sequence[Message], **arguments: Any) -> Generation:
        """The model's next turn in a conversation."""
        return self.complete(model, messages=messages, **arguments)

    def cancel(self, request_id: str) -> None:
        """Ends a generation, also one that another client of the same key started."""
        self._socket_send(wire.cancel(request_id))

    # -- everything else ------------------------------------------------------------------------

    def call(
        self,
        method: str,
        params: Optional[Json] = None,
        *,
        timeout: float = 60.0,
        idempotency_key: Optional[str] = None,
    ) -> Json:
        """One method of the table in protocol/schema/client.capnp."""
        text = json.dumps(params or {})
        key = idempotency_key or secrets.token_hex(16)
        id_ = "call-" + secrets.token_hex(8)
        frame = wire.call(id_, key, method, text)
        operation = _Operation(id_, lambda _: frame, self._repeat_s)
        for reply in self._replies(operation, time.monotonic() + timeout * _scale()):
            self._check(reply)
            result: Json = json.loads(reply.result_json)
            return result
        raise TandemError("internal", f"{method}: no reply")

    def stream(self, method: str, params: Optional[Json] = None) -> Iterator[Json]:
        """A streaming method: every event once, until the coordinator ends the stream."""
        given = dict(params or {})
        id_ = "call-" + secrets.token_hex(8)

        def make(operation: _Operation) -> bytes:
            after = {"after": operation.last_seq} if operation.last_seq else {}
            return wire.call(id_, "", method, json.dumps({**given, **after}))

        return self._events(_Operation(id_, make, self._repeat_s))

    def status(self) -> Json:
        return self.call("status")

    def submit(self, spec: Json, *, idempotency_key: Optional[str] = None) -> Json:
        """Submits a job; {"job", "state", ...}. spec: model, dataset, adapter
        (or, with train.method full, name), train."""
        return self.call("job.submit", {"spec": spec}, idempotency_key=idempotency_key)

    def watch(self, job: str, after: int = 0) -> Iterator[Json]:
        """A job's events, old ones first; the last has its state and how it ended."""
        return self.stream("job.watch", {"job": job, "after": after})

    def jobs(self) -> list[Json]:
        return list(self._pages("job.list", "jobs"))

    def models(self) -> list[Json]:
        return list(self._pages("model.list", "models"))

    def adapters(self) -> list[Json]:
        return list(self._pages("adapter.list", "adapters"))

    def _pages(self, method: str, name: str) -> Iterator[Json]:
        after = ""
        while True:
            page = self.call(method, {"after": after} if after else {})
            yield from page[name]
            after = page.get("next", "")
            if not after:
                return

    # -- operations -----------------------------------------------------------------------------

    def _chunks(self, operation: _Operation, deadline: Optional[float]) -> Iterator[Chunk]:
        for reply in self._replies(operation, None if deadline is None else deadline + 1.0):
            chunk = reply.chunk
            assert chunk is not None
            yield chunk
            if chunk.finish == "none":
                continue
            self._check(reply)
            if chunk.finish in ("cancelled", "error"):
                raise TandemError("cancelled", f"request {chunk.id} ended: {chunk.finish}")

    def _events(self, operation: _Operation) -> Iterator[Json]:
        for reply in self._replies(operation, None):
            self._check(reply)
            if reply.result_json:
                yield json.loads(reply.result_json)

    @staticmethod
    def _check(reply: wire.Reply) -> None:
        if reply.code != "ok":
            raise TandemError(reply.code, reply.message)

    def _replies(self, operation: _Operation, deadline: Optional[float]) -> Iterator[wire.Reply]:
        if operation.id in self._open:
            raise TandemError("conflict", f"an operation with the id {operation.id} is open already")
        if not self._open:
            self._heard = time.monotonic()  # nobody listened before
        self._open[operation.id] = operation
        try:
            while operation.arrived or not operation.ended:
                if operation.arrived:
                    yield operation.arrived.popleft()
                    continue
                if self._refused is not None:
                    raise self._refused
                if deadline is not None and time.monotonic() > deadline:
                    raise TandemError("timeout", f"no answer from {self._endpoint} in time")
                self._step(0.1)
        finally:
            del self._open[operation.id]
            if not operation.ended and self._ready:
                farewell = wire.call_cancel if operation.id.startswith("call-") else wire.cancel
                self._socket_send(farewell(operation.id))

    # -- the connection -------------------------------------------------------------------------

    def _dial(self, key_file: Optional[str]) -> zmq.Socket[bytes]:
        name = "local"
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = True
        socket.sndhwm = socket.rcvhwm = _QUEUE_MESSAGES
        socket.maxmsgsize = wire.FRAME_BYTES_MAX + 256
        socket.handshake_ivl = int(2000 * _scale())
        # The kernel watches the connection: libzmq's own heartbeats abort the process where a
        # connection ends while its input stands still.
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = socket.tcp_keepalive_intvl = 2
        socket.tcp_keepalive_cnt = 2
        socket.tcp_maxrt = int(6000 * _scale())
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
        if key_file is not None:
            key = read_key_file(key_file)
            name = key.name
            socket.curve_publickey = key.public.encode()
            socket.curve_secretkey = key.secret.encode()
            socket.curve_serverkey = key.server.encode()
        socket.routing_id = f"{name}/python-{secrets.token_hex(8)}".encode()
        return socket

    def _socket_send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.DONTWAIT)
            return True
        except zmq.Again:
            return False

    def _step(self, timeout_s: float) -> None:
        """Takes what arrives within the time (at least what is here) and sends what is due."""
        now = time.monotonic()
        due = min((o.due for o in self._open.values() if not o.ended), default=now + timeout_s)
        wait = max(0.0, min(timeout_s, due - now)) if self._ready else min(timeout_s, 0.05)
        if self._socket.poll(int(wait * 1000) + (1 if wait > 0 else 0), zmq.POLLIN):
            for _ in range(_QUEUE_MESSAGES):
                try:
                    frames = self._socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                if len(frames) == 1:
                    self._take(frames[0])
        self._follow_connection()
        self._watch_silence()
        self._send_due()

    def _watch_silence(self) -> None:
        """A coordinator that is there answers pings; one that is not is said hello to again."""
        now = time.monotonic()
        waiting = any(not operation.ended for operation in self._open.values())
        if not self._ready or not waiting or self._heartbeat_s == 0:
            self._heard = now
        elif now - self._heard > _SILENCES_MAX * self._heartbeat_s:
            self._ready, self._away_since, self._hello_sent = False, now, 0.0
        elif now - max(self._heard, self._pinged) > self._heartbeat_s:
            self._pinged = now
            self._socket_send(wire.ping())

    def _follow_connection(self) -> None:
        now = time.monotonic()
        while self._monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"]
            self._changed = now
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected, self._ready, self._hello_sent = True, False, 0.0
            elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self._lost(now)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refused = TandemError(
                    "refused", f"{self._endpoint}: the coordinator refused this key"
                )
        if self._connected and not self._ready and now - self._hello_sent > _HELLO_REPEAT_S * _scale():
            self._hello_sent = now
            self._socket_send(wire.hello(self._program, self._minor))
        if not self._connected and now - self._changed > _REDIAL_S * _scale():
            self._changed = now  # libzmq never dials again after a protocol error
            try:
                self._socket.disconnect(self._endpoint)
            except zmq.ZMQError:
                pass
            self._socket.connect(self._endpoint)

    def _lost(self, now: float) -> None:
        self._connected = False
        if self._ready:
            self._ready = False
            self._away_since = now

    def _unreachable(self) -> TandemError:
        return TandemError(
            "unavailable",
            f"no coordinator answers at {self._endpoint}: is it running? Start one with: tandem up",
        )

    def _send_due(self) -> None:
        now = time.monotonic()
        for operation in self._open.values():
            if operation.ended:
                continue
            if not self._ready:
                if now - max(self._away_since, operation.opened) > self._reconnect_s:
                    raise self._unreachable()
            elif now >= operation.due:
                if self._socket_send(operation.make(operation)):
                    operation.due = now + operation.repeat
                    operation.repeat = min(operation.repeat * 2, _REPEAT_S_MAX * _scale())
                else:
                    operation.due = now + 0.01

    def _take(self, frame: bytes) -> None:
        try:
            reply = wire.decode(frame)
        except TandemError:
            return  # dropped: what matters is asked for again
        self._heard = time.monotonic()
        if reply.kind == "hello":
            self._take_hello(reply)
        operation = self._open.get(reply.id)
        if operation is None or operation.ended:
            return
        if reply.code == "busy" and self._retry_busy(operation, reply):
            return
        if reply.kind == "chunk":
            self._take_chunk(operation, reply)
        elif reply.kind == "callReply":
            self._take_call_reply(operation, reply)

    def _take_hello(self, reply: wire.Reply) -> None:
        major, minor = reply.version
        behind = wire.VERSION_MINOR - minor
        understood = major == wire.VERSION_MAJOR and 0 <= behind <= wire.MINORS_BEFORE
        if reply.code != "ok" and understood and minor != self._minor:
            self._minor, self._hello_sent = minor, 0.0  # say hello again as the older version
        elif reply.code != "ok":
            self._refused = TandemError(reply.code, reply.message)
        elif not understood:
            self._refused = TandemError(
                "refused",
                f"the coordinator speaks version {major}.{minor} of the protocol; this client "
                f"understands {wire.VERSION_MAJOR}.{wire.VERSION_MINOR - wire.MINORS_BEFORE} to "
                f"{wire.VERSION_MAJOR}.{wire.VERSION_MINOR}",
            )
        else:
            self.server, self.version = reply.server, reply.version
            self._heartbeat_s = reply.heartbeat_ms / 1000.0  # scaled by the coordinator
            if not self._ready:
                for operation in self._open.values():
                    operation.due = 0.0
            self._ready = True

    def _retry_busy(self, operation: _Operation, reply: wire.Reply) -> bool:
        delay = reply.retry_after_ms / 1000.0
        if delay == 0:  # a 1.0 coordinator says it in the message only
            said = _RETRY_AFTER.search(reply.message)
            delay = int(said.group(1)) / 1000.0 if said else _BUSY_DEFAULT_S
        now = time.monotonic()
        if operation.busy_since is None:
            operation.busy_since = now
        delay = min(delay, _BUSY_S_MAX)
        if now + delay - operation.busy_since > self._busy_s:
            return False
        operation.due = now + delay
        return True

    def _take_chunk(self, operation: _Operation, reply: wire.Reply) -> None:
        chunk = reply.chunk
        assert chunk is not None
        end = chunk.index + len(chunk.tokens)
        if chunk.finish != "error" and chunk.index != operation.next_index:
            if end <= operation.next_index and chunk.finish == "none":
                return  # a repeat
            when = time.monotonic() + _GAP_S
            if operation.due > when:  # ask for exactly the next token, once
                operation.repeats += 1
                if operation.repeats > _REPEATS_WITHOUT_PROGRESS_MAX:
                    raise TandemError(
                        "corrupt", f"request {chunk.id}: token {operation.next_index} did not come"
                    )
                operation.due = when
            return
        operation.next_index = max(operation.next_index, end)
        # Asked for again, it must be the version it began with, whatever the alias means by then.
        operation.model = chunk.adapter or chunk.model or operation.model
        operation.deliver(reply, chunk.finish != "none")

    @staticmethod
    def _take_call_reply(operation: _Operation, reply: wire.Reply) -> None:
        if not (reply.more and reply.code == "ok"):
            operation.deliver(reply, True)
            return
        try:
            seq = int(json.loads(reply.result_json).get("seq", 0))
        except (ValueError, AttributeError, TypeError):
            seq = 0
        if seq and seq <= operation.last_seq:
            return  # a repeat
        operation.last_seq = max(operation.last_seq, seq)
        operation.deliver(reply, False)
