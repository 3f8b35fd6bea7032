"""Greedy decoding of random Qwen3 and Mistral models against transformers in f32.

    python tests/golden/family_oracle.py [--binary build/release/bin/greedy_dump]

Each model is served twice: from a Hugging Face folder, and from a GGUF file that the package gguf
writes as llama.cpp's converter does; transformers reads the same file. 16 prompts of 1 to 40 ids,
64 tokens each. Exit code 0: every token is the reference's, but for ties (the two best logits less
than 1e-4 apart; what follows is not compared). Needs torch, transformers, gguf.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import gguf
import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

from greedy_oracle import TIE, TOKENS, reference

SEED, PROMPTS = 20240607, 16
SIZES = dict(vocab_size=499, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
             head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
# Nothing is generated beyond a window: there transformers' answers are another model's.
MODELS = {
    "qwen3": (Qwen3ForCausalLM, "qwen3",
              Qwen3Config(**SIZES, hidden_size=128, num_key_value_heads=2, tie_word_embeddings=True,
                          rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3_window": (Qwen3ForCausalLM, "qwen3",
                     Qwen3Config(**SIZES, hidden_size=128, num_key_value_heads=8,
                                 use_sliding_window=True, sliding_window=128, max_window_layers=2,
                                 rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "mistral": (MistralForCausalLM, "llama",
                MistralConfig(**SIZES, hidden_size=160, num_key_value_heads=4, sliding_window=128,
                              rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
}


def randomise(model):
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * values if p.dim() == 1 else values * 1.5 / math.sqrt(p.shape[1]))


def permuted(weight, heads):
    """As convert_hf_to_gguf.py's LlamaModel.permute."""
    return (weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2).reshape(weight.shape))


def write_gguf(model, arch, path):
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN3 if arch == "qwen3" else gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    tied = {"lm_head.weight"} if c.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, c.num_attention_heads if "q_proj" in name
                              else c.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_config(model):
    """What transformers does not read from the file (key_length); it knows Mistral as a llama."""
    c = model.config
    if c.model_type != "mistral":
        return c
    return LlamaConfig(**SIZES, hidden_size=c.hidden_size, num_key_value_heads=c.num_key_value_heads,
                       rms_norm_eps=c.rms_norm_eps, rope_parameters=c.rope_parameters)


def compare(model, ours, prompts):
    """Prompts whose tokens are the reference's, ties, and what is wrong."""
    same, ties, wrong = 0, 0, []
    for p, prompt in enumerate(prompts):
        ids, gaps = reference(model, prompt)
        differ = [i for i in range(TOKENS) if ids[i] != ours[p][i]]
        if not differ:
            same += 1
        elif gaps[differ[0]] < TIE:
            ties += 1
        else:
            wrong.append({"prompt": p, "position": differ[0], "gap": gaps[differ[0]]})
    return {"identical": same, "ties": ties, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default="build/release/bin/greedy_dump")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(SIZES["vocab_size"], (int(n),), generator=generator).tolist()
               for n in torch.randint(1, 41, (PROMPTS,), generator=generator)]
    failed = False
    for name, (model_class, arch, config) in MODELS.items():
        model = model_class(config).float().eval()
        randomise(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with open(os.path.join(folder, "tokenizer.json"), "w") as file:
                file.write('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
            asked = os.path.join(folder, "prompts.json")
            with open(asked, "w") as file:
                json.dump(prompts, file)
            path = os.path.join(folder, "model.gguf")
            write_gguf(model, arch, path)
            dump = lambda what: json.loads(subprocess.run(
                [args.binary, what, asked, str(TOKENS)], check=True, stdout=subprocess.PIPE).stdout)
            load = lambda **more: AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", **more).eval()
            for form, ours, theirs in (("folder", dump(folder), load()),
                                       ("gguf", dump(path),
                                        load(gguf_file="model.gguf", config=gguf_config(model)))):
                result = compare(theirs, ours, prompts)
                different = len({tuple(ids) for ids in ours})
                print(f"{name}, {form}: {json.dumps(result)}, {different} different answers")
                failed |= bool(result["wrong"]) or different < PROMPTS // 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
