"""Tokens to text and back. Importing this room is light: tokenizers and jinja2 come when used."""

from quantd.daemon.text.output import OutputText, TextDelta
from quantd.daemon.text.tokenizer import TextModel

__all__ = ["OutputText", "TextDelta", "TextModel"]
