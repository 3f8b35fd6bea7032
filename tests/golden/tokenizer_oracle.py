"""Holds Tandem's tokenizers against Hugging Face `tokenizers`: same text, same ids, same round trip.

    python tests/golden/tokenizer_oracle.py --dump build/release/bin/tokenizer_dump --gguf MODEL.gguf

compares a model's GGUF vocabulary (needs the Python package gguf), and tokenizers of the GPT-2,
Llama 3, Qwen2 (Qwen3's too), Mistral-Nemo and Llama 2 kind (Mistral 7B's too) trained here on the spot,
over at least 200,000 characters in more than 20 scripts, code and emoji. Prints one JSON object; exits 1 at any difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import text_samples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
                r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# Of Mistral-Nemo: words end where an upper-case letter follows a lower-case one.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NEMO_SPLIT = (rf"""[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"""
              r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")


def digits_then_byte_level():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])


def regex_then_byte_level(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def from_gguf(path):
    """The reference tokenizer of a GGUF file whose `pre` is smollm."""
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    assert get("model") == "gpt2" and get("pre") == "smollm", (get("model"), get("pre"))
    tokens, types = get("tokens"), get("token_type")
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)},
                       merges=[tuple(m.split(" ")) for m in get("merges")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = digits_then_byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t, k in zip(tokens, types) if k == 3])
    return tokenizer


SPACE = "\u2581"
SENTENCEPIECE = {  # kind: normalizer, pre-tokenizer, decoder
    "llama2": (normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), None,
               decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                  decoders.Strip(" ", 1, 0)])),
    "llama2-first": (None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False),
                     decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])),
    "metaspace": (None, pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True),
                  decoders.Metaspace(SPACE, prepend_scheme="always", split=True)),
    "gemma": (normalizers.Replace(" ", SPACE), pre_tokenizers.Split(" ", "merged_with_previous"),
              decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])),
}


def train_sentencepiece(kind, vocab_size, texts):
    """A BPE over characters with bytes to fall back on, as Llama 2's, trained on `texts`."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind != "metaspace"))
    normalizer, pre_tokenizer, decoder = SENTENCEPIECE[kind]
    if normalizer:
        tokenizer.normalizer = normalizer
    # Words are learned from, although none but metaspace splits at them when it encodes.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials + [f"<0x{b:02X}>" for b in range(256)],
        limit_alphabet=200, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<right>", rstrip=True, normalized=False),
                          AddedToken("<left>", lstrip=True, normalized=False), AddedToken("<norm>", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def train(kind, vocab_size, texts):
    """A BPE of one kind, trained on `texts`."""
    if kind in SENTENCEPIECE:
        return train_sentencepiece(kind, vocab_size, texts)
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "nemo")))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "gpt2-prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
        "smollm": digits_then_byte_level,
        "llama3": lambda: regex_then_byte_level(LLAMA3_SPLIT),
        "qwen2": lambda: regex_then_byte_level(QWEN2_SPLIT),
        "nemo": lambda: regex_then_byte_level(NEMO_SPLIT),
    }[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|end|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([
        AddedToken("<tool>", normalized=False), AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<right>", rstrip=True), AddedToken("word", single_word=True),
        AddedToken("<both>", lstrip=True, rstrip=True, normalized=False), AddedToken("    ", normalized=False),
        AddedToken("<tool>x", normalized=False), AddedToken("<norm>", normalized=True)])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if kind in ("llama3", "nemo", "smollm"):
        template = processors.TemplateProcessing(
            single="<|begin|> $A <|end|>" if kind == "smollm" else "<|begin|> $A",
            special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>")),
                            ("<|end|>", tokenizer.token_to_id("<|end|>"))])
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


ADDED_CASES = [
    "<|im_start|>user\nHi<|im_end|>\n", " <left> a <right>  b", "sword word words word", "x <both>  <both> y",
    "a    b     c", "<tool>x<tool>", "<|im_start|><|im_start|>", "<|im_sta", "word", " word ", "<norm> A\u030a é e\u0301<norm>",
    "<|begin|>text<|end|>", "<left><left>  <left>", "<right> <right>", "  <both>  ", "中word中 word\u0301 word_", ""]


def compare(name, reference, arguments, texts):
    """Counts differences between the reference and tokenizer_dump over (kind, text) pairs."""
    lines = "".join(json.dumps(text) + "\n" for _, text in texts)
    result = subprocess.run(arguments, input=lines, capture_output=True, text=True, encoding="utf-8", check=True)
    out = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert len(out) == len(texts), (len(out), len(texts), result.stderr)
    different = []
    for (kind, text), ours in zip(texts, out):
        plain = reference.encode(text, add_special_tokens=False).ids
        special = reference.encode(text, add_special_tokens=True).ids
        want = {"ids": plain, "special_ids": special, "text": reference.decode(plain, skip_special_tokens=False),
                "shown": reference.decode(special, skip_special_tokens=True)}
        got = {key: ours.get(key) for key in want}
        if got != want:
            key = next(k for k in want if got[k] != want[k])
            at = next((i for i, (a, b) in enumerate(zip(want[key], got[key] or [])) if a != b), 0)
            different.append({"kind": kind, "text": text[:80], "what": key, "at": at,
                              "want": want[key][at:at + 10], "got": (got[key] or [])[at:at + 10]})
    return {"tokenizer": name, "texts": len(texts), "characters": sum(len(t) for _, t in texts),
            "scripts": len({k for k, _ in texts} & set(text_samples.SCRIPTS)), "different": len(different),
            "first_differences": different[:3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", required=True, help="the program tokenizer_dump")
    parser.add_argument("--gguf", help="a model whose tokenizer.ggml.pre is smollm")
    parser.add_argument("--per-script", type=int, default=12000, help="characters of each script")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    texts = text_samples.corpus(options.seed, options.per_script) + [("added", t) for t in ADDED_CASES]
    results = []
    if options.gguf:
        results.append(compare("gguf", from_gguf(options.gguf), [options.dump, "--gguf", options.gguf], texts))
    train_texts = [t for _, t in text_samples.corpus(options.seed + 1, 3000)]
    for kind in ("gpt2", "gpt2-prefix", "smollm", "llama3", "qwen2", "nemo", *SENTENCEPIECE):
        reference = train(kind, 3000, train_texts)
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(reference.to_str())
            file.flush()
            results.append(compare(kind, reference, [options.dump, "--json", file.name], texts))
    print(json.dumps({"results": results}, ensure_ascii=False, indent=1))
    return 1 if any(r["different"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
