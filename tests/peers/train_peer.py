"""PyTorch + PEFT on the work of bench_train, in the same run on the same machine, as JSON.

    python tests/peers/train_peer.py MODEL.gguf [--ours build/release/bin/bench_train]
                                     [--threads 2] [--rows 8] [--length 512] [--steps 3]
                                     [--modes eager,compiled]
    python tests/peers/train_peer.py --shape llama3-8b --device cuda --rows 2 --length 2048
                                     --ours bin/bench_train --recompute elementwise

LoRA of rank 16 on all linear layers, bf16, AdamW, `rows` documents of `length` tokens per step (no
padding on either side), eager and torch.compile; the median of the measured steps counts. With
--ours, bench_train runs before and after, and "ratio" is ours (the better run) over the better of
PyTorch's two. On a machine that others use as well compare the processor seconds of a step (start
with OMP_WAIT_POLICY=passive, so that waiting costs none).
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of bench_train's shapes, those that a peer is asked about: layers, width, mlp, heads, kv heads,
# head dim, vocabulary, tied.
SHAPES = {"smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152, True),
          "llama3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256, True),
          "llama3-8b": (32, 4096, 14336, 32, 8, 128, 128256, False)}


def read_config(args):
    if args.model:
        folder, name = os.path.split(os.path.abspath(args.model))
        return AutoConfig.from_pretrained(folder, gguf_file=name)
    layers, width, mlp, heads, kv_heads, head_dim, vocab, tied = SHAPES[args.shape]
    return LlamaConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                       vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=131072)


def time_steps(model, args, vocab):
    """Median seconds of a step, on the wall and of the processor, after one for warming up
    (compilation included)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4,
                                  fused=True)
    times, processor = [], []
    for step in range(args.steps + 1):
        ids = torch.randint(vocab, (args.rows, args.length), device=args.device)
        begin, begin_processor = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.device == "cuda":
            torch.cuda.synchronize()
        if step:
            times.append(time.perf_counter() - begin)
            processor.append(time.process_time() - begin_processor)
    return statistics.median(times), statistics.median(processor)


def peer(args):
    tokens = args.rows * args.length
    out = {}
    for mode in args.modes.split(","):
        torch.manual_seed(0)
        # Random weights of the same shapes: a GGUF file's own would stay packed in its blocks and
        # be unpacked in every product. Time does not depend on the values.
        with torch.device(args.device):
            base = AutoModelForCausalLM.from_config(read_config(args), dtype=torch.bfloat16,
                                                    attn_implementation="sdpa")
        base.config.use_cache = False
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=SITES,
                                                task_type="CAUSAL_LM"), autocast_adapter_dtype=True)
        model.train()
        try:
            run = torch.compile(model) if mode == "compiled" else model
            seconds, processor = time_steps(run, args, base.config.vocab_size)
            out[mode] = tokens / seconds
            if args.device == "cuda":
                out[mode + "_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            out[mode + "_processor_seconds"] = processor
        except Exception as error:  # no compiler on this machine: say so, do not hide it
            out[mode] = None
            out[mode + "_error"] = str(error)[:300]
        del model, base
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return out


def ours(args):
    which = ["--model", args.model] if args.model else ["--shape", args.shape]
    command = [args.ours, *which, "--device", args.device, "--threads", str(args.threads),
               "--rows", str(args.rows), "--length", str(args.length), "--steps", str(args.steps),
               "--recompute", args.recompute]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--recompute", default="none", help="of --ours")
    parser.add_argument("--ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", default="eager,compiled")
    args = parser.parse_args()
    if bool(args.model) == bool(args.shape):
        parser.error("name a MODEL or a --shape")
    torch.set_num_threads(args.threads)
    report = {"bench": "train_peer", "torch": torch.__version__, "threads": args.threads,
              "rows": args.rows, "length": args.length, "load_before": os.getloadavg()[0]}
    runs = [ours(args)] if args.ours else []
    report["peer_tokens_per_second"] = peer(args)
    if args.ours:
        runs.append(ours(args))
        report["ours_tokens_per_second"] = [run["tokens_per_second"] for run in runs]
        best = max(v for v in map(report["peer_tokens_per_second"].get, args.modes.split(",")) if v)
        report["ratio"] = max(report["ours_tokens_per_second"]) / best
        report["ours_processor_seconds"] = [run["step_processor_seconds"] for run in runs]
        report["ours"] = runs[-1]
    report["load_after"] = os.getloadavg()[0]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
