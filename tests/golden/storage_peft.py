"""Golden for PEFT folders: adapters written by PEFT itself on a tiny random Llama, and the scale that PEFT computes for
every site.

    pip install torch transformers peft && python tests/golden/storage_peft.py

Writes storage_peft/NAME/{adapter_config.json,adapter_model.safetensors,scales.json}. Seed 5.
"""
import json
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "patterns": dict(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True,
                     rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
                     alpha_pattern={"model.layers.0.self_attn.k_proj": 5}),
}


def main() -> None:
    here = pathlib.Path(__file__).with_name("storage_peft")
    for name, options in CONFIGS.items():
        torch.manual_seed(5)
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                             num_attention_heads=2, num_key_value_heads=1, vocab_size=32))
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(here / name)
        (here / name / "README.md").unlink(missing_ok=True)
        scales = {module_name.removeprefix("base_model.model."): module.scaling["default"]
                  for module_name, module in model.named_modules() if isinstance(module, LoraLayer)}
        (here / name / "scales.json").write_text(json.dumps(scales, indent=1, sort_keys=True))
        for path in (here / name).iterdir():
            path.chmod(0o644)


if __name__ == "__main__":
    main()
