"""Writes tests/golden/text/*.json: what jinja2 (with transformers' settings) makes of the chat
templates beside it, and what Hugging Face `tokenizers` makes of sample texts with tokenizers that
are trained here. Needs jinja2 and tokenizers; the tests need only the files.

    python tests/golden/text_goldens.py
"""

import json
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import text_samples
import tokenizer_oracle
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FOLDER = Path(__file__).parent / "text"
NOW = 1_700_000_000


class Generation(Extension):
    """{% generation %}, which transformers defines: the body, as it is."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    """transformers.utils.chat_template_utils._compile_jinja_template, with a fixed clock in UTC."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.fromtimestamp(NOW, timezone.utc).strftime(form)
    return env


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the wéather \"now\" <b>&",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}},
                   "required": ["city"]}}}]
CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}]
CONVERSATIONS = {
    "one": [turn("user", "Hello there")],
    "pair": [turn("user", "What is 2+2?"), turn("assistant", "It is 4.")],
    "system": [turn("system", "Be brief."), turn("user", "  Hi\n"), turn("assistant", "Hi! 😀 "), turn("user", "日本語?"),
               turn("assistant", "<think>\nhmm\n</think>\n\nはい"), turn("user", "bye")],
    "odd": [turn("assistant", "first"), turn("assistant", ""), turn("user", "<tool_response>x</tool_response>")],
    "tools": [turn("user", "Weather?"), turn("assistant", "", tool_calls=CALL), turn("tool", "sunny", name="get_weather"),
              turn("tool", "{\"t\": 20}"), turn("assistant", "Sunny & <20°>", reasoning_content="I think so")],
}
VARIABLES = [
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "add_generation_prompt": True, "enable_thinking": False},
    {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS, "tools_in_user_message": False},
]


def template_goldens():
    cases = []
    for path in sorted((FOLDER / "templates").glob("*.jinja")):
        source = path.read_bytes().decode("utf-8")
        template = environment().from_string(source)
        for name, messages in CONVERSATIONS.items():
            for index, variables in enumerate(VARIABLES):
                given = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
                try:
                    result = {"text": template.render(messages=messages, **given)}
                except Exception as error:  # the template or Python refuses: so has the interpreter to
                    result = {"error": type(error).__name__}
                cases.append({"template": path.name, "conversation": name, "variables": index, **result})
    return {"now": NOW, "conversations": CONVERSATIONS, "variables": VARIABLES, "cases": cases}


def tokenizer_goldens():
    """Small tokenizers and the ids of texts that touch every script, code, emoji and added tokens."""
    train_texts = [text for _, text in text_samples.corpus(7, 600, 4)]
    texts = [text for _, text in text_samples.corpus(8, 160, 1)] + tokenizer_oracle.ADDED_CASES
    texts = [text[:160] for text in texts]
    golden = {"texts": texts, "tokenizers": []}
    for kind in ("gpt2", "gpt2-prefix", "smollm", "llama3", "qwen2", "llama2", "llama2-first", "metaspace", "gemma"):
        reference = tokenizer_oracle.train(kind, 700, train_texts)
        name = f"tokenizer_{kind}.json"
        (FOLDER / name).write_text(json.dumps(json.loads(reference.to_str()), ensure_ascii=False), encoding="utf-8")
        golden["tokenizers"].append({
            "file": name,
            "ids": [reference.encode(text, add_special_tokens=False).ids for text in texts],
            "special_ids": [reference.encode(text).ids for text in texts[:5]],
            "decoded": [None if shown == text else shown for text in texts
                        for shown in [reference.decode(reference.encode(text).ids, skip_special_tokens=True)]]})
    return golden


def write(name, value):
    (FOLDER / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write("chat_templates.json", template_goldens())
    write("tokenizers.json", tokenizer_goldens())
