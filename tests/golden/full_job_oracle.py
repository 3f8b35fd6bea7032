"""A model that a full fine-tune published, exported and loaded by transformers: the same greedy text.

    python tests/golden/full_job_oracle.py NAME [--bin build/release/bin] [--data-dir DIR]

Against a running platform (tandem up): tandem model export NAME, AutoModelForCausalLM in f32, and
for a few raw prompts 24 greedy tokens of both. The platform must compute in f32 (--dtype f32) for
the texts to agree to the end. Needs torch, transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time"]
TOKENS = 24


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--bin", default="build/release/bin")
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    tandem = [os.path.join(options.bin, "tandem")]
    if options.data_dir:
        tandem += ["--data-dir", options.data_dir]
    folder = os.path.join(tempfile.mkdtemp(), "model")
    subprocess.run([*tandem, "model", "export", options.name, folder], check=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    different = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        theirs = tokenizer.decode(out[0][ids.shape[1]:], skip_special_tokens=True)
        answer = subprocess.run([*tandem, "generate", "--model", options.name, "--prompt", prompt,
                                 "--raw", "--temperature", "0", "--max-tokens", str(TOKENS),
                                 "--json"], check=True, capture_output=True, text=True).stdout
        ours = json.loads(answer.splitlines()[-1])["text"]
        print(f"{prompt!r}: {'same' if ours == theirs else f'{ours!r} against {theirs!r}'}")
        different += ours != theirs
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
