"""Greedy decoding against transformers in f32 with the same dequantized weights.

    python tests/golden/greedy_oracle.py MODEL.gguf [--binary build/release/bin/greedy_dump]

20 prompts through the model's chat template (10) and raw (10), 64 tokens each. Exit code 0: every
token is identical, but for ties: positions where the reference's two best logits are less than
1e-4 apart, which are listed (what follows a tie is not compared). Needs torch, transformers, gguf.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS, TIE = 64, 1e-4
CHATS = [
    "What is the capital of France?", "Write a haiku about the sea.",
    "Explain photosynthesis to a child.", "List three uses of a paper clip.",
    "What is 17 + 25?", "Translate 'good morning' to Spanish.", "Who wrote Hamlet?",
    "Give me a recipe for pancakes.", "Why is the sky blue?", "Name a large mammal and describe it.",
]
RAW = [
    "Once upon a time", "The quick brown fox", "def fibonacci(n):\n", "In 1969, humans",
    "Water boils at", "The three primary colours are", "import numpy as np\n\n", "Dear Sir or Madam,",
    "The mitochondria is", "1, 1, 2, 3, 5, 8,",
]


def reference(model, prompt):
    """Greedy tokens with the gap between the two best logits of each."""
    ids, gaps, cache = [], [], None
    feed = torch.tensor([prompt])
    for _ in range(TOKENS):
        with torch.no_grad():
            out = model(feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = torch.topk(out.logits[0, -1].float(), 2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        feed = torch.tensor([[ids[-1]]])
    return ids, gaps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--binary", default="build/release/bin/greedy_dump")
    args = parser.parse_args()
    folder, name = os.path.split(os.path.abspath(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    prompts = [tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                       add_generation_prompt=True, tokenize=False),
                         add_special_tokens=False)["input_ids"] for text in CHATS]
    prompts += [tokenizer(text)["input_ids"] for text in RAW]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(prompts, file)
        file.flush()
        ours = json.loads(subprocess.run([args.binary, args.model, file.name, str(TOKENS)],
                                         check=True, stdout=subprocess.PIPE).stdout)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    same, ties, wrong = 0, [], []
    for p, prompt in enumerate(prompts):
        ids, gaps = reference(model, prompt)
        differ = [i for i in range(TOKENS) if ids[i] != ours[p][i]]
        if not differ:
            same += 1
            continue
        first = differ[0]
        (ties if gaps[first] < TIE else wrong).append(
            {"prompt": p, "position": first, "gap": gaps[first], "reference": ids[first],
             "ours": ours[p][first]})
    print(json.dumps({"prompts": len(prompts), "tokens": TOKENS, "identical": same, "ties": ties,
                      "wrong": wrong}, indent=2))
    return 1 if wrong or len(ours) != len(prompts) else 0


if __name__ == "__main__":
    sys.exit(main())
