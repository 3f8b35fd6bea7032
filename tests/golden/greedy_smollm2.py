#!/usr/bin/env python3
"""Greedy continuations of a GGUF model by transformers in f32: the oracle of tests/worker/serve/
greedy_golden.cc.

    python tests/golden/greedy_smollm2.py MODEL.gguf > tests/golden/greedy_smollm2.json

transformers reads the same GGUF file and dequantizes the same values. Per prompt: its ids, 64 ids
by argmax, and the gap between the two largest logits at each step (below 1e-4 either is right).
"""
import json
import os
import sys

import torch
import transformers

NEW_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is photosynthesis?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a terse assistant.<|im_end|>\n<|im_start|>user\nName three primes."
    "<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT name, age FROM users WHERE",
    "Die Hauptstadt von Deutschland ist",
    "La recette de la tarte aux pommes :",
    "Q: How many legs does a spider have?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\ndef softmax(x):\n",
    "The three laws of thermodynamics are",
    "<html>\n<head>\n<title>",
    "In 1969, Neil Armstrong",
    "To be, or not to be,",
    "Water boils at 100 degrees",
    "日本の首都は",
    "The quick brown fox " * 20,
]


def main():
    path = sys.argv[1]
    folder, name = os.path.split(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        row = {"prompt": ids, "ids": [], "gaps": []}
        step, cache = torch.tensor([ids]), None
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                out = model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                top = out.logits[0, -1].topk(2)
                row["ids"].append(int(top.indices[0]))
                row["gaps"].append(round(float(top.values[0] - top.values[1]), 6))
                step = top.indices[:1].view(1, 1)
        rows.append(row)
        print(len(rows), file=sys.stderr)
    print(json.dumps({"new_tokens": NEW_TOKENS, "transformers": transformers.__version__,
                      "rows": rows}, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"'))


if __name__ == "__main__":
    main()
