"""Writes tests/golden/model/: tiny random models in Hugging Face format with what transformers and
PEFT compute for them in f32 on CPU. Run: python tests/golden/model_goldens.py [CASE ...] (torch,
transformers, peft, safetensors). Everything follows from SEED; the weights are bf16 values, so that the files are
small and f32 arithmetic starts from the same numbers everywhere.

Per case: config.json, model.safetensors, adapter/ (PEFT format), golden.safetensors with
  ids, labels [T] i32 and offsets [S + 1] i32: sequences one after another, labels already shifted
  logits_base, logits [T, V]: of the base, and with the adapter; loss [1] with the adapter
  grad.SITE.lora_A / lora_B: d loss / d adapter
and for the cases in TRAINED, of a run of 50 optimizer steps from train.SITE.lora_A/B:
  train_ids, train_labels, train_offsets (all documents), train_micro [n + 1] (documents of each
  micro-batch), train_losses [50], train_grad_norms [50], trained.SITE.lora_A / lora_B
"""

import copy
import math
import os
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, get_scheduler)

SEED = 20240601
HERE = os.path.dirname(os.path.abspath(__file__))
SITES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, ACCUMULATION = 50, 2
SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5)


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


CASES = {
    "llama_tied": (LlamaConfig, LlamaForCausalLM,
                   dict(num_key_value_heads=4, tie_word_embeddings=True,
                        rope_parameters=rope("default"))),
    "llama_grouped": (LlamaConfig, LlamaForCausalLM,
                      dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=12,
                           rope_parameters=rope("default"))),
    "llama_rope_llama3": (LlamaConfig, LlamaForCausalLM,
                          dict(num_key_value_heads=2, tie_word_embeddings=True,
                               rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0,
                                                    high_freq_factor=4.0,
                                                    original_max_position_embeddings=32))),
    "llama_rope_linear": (LlamaConfig, LlamaForCausalLM,
                          dict(num_key_value_heads=1, tie_word_embeddings=True,
                               rope_parameters=rope("linear", factor=2.5))),
    "llama_rope_yarn": (LlamaConfig, LlamaForCausalLM,
                        dict(num_key_value_heads=2, tie_word_embeddings=False,
                             rope_parameters=rope("yarn", factor=4.0,
                                                  original_max_position_embeddings=64))),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM,
              dict(num_key_value_heads=2, tie_word_embeddings=True,
                   rope_parameters=rope("default"))),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM,
              dict(num_key_value_heads=2, tie_word_embeddings=True, head_dim=12,
                   rope_parameters=rope("default"))),
    # No document is as long as the window.
    "mistral": (MistralConfig, MistralForCausalLM,
                dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=12,
                     sliding_window=48, rope_parameters=rope("default"))),
}
TRAINED = {"llama_grouped", "qwen2", "qwen3"}


def randomise(model, generator):
    for name, p in model.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif p.dim() == 2:
            values = values * (1.5 / math.sqrt(p.shape[1]) if "embed" not in name else 0.7)
        else:
            values = values * 0.3
        with torch.no_grad():
            p.copy_(values.to(torch.bfloat16).float())


def document(length, generator, vocab):
    """Tokens of a noisy cycle (something to learn), labels shifted, the first third untrained."""
    start = int(torch.randint(vocab, (1,), generator=generator))
    stride = int(torch.randint(1, 5, (1,), generator=generator))
    ids = [(start + stride * i) % vocab for i in range(length)]
    noise = torch.rand(length, generator=generator)
    for i in range(length):
        if noise[i] < 0.15:
            ids[i] = int(noise[i] * 1000) % vocab
    labels = [ids[i + 1] if i + 1 >= length // 3 and i + 1 < length else -100
              for i in range(length)]
    return ids, labels


def summed_loss(model, ids, labels):
    logits = model(torch.tensor([ids])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels),
                                             ignore_index=-100, reduction="sum")
    return loss, logits


def lora_model(model, seed, with_b):
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, lora_dropout=0.0,
                                            target_modules=SITES, task_type="CAUSAL_LM"))
    if with_b:
        generator = torch.Generator().manual_seed(seed + 1)
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return peft


def site_tensors(peft, prefix, what):
    out = {}
    for name, p in peft.named_parameters():
        if "lora_" in name:
            site = name.replace("base_model.model.", "").replace(".default.weight", "")
            out[f"{prefix}.{site}"] = what(p).detach().clone().contiguous()
    return out


def flat(documents):
    ids = [t for d in documents for t in d[0]]
    labels = [t for d in documents for t in d[1]]
    offsets = [0]
    for d in documents:
        offsets.append(offsets[-1] + len(d[0]))
    return [torch.tensor(x, dtype=torch.int32) for x in (ids, labels, offsets)]


def gradients(model, folder, generator, vocab):
    documents = [document(n, generator, vocab) for n in (24, 1, 41, 17)]
    golden = dict(zip(("ids", "labels", "offsets"), flat(documents)))
    with torch.no_grad():
        golden["logits_base"] = torch.cat([summed_loss(model, *d)[1] for d in documents])
    peft = lora_model(model, SEED, with_b=True)
    peft.save_pretrained(os.path.join(folder, "adapter"))
    trained = sum(label != -100 for d in documents for label in d[1])
    total, logits = 0.0, []
    for d in documents:
        loss, rows = summed_loss(peft, *d)
        total = total + loss
        logits.append(rows.detach())
    (total / trained).backward()
    golden["logits"] = torch.cat(logits)
    golden["loss"] = (total / trained).detach().reshape(1)
    golden.update(site_tensors(peft, "grad", lambda p: p.grad))
    return golden, peft.unload()


def training(model, generator, vocab):
    micro_batches = []
    for _ in range(8):
        count = int(torch.randint(1, 4, (1,), generator=generator))
        micro_batches.append([document(int(torch.randint(8, 30, (1,), generator=generator)),
                                       generator, vocab) for _ in range(count)])
    documents = [d for m in micro_batches for d in m]
    golden = dict(zip(("train_ids", "train_labels", "train_offsets"), flat(documents)))
    micro = [0]
    for m in micro_batches:
        micro.append(micro[-1] + len(m))
    golden["train_micro"] = torch.tensor(micro, dtype=torch.int32)

    peft = lora_model(model, SEED + 2, with_b=False)
    golden.update(site_tensors(peft, "train", lambda p: p))
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.98), eps=1e-8,
                                  weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        first = step * ACCUMULATION % len(micro_batches)
        chosen = [d for m in micro_batches[first:first + ACCUMULATION] for d in m]
        trained = sum(label != -100 for d in chosen for label in d[1])
        optimizer.zero_grad()
        total = 0.0
        for d in chosen:
            loss = summed_loss(peft, *d)[0] / trained
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        scheduler.step()
        losses.append(total)
    golden["train_losses"] = torch.tensor(losses)
    golden["train_grad_norms"] = torch.tensor(norms)
    golden.update(site_tensors(peft, "trained", lambda p: p))
    return golden


def main():
    torch.set_num_threads(1)
    for index, (name, (config_class, model_class, more)) in enumerate(CASES.items()):
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        folder = os.path.join(HERE, "model", name)
        shutil.rmtree(folder, ignore_errors=True)
        generator = torch.Generator().manual_seed(SEED + 100 * index)
        config = config_class(**SIZES, **more, attn_implementation="eager")
        model = model_class(config).float().eval()
        randomise(model, generator)
        # A copy: casting the model itself would round its rope frequencies too.
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        golden, model = gradients(model, folder, generator, config.vocab_size)
        if name in TRAINED:
            golden.update(training(model, generator, config.vocab_size))
        save_file(golden, os.path.join(folder, "golden.safetensors"))
        for litter in ("generation_config.json", "adapter/README.md"):
            path = os.path.join(folder, litter)
            if os.path.exists(path):
                os.remove(path)
        print(name, "loss", float(golden["loss"]),
              "steps", golden.get("train_losses", torch.zeros(0)).tolist()[::10])


if __name__ == "__main__":
    main()
