"""The Python client against a platform that runs.

    python_client_test.py ENDPOINT MODEL [--job SPEC.json] [--key KEY_FILE]

Generates, streams, chats, cancels, lists, and with --job submits a job and watches it to its end.
Ends with 0 when every claim held, and prints what did not.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "python"))

from tandem_client import Client, TandemError  # noqa: E402


def expect(held, claim):
    if not held:
        sys.exit(f"not so: {claim}")
    print(f"ok: {claim}")


def check_inference(client, model):
    greedy = {"max_tokens": 16, "temperature": 0.0, "no_cache": True}
    chunks = list(client.generate(model, prompt="Say hello.", **greedy))
    expect(chunks[-1].finish in ("stop", "length"), "a generation ends with its reason")
    expect([c.index for c in chunks] == sorted({c.index for c in chunks}), "tokens come once, in order")
    streamed = "".join(chunk.text for chunk in chunks)
    whole = client.complete(model, prompt="Say hello.", stream=False, **greedy)
    expect(whole.text == streamed, "streamed and whole answers are the same text")
    expect(whole.usage.completion_tokens == len(whole.tokens), "usage counts the tokens")
    answer = client.chat(model, [{"role": "user", "content": "Say hello."}], **greedy)
    expect(answer.text == streamed, "a prompt is a user's message")
    early = client.generate(model, prompt="Count to a thousand.", max_tokens=400, ignore_eos=True)
    next(early)
    early.close()
    expect(client.status() is not None, "a client goes on after it left an answer")
    try:
        client.complete("no-such-model-here", prompt="x")
        expect(False, "an unknown model is an error")
    except TandemError as error:
        expect(error.code == "notFound", "an unknown model is notFound")


def check_job(client, spec):
    job = client.submit(spec)["job"]
    expect(any(item["job"] == job for item in client.jobs()), "a submitted job is listed")
    events = list(client.watch(job))
    expect(events[-1].get("state") == "done", f"the job is done ({events[-1]})")
    seqs = [event["seq"] for event in events if "seq" in event]
    expect(seqs == sorted(set(seqs)) and seqs, "events come once, in order")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("model")
    parser.add_argument("--job", help="a JobSpec as JSON")
    parser.add_argument("--key")
    given = parser.parse_args()
    with Client(given.endpoint, given.key) as client:
        expect(any(item["name"] == given.model for item in client.models()), "the model is listed")
        check_inference(client, given.model)
        if given.job:
            check_job(client, json.loads(Path(given.job).read_text()))


if __name__ == "__main__":
    main()
