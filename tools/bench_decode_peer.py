#!/usr/bin/env python3
"""Decode rates of this engine and of llama.cpp on one machine, alternating in one run, as JSON.

    tools/bench_decode_peer.py --model MODEL.gguf [--threads 2] [--batch 1,4,16] [--rounds 3]

Needs llama-cpp-python in the Python that runs it, and build/release/bin/bench_decode. llama.cpp
reads the same weights, converted by its own quantizer to BF16 and to F16; the better one counts.
Both decode greedily from the same kind of prompt (random tokens), the token picked by argmax.
"""
import argparse
import ctypes
import json
import os
import pathlib
import random
import subprocess
import tempfile
import time

import llama_cpp as L


def convert(model: str, name: str, folder: str) -> str:
    """The model with all matrices in one 16-bit type."""
    out = os.path.join(folder, f"{name}.gguf")
    params = L.llama_model_quantize_default_params()
    params.ftype = {"bf16": L.LLAMA_FTYPE_MOSTLY_BF16, "f16": L.LLAMA_FTYPE_MOSTLY_F16}[name]
    params.allow_requantize = True
    params.nthread = os.cpu_count()
    if L.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not convert {model} to {name}")
    return out


def argmax(logits, vocab: int) -> int:
    import numpy
    return int(numpy.ctypeslib.as_array(logits, shape=(vocab,)).argmax())


class Peer:
    def __init__(self, path: str, args, sequences: int):
        self.model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
        self.vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        p = L.llama_context_default_params()
        length = args.prompt_tokens + args.new_tokens + 16
        p.n_ctx = length * sequences
        p.n_batch = p.n_ubatch = 512
        p.n_seq_max = sequences
        p.n_threads = p.n_threads_batch = args.threads
        if hasattr(p, "kv_unified"):
            p.kv_unified = False
        self.context = L.llama_init_from_model(self.model, p)
        self.batch = L.llama_batch_init(max(512, sequences), 0, 1)
        self.args = args

    def put(self, index: int, token: int, position: int, sequence: int, logits: bool):
        b = self.batch
        b.token[index] = token
        b.pos[index] = position
        b.n_seq_id[index] = 1
        b.seq_id[index][0] = sequence
        b.logits[index] = logits

    def decode(self, count: int):
        self.batch.n_tokens = count
        status = L.llama_decode(self.context, self.batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with {status}")

    def rate(self, sequences: int) -> float:
        """Decode tokens per second over the steps after prefill."""
        L.llama_memory_clear(L.llama_get_memory(self.context), True)
        rng = random.Random(3)
        last = []
        for s in range(sequences):
            for i in range(self.args.prompt_tokens):
                self.put(i, rng.randrange(self.vocab), i, s, i + 1 == self.args.prompt_tokens)
            self.decode(self.args.prompt_tokens)
            last.append(argmax(L.llama_get_logits_ith(self.context, -1), self.vocab))
        begin = time.perf_counter()
        for step in range(self.args.new_tokens):
            for s in range(sequences):
                self.put(s, last[s], self.args.prompt_tokens + step, s, True)
            self.decode(sequences)
            last = [argmax(L.llama_get_logits_ith(self.context, s), self.vocab)
                    for s in range(sequences)]
        return sequences * self.args.new_tokens / (time.perf_counter() - begin)

    def close(self):
        L.llama_batch_free(self.batch)
        L.llama_free(self.context)
        L.llama_model_free(self.model)


def ours(args, batches) -> dict:
    out = subprocess.run(
        [args.bench, "--model", args.model, "--dtype", "bf16", "--threads", str(args.threads),
         "--batch", ",".join(map(str, batches)), "--prompt-tokens", str(args.prompt_tokens),
         "--new-tokens", str(args.new_tokens), "--repeats", "1"],
        check=True, capture_output=True, text=True).stdout
    return {d["batch"]: d["tokens_per_second"] for d in json.loads(out)["decode"]}


def main():
    root = pathlib.Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--bench", default=str(root / "build/release/bin/bench_decode"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    batches = [int(b) for b in args.batch.split(",")]
    silent = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(silent, None)
    L.llama_backend_init()
    rates = {name: {b: [] for b in batches} for name in ("tandem_bf16", "bf16", "f16")}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: convert(args.model, name, folder) for name in ("bf16", "f16")}
        for _ in range(args.rounds):
            for b, rate in ours(args, batches).items():
                rates["tandem_bf16"][b].append(rate)
            for name, path in files.items():
                for b in batches:
                    peer = Peer(path, args, b)
                    peer.rate(b)  # warm-up
                    rates[name][b].append(peer.rate(b))
                    peer.close()
    result = {"bench": "decode_peer", "model": args.model, "threads": args.threads,
              "peer": f"llama-cpp-python {L.__version__}", "prompt_tokens": args.prompt_tokens,
              "new_tokens": args.new_tokens, "rounds": args.rounds, "batches": []}
    for b in batches:
        mid = {name: sorted(r[b])[len(r[b]) // 2] for name, r in rates.items()}
        best = max(mid["bf16"], mid["f16"])
        result["batches"].append({
            "batch": b, "tandem_tokens_per_second": mid["tandem_bf16"],
            "llama_cpp_bf16_tokens_per_second": mid["bf16"],
            "llama_cpp_f16_tokens_per_second": mid["f16"],
            "ratio": mid["tandem_bf16"] / best})
    if 1 in batches and 16 in batches:
        by_batch = {e["batch"]: e["tandem_tokens_per_second"] for e in result["batches"]}
        result["batch_16_over_1"] = by_batch[16] / by_batch[1]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
