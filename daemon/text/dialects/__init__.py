"""How model families write tool calls: one file for each way."""

from collections.abc import Mapping

from quantd.daemon.text.dialects.dialect import Dialect
from quantd.daemon.text.dialects.harmony import Harmony
from quantd.daemon.text.dialects.hermes import Hermes
from quantd.daemon.text.dialects.llama3 import Llama3
from quantd.daemon.text.dialects.mistral import Mistral
from quantd.daemon.text.dialects.pythonic import Pythonic
from quantd.daemon.text.dialects.qwen_coder import QwenCoder

BY_NAME: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (Hermes(), Llama3(), Mistral(), Pythonic(), QwenCoder(), Harmony())
}
_SIGNS = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "arguments")),
    ("pythonic", ("[func_name1(",)),
    ("llama3", ("<|start_header_id|>", '"parameters"')),
    ("llama3", ("<|header_start|>", '"parameters"')),
)
"""What a template that writes calls so has in it; the first that fits."""
_UNKNOWN = ("<arg_key>",)
"""Looks like Hermes and is not."""


def dialect_of(template: str) -> Dialect | None:
    """The one that a chat template is written for; None: it takes no tools, or none is known."""
    if "tools" not in template or any(sign in template for sign in _UNKNOWN):
        return None
    for name, signs in _SIGNS:
        if all(sign in template for sign in signs):
            return BY_NAME[name]
    return None


__all__ = ["BY_NAME", "Dialect", "dialect_of"]
