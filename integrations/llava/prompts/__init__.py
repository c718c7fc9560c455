"""Prompts: templates as data, the rule about turns, and conversations written out as text, ids and labels."""

from __future__ import annotations

from . import turns
from .asked import asked_ids
from .chat_template import chat_template
from .derived import TOKENIZER, find_template, misfits, template_of
from .encoder import TextEncoder
from .render import Rendered, render
from .templates import EOS, IGNORE_INDEX, IMAGE_TAG, TEMPLATES, Message, Template, get_template

__all__ = [
    "EOS",
    "IGNORE_INDEX",
    "IMAGE_TAG",
    "TEMPLATES",
    "TOKENIZER",
    "Message",
    "Rendered",
    "Template",
    "TextEncoder",
    "asked_ids",
    "chat_template",
    "find_template",
    "get_template",
    "misfits",
    "render",
    "template_of",
    "turns",
]
