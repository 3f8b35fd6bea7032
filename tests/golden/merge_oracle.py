"""`tandem adapter merge`, loaded by transformers: PEFT's logits of base and adapter, in f32.

    python tests/golden/merge_oracle.py [MODEL.gguf] [--bin build/release/bin]

Each golden model with its PEFT adapter, and a GGUF model with a random adapter of rank 8 on every
linear layer where one is given: model add, adapter import, adapter merge --dtype f32 through a
coordinator of its own; AutoModelForCausalLM loads the folder; relative error at most 1e-4. Needs
torch, transformers, peft, gguf.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
F32 = {"dtype": torch.float32, "attn_implementation": "eager"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = ["What is the capital of France?", "def fibonacci(n):\n", "Once upon a time, in a small"]


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[0].float() for row in rows])


class Platform:
    """A coordinator in a folder of its own."""

    def __init__(self, binaries, folder):
        self.flags = ["--data-dir", os.path.join(folder, "data")]
        self.binaries = binaries
        self.process = subprocess.Popen([os.path.join(binaries, "tandem-coordinator"), *self.flags],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            if self.run("model", "list", check=False) == 0:
                return
            time.sleep(0.1)
        sys.exit("the coordinator does not answer")

    def run(self, *arguments, check=True):
        return subprocess.run([os.path.join(self.binaries, "tandem"), *self.flags, *arguments],
                              check=check, stdout=subprocess.DEVNULL,
                              stderr=None if check else subprocess.DEVNULL).returncode

    def merge(self, name, base, adapter, out):
        self.run("model", "add", name, base)
        self.run("adapter", "import", name + "-lora", adapter, "--model", name)
        self.run("adapter", "merge", name + "-lora", out, "--dtype", "f32")

    def end(self):
        self.process.terminate()
        self.process.wait()


def compare(platform, folder, name, path, base, adapter, rows):
    out = os.path.join(folder, name + "-merged")
    platform.merge(name, path, adapter, out)
    plain = logits(base.eval(), rows)
    theirs = logits(PeftModel.from_pretrained(base, adapter).eval(), rows)
    ours = logits(AutoModelForCausalLM.from_pretrained(out, **F32).eval(), rows)
    error = float((ours - theirs).norm() / theirs.norm())
    moved = float((theirs - plain).norm() / theirs.norm())
    print(f"{name}: relative error {error:.2e}, the adapter moves the logits by {moved:.2e}")
    assert moved > 1e-2
    return error


def golden_folder(case, folder):
    """A copy that has a tokenizer, as a model folder must; nothing here reads it."""
    path = shutil.copytree(os.path.join(HERE, "model", case), os.path.join(folder, case))
    with open(os.path.join(path, "tokenizer.json"), "w") as file:
        file.write('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, '
                   '"pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"}}')
    return path


def random_adapter(path, out):
    folder, name = os.path.split(path)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **F32),
                           LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS,
                                      task_type="CAUSAL_LM"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", nargs="?")
    parser.add_argument("--bin", default="build/release/bin")
    args = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        platform = Platform(os.path.abspath(args.bin), folder)
        try:
            for case in sorted(os.listdir(os.path.join(HERE, "model"))):
                path = golden_folder(case, folder)
                golden = load_file(os.path.join(path, "golden.safetensors"))
                offsets = golden["offsets"].tolist()
                rows = [golden["ids"][a:b].long() for a, b in zip(offsets, offsets[1:])]
                base = AutoModelForCausalLM.from_pretrained(path, **F32)
                worst = max(worst, compare(platform, folder, case, path, base,
                                           os.path.join(path, "adapter"), rows))
            if args.gguf:
                path = os.path.abspath(args.gguf)
                directory, name = os.path.split(path)
                adapter = os.path.join(folder, "random")
                random_adapter(path, adapter)
                tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
                rows = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
                base = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, **F32)
                worst = max(worst, compare(platform, folder, "gguf", path, base, adapter, rows))
        finally:
            platform.end()
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
