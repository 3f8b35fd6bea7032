"""The Python client against a scripted coordinator in the same process.

Needs pyzmq and pycapnp; without them it ends with code 77, which CTest counts as skipped.
"""

import json
import os
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "python"))

try:
    import capnp  # noqa: F401
    import zmq
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

from tandem_client import Client, TandemError, wire  # noqa: E402


class FakeCoordinator:
    """Answers hellos as version 1.`minor`; everything else goes to `handle(request, reply)`."""

    def __init__(self, path, handle, minor=2, heartbeat_ms=0, hellos=1 << 30):
        self.seen = []
        self._handle, self._minor = handle, minor
        self._heartbeat_ms, self._hellos = heartbeat_ms, hellos  # answered; then it is silent
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(f"ipc://{path}")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def of(self, kind):
        return [body for seen, body in self.seen if seen == kind]

    def _run(self):
        while not self._stop.is_set():
            if not self._socket.poll(20):
                continue
            peer, frame = self._socket.recv_multipart()
            with wire._SCHEMA.ClientMessage.from_bytes(frame) as message:
                kind = str(message.which())
                body = getattr(message, kind).to_dict()
            self.seen.append((kind, body))

            def reply(**fields):
                answer = wire._SCHEMA.ServerMessage.new_message(**fields)
                self._socket.send_multipart([peer, answer.to_bytes()])

            if kind != "hello":
                self._handle(kind, body, reply)
            elif len(self.of("hello")) > self._hellos:
                continue
            elif body["version"]["minor"] == self._minor:
                version = {"major": 1, "minor": self._minor}
                reply(
                    hello={
                        "version": version, "server": "fake", "heartbeatMs": self._heartbeat_ms
                    }
                )
            else:
                reply(
                    hello={
                        "status": {"code": "refused", "message": f"understands 1.{self._minor} only"},
                        "version": {"major": 1, "minor": self._minor},
                    }
                )


def token(request, index, last=False):
    return {
        "id": request["id"],
        "index": index,
        "tokens": [100 + index],
        "text": f"{index},",
        "finish": "stop" if last else "none",
    }


class PythonClient(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        os.chmod(self.directory.name, 0o700)
        self.path = os.path.join(self.directory.name, "c")
        self.coordinator = None

    def tearDown(self):
        if self.coordinator:
            self.coordinator.close()
        self.directory.cleanup()

    def serve(self, handle, **options):
        if self.coordinator:
            self.coordinator.close()
        self.coordinator = FakeCoordinator(self.path, handle, **options)

    def client(self):
        return Client(f"ipc://{self.path}")

    def test_names_the_endpoint_when_nobody_answers(self):
        with self.assertRaises(TandemError) as raised:
            Client(f"ipc://{self.path}", connect_timeout=0.2)
        self.assertEqual(raised.exception.code, "unavailable")
        self.assertIn(self.path, raised.exception.message)
        self.assertIn("tandem up", raised.exception.message)

    def test_refuses_here_what_the_coordinator_would_never_answer(self):
        self.serve(lambda kind, body, reply: None)
        with self.client() as client:
            for arguments in (
                {"prompt": "x" * ((1 << 20) + 1)},
                {"prompt": "\ud800"},
                {"prompt": 7},
                {"prompt": "x", "max_tokens": 1 << 70},
                {"messages": [{"role": "user"}]},
                {"messages": [{"role": "tool", "content": "7", "tool_call_id": "x"}]},
                {"tokens": [1, 2.0]},
                {"tokens": ["1"]},
                {"tokens": [1] * ((1 << 18) + 1)},
            ):
                with self.assertRaises(TandemError) as caught:
                    client.generate("base", **arguments)
                self.assertEqual(caught.exception.code, "invalid")
                self.assertNotIn("\n", caught.exception.message)
            with self.assertRaises(TandemError) as caught:
                client.call("status", {"x": "y" * (4 << 20)})
            self.assertEqual(caught.exception.code, "invalid")
        with self.assertRaises(TandemError) as caught:
            Client("nowhere")
        self.assertEqual(caught.exception.code, "invalid")

    def test_says_which_settings_are_the_models(self):
        self.serve(lambda kind, request, reply: reply(chunk=token(request, 0, last=True)))
        with self.client() as client:
            client.complete("m", prompt="hi")
            client.complete("m", prompt="hi", repetition_penalty=1.0)
        said = [r["sampling"]["repetitionPenalty"] for r in self.coordinator.of("generate")]
        self.assertEqual(said, [{"unset": None}, {"value": 1.0}])

    def test_takes_a_text_as_one_stop_string_and_any_array_of_integers_as_tokens(self):
        self.serve(lambda kind, request, reply: reply(chunk=token(request, 0, last=True)))
        with self.client() as client:
            client.complete("m", prompt="hi", stop="END")
            client.complete("m", tokens=memoryview(bytes([3, 4])), stop=["a", "b"])
        asked = self.coordinator.of("generate")
        self.assertEqual([r["sampling"]["stop"] for r in asked], [["END"], ["a", "b"]])
        self.assertEqual(asked[1]["input"]["tokens"], [3, 4])

    def test_gives_up_on_a_coordinator_that_is_connected_and_silent(self):
        self.serve(lambda kind, request, reply: None, heartbeat_ms=100, hellos=1)
        with Client(f"ipc://{self.path}", reconnect_timeout=0.5) as client:
            with self.assertRaises(TandemError) as caught:
                client.complete("m", prompt="hi")
        self.assertEqual(caught.exception.code, "unavailable")
        self.assertTrue(self.coordinator.of("ping"))

    def test_waits_as_long_as_a_silent_request_s_coordinator_answers_pings(self):
        begin = time.monotonic()

        def handle(kind, request, reply):
            if kind == "ping":
                reply(pong={"nonce": request["nonce"]})
                if time.monotonic() - begin > 2:
                    reply(chunk=token(self.coordinator.of("generate")[0], 0, last=True))

        self.serve(handle, heartbeat_ms=100)
        with Client(f"ipc://{self.path}", reconnect_timeout=0.5) as client:
            self.assertEqual(client.complete("m", prompt="hi").tokens, [100])
        self.assertEqual(len(self.coordinator.of("hello")), 1)

    def test_refuses_tcp_without_keys(self):
        with self.assertRaises(TandemError) as raised:
            Client("tcp://127.0.0.1:1")
        self.assertEqual(raised.exception.code, "refused")

    def test_streams_each_token_once_and_asks_for_missing_ones(self):
        def handle(kind, request, reply):
            if kind != "generate":
                return
            start = int(request["nextIndex"])
            if start == 0:
                for index in (0, 0, 1, 3):  # a repeat, and 2 is lost
                    reply(chunk=token(request, index))
            else:
                for index in range(start, 5):
                    reply(chunk=token(request, index, last=index == 4))

        self.serve(handle)
        with self.client() as client:
            whole = client.complete("m", prompt="hi", max_tokens=5)
        self.assertEqual(whole.tokens, [100, 101, 102, 103, 104])
        self.assertEqual(whole.text, "0,1,2,3,4,")
        requests = self.coordinator.of("generate")
        self.assertEqual(requests[0]["sampling"]["maxTokens"]["value"], 5)
        self.assertEqual({request["id"] for request in requests}, {requests[0]["id"]})
        self.assertEqual(int(requests[1]["nextIndex"]), 2)

    def test_goes_on_after_a_restart_at_the_next_token_of_the_same_version(self):
        def first(kind, request, reply):
            if kind == "generate":
                digests = {"model": bytes(32), "adapter": bytes([7] * 32)}
                reply(chunk={**token(request, 0), **digests})
                reply(chunk=token(request, 1))

        def second(kind, request, reply):
            if kind == "generate":
                for index in range(int(request["nextIndex"]), 4):
                    reply(chunk=token(request, index, last=index == 3))

        self.serve(first)
        with self.client() as client:
            got = []
            for chunk in client.generate("alias", prompt="hi"):
                got.extend(chunk.tokens)
                if got == [100, 101]:
                    self.serve(second)
        self.assertEqual(got, [100, 101, 102, 103])
        again = self.coordinator.of("generate")[0]
        self.assertEqual(int(again["nextIndex"]), 2)
        self.assertEqual(again["model"], "07" * 32)

    def test_speaks_the_previous_minor_and_reads_its_delay_from_the_text(self):
        asked = []

        def handle(kind, call, reply):
            if kind != "call":
                return
            asked.append(call)
            if len(asked) == 1:
                status = {"code": "busy", "message": "full: retry after 30 ms"}
                reply(callReply={"callId": call["callId"], "status": status})
            else:
                reply(callReply={"callId": call["callId"], "resultJson": '{"ok": true}'})

        self.serve(handle, minor=0)
        with self.client() as client:
            self.assertEqual(client.version, (1, 0))
            self.assertEqual(client.status(), {"ok": True})
        self.assertEqual(asked[0]["idempotencyKey"], asked[1]["idempotencyKey"])

    def test_what_the_coordinator_would_drop_for_its_size_is_an_error_at_once(self):
        self.serve(lambda *_: None)
        with self.client() as client:
            for ask in (
                lambda: client.call("job.list", idempotency_key="k" * 257),
                lambda: client.call("m" * 1025),
                lambda: client.generate("m", prompt="hi", request_id="r" * 257),
                lambda: client.generate("m" * 1025, prompt="hi"),
                lambda: client.cancel("r" * 257),
                lambda: client.call("data.add", {"x": "x" * (wire.FRAME_BYTES_MAX - (64 << 10))}),
            ):
                with self.assertRaises(TandemError) as raised:
                    ask()
                self.assertEqual(raised.exception.code, "invalid")
                self.assertIn("the limit is", raised.exception.message)
            wire.call("id", "k" * 256, "m" * 1024, "x" * (3 << 20))
        self.assertEqual(self.coordinator.of("call"), [])

    def test_refuses_a_version_outside_the_range(self):
        self.serve(lambda *_: None, minor=7)
        with self.assertRaises(TandemError) as raised:
            self.client()
        self.assertEqual(raised.exception.code, "refused")

    def test_watches_each_event_once_until_the_end(self):
        def handle(kind, call, reply):
            if kind != "call":
                return
            for seq in (1, 2, 2, 3):
                event = json.dumps({"seq": seq})
                reply(callReply={"callId": call["callId"], "resultJson": event, "more": True})
            reply(callReply={"callId": call["callId"], "resultJson": '{"state": "done"}'})

        self.serve(handle)
        with self.client() as client:
            events = list(client.watch("job-1"))
        self.assertEqual(events, [{"seq": 1}, {"seq": 2}, {"seq": 3}, {"state": "done"}])

    def test_raises_errors_as_they_were_said_and_cancels_what_is_left(self):
        def handle(kind, request, reply):
            if kind == "call":
                status = {"code": "notFound", "message": "no job job-9"}
                reply(callReply={"callId": request["callId"], "status": status})
            elif kind == "generate":
                reply(chunk=token(request, 0))

        self.serve(handle)
        with self.client() as client:
            with self.assertRaises(TandemError) as raised:
                client.call("job.show", {"job": "job-9"})
            self.assertEqual(str(raised.exception), "notFound: no job job-9")
            for _ in client.generate("m", prompt="hi"):
                break
            with self.assertRaises(TandemError):
                client.call("job.show", {"job": "job-9"})  # after it the cancel has arrived
        self.assertEqual(len(self.coordinator.of("cancel")), 1)
        with self.assertRaises(TandemError):
            wire.decode(b"not a message at all....")


if __name__ == "__main__":
    unittest.main(verbosity=2)
