"""Adapters that we export, loaded by PEFT: same logits within a relative error of 1e-4.

    python tests/golden/peft_oracle.py [--binary build/release/bin/peft_dump]

peft_dump trains each golden model a few steps (rsLoRA, three of seven sites), exports the adapter
and writes its logits; PEFT loads the folder onto the same model. Needs torch, transformers, peft.
(The other direction, PEFT's adapters imported here, is in model_golden_test.)
"""

import argparse
import os
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default="build/release/bin/peft_dump")
    args = parser.parse_args()
    worst = 0.0
    for case in sorted(os.listdir(os.path.join(HERE, "model"))):
        folder = os.path.join(HERE, "model", case)
        golden = load_file(os.path.join(folder, "golden.safetensors"))
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([args.binary, case, out], check=True)
            ours = load_file(os.path.join(out, "logits.safetensors"))["logits"]
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                        attn_implementation="eager")
            model = PeftModel.from_pretrained(base, out).eval()
            offsets = golden["offsets"].tolist()
            with torch.no_grad():
                theirs = torch.cat([model(golden["ids"][a:b].long()[None]).logits[0]
                                    for a, b in zip(offsets, offsets[1:])])
        error = float((ours - theirs).norm() / theirs.norm())
        moved = float((theirs - golden["logits_base"]).norm() / theirs.norm())
        print(f"{case}: relative error {error:.2e}, the adapter moves the logits by {moved:.2e}")
        assert moved > 1e-2
        worst = max(worst, error)
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
