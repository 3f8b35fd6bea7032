"""Writes tests/golden/model/CASE/full.safetensors: what transformers computes when all weights of the
tiny models of model_goldens.py are trained, in f32 on CPU. Run after model_goldens.py:
python tests/golden/full_goldens.py [CASE ...] (torch, transformers, safetensors).
`--check FOLDER CASE` instead loads a folder that Tandem published and prints its loss on the case's
documents, which shows that transformers reads it.

Per case: loss [1] and grad.NAME for every weight, of the documents in golden.safetensors; and of a
run of STEPS optimizer steps over its training documents: losses, grad_norms [STEPS] and
trained.NAME of the final weights in TRAINED.
"""

import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, get_scheduler

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = ["llama_grouped", "qwen2", "qwen3"]
STEPS, ACCUMULATION = 12, 2
WEIGHT_DECAY = 0.5
TRAINED = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight",
           "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight",
           "model.layers.0.self_attn.q_norm.weight"]


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    return model.float().eval()


def documents(golden, prefix):
    ids, labels = golden[prefix + "ids"].tolist(), golden[prefix + "labels"].tolist()
    offsets = golden[prefix + "offsets"].tolist()
    return [(ids[a:b], labels[a:b]) for a, b in zip(offsets, offsets[1:])]


def summed_loss(model, ids, labels):
    logits = model(torch.tensor([ids])).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), ignore_index=-100,
                                             reduction="sum")


def mean_loss(model, docs):
    trained = sum(label != -100 for d in docs for label in d[1])
    return sum(summed_loss(model, *d) for d in docs) / trained


def training(model, golden):
    docs, micro = documents(golden, "train_"), golden["train_micro"].tolist()
    parameters = list(model.parameters())
    # As Hugging Face's trainer groups them: norms and biases do not decay.
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        first = step * ACCUMULATION % (len(micro) - 1)
        optimizer.zero_grad()
        loss = mean_loss(model, docs[micro[first]:micro[first + ACCUMULATION]])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return torch.tensor(losses), torch.tensor(norms)


def main():
    torch.set_num_threads(1)
    if len(sys.argv) == 4 and sys.argv[1] == "--check":
        golden = load_file(os.path.join(HERE, "model", sys.argv[3], "golden.safetensors"))
        with torch.no_grad():
            print("loss", mean_loss(load(sys.argv[2]), documents(golden, "")).item())
        return
    for case in sys.argv[1:] or CASES:
        folder = os.path.join(HERE, "model", case)
        golden = load_file(os.path.join(folder, "golden.safetensors"))
        model = load(folder)
        loss = mean_loss(model, documents(golden, ""))
        loss.backward()
        out = {"loss": loss.detach().reshape(1)}
        for name, p in model.named_parameters():
            out["grad." + name] = p.grad.detach().clone()
        out["losses"], out["grad_norms"] = training(model, golden)
        for name, p in model.named_parameters():
            if name in TRAINED:
                out["trained." + name] = p.detach().clone()
        save_file(out, os.path.join(folder, "full.safetensors"))
        print(case, float(loss), out["losses"].tolist())


if __name__ == "__main__":
    main()
