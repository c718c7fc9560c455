"""Prompt templates in Jinja, as `apply_chat_template` reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .encoder import TextEncoder
from .templates import BOS, EOS, IMAGE_TAG, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_template"]


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt template in Jinja over messages with `role` and `content` (text, or a list of text and image parts).

    For an image in front of its question it gives the ids that `render` gives. The token that the tokenizer itself puts
    in front of texts is left to it; it also decides how the line behind an image is spelled.
    """
    encoder = TextEncoder(tokenizer, template.control_tokens)
    blank = {token: _blank_behind(token, tokenizer, encoder) for token in (IMAGE_TAG, tokenizer.bos_token) if token}
    first = _quoted((tokenizer.bos_token or "") + blank.get(tokenizer.bos_token or "", ""))
    values = {
        "{text}": "text",
        "{system}": "(system if loop.first else '')",
        BOS: f"('' if loop.first else {first})" if encoder.begin else first,
        EOS: _quoted(tokenizer.eos_token),
    }

    def expression(name: str, **own: str) -> str:
        filled = [
            " ~ ".join((values | own).get(part) or _quoted(part) for part in template.parts(name, empty=empty))
            for empty in (False, template.drop_empty and name in ("user_turn", "answer"))
        ]
        return filled[0] if filled[0] == filled[1] else f"({filled[0]} if text else {filled[1]})"

    def output(name: str, **own: str) -> str:
        written = expression(name, **own)
        return f"{{{{ {written} }}}}" if written else ""

    if template.caption_only:
        return _PARTS.format(line=blank[IMAGE_TAG]) + _CAPTION.format(answer=output("answer"))
    system_turn = expression("system_turn", **{"{text}": _text(template, "system", "messages[0]")})
    given = "{{ raise_exception(" + _quoted(f"template {template.name} knows no system turn") + ") }}"
    standing = "''"
    if template.system is not None:
        standing = expression("system_turn", **{"{text}": _quoted(template.system)})
    begin = {"{system}": "system", BOS: "''" if encoder.begin else first}
    return _PARTS.format(line=blank[IMAGE_TAG]) + _CONVERSATION.format(
        given_system=f"{{%- set system = {system_turn} -%}}" if template.takes_system else given,
        system=standing,
        begin=output("begin", **begin),
        human=_text(template, "human", "message"),
        gpt=_text(template, "gpt", "message"),
        user=output("user_turn"),
        prompt=output("prompt"),
        last_prompt=output("last_prompt"),
        written="text or loop.last" if template.drop_empty else "true",
        answer=output("answer"),
        after_answer=output("after_answer"),
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text(template: Template, role: str, message: str) -> str:
    return f"parts({message})" + (" | trim" if role in template.strip else "")


def _blank_behind(token: str, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder) -> str:
    """A blank, where `render` tokenises afresh behind a token and the tokenizer would not write its first blank."""
    expected = encoder("\nx", at_start=True)
    plain = tokenizer(f"{token}\nx", add_special_tokens=False).input_ids[-len(expected) :]
    return "" if plain == expected else " "


# An image stands on a line of its own in front of words.
_PARTS = (
    "{{%- macro parts(message) -%}}"
    "{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}{{%- else -%}}"
    "{{%- for part in message['content'] -%}}"
    "{{%- if part['type'] == 'image' -%}}{{{{ '<image>' }}}}"
    "{{%- if message['content'] | rejectattr('type', 'equalto', 'image') | list -%}}{{{{ '{line}\\n' }}}}"
    "{{%- endif -%}}"
    "{{%- else -%}}{{{{ part['text'] }}}}{{%- endif -%}}"
    "{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
)
_CAPTION = (
    "{{%- for message in messages -%}}{{%- set text = parts(message) -%}}"
    "{{%- if message['role'] == 'user' -%}}"
    "{{%- for part in message['content'] if part['type'] == 'image' -%}}{{{{ '<image>' }}}}{{%- endfor -%}}"
    "{{%- elif message['role'] == 'assistant' -%}}"
    "{{%- generation -%}}{answer}{{%- endgeneration -%}}"
    "{{%- endif -%}}{{%- endfor -%}}"
)
# A system message stands in the place of the template's own text.
_CONVERSATION = (
    "{{%- set turns = messages -%}}{{%- set system = {system} -%}}"
    "{{%- if messages and messages[0]['role'] == 'system' -%}}"
    "{{%- set turns = messages[1:] -%}}{given_system}"
    "{{%- endif -%}}"
    "{begin}"
    "{{%- for message in turns -%}}"
    "{{%- if message['role'] == 'user' -%}}"
    "{{%- set text = {human} -%}}{user}"
    "{{%- if not loop.last or add_generation_prompt -%}}{prompt}{{%- endif -%}}"
    "{{%- if loop.last and add_generation_prompt or loop.revindex == 2 and turns[-1]['role'] == 'assistant' -%}}"
    "{last_prompt}{{%- endif -%}}"
    "{{%- elif message['role'] == 'assistant' -%}}"
    "{{%- set text = {gpt} -%}}"
    "{{%- if {written} -%}}{{%- generation -%}}{answer}{{%- endgeneration -%}}"
    "{{%- if not loop.last -%}}{after_answer}{{%- endif -%}}{{%- endif -%}}"
    "{{%- else -%}}{{{{ raise_exception('roles are user and assistant, behind system at most') }}}}"
    "{{%- endif -%}}{{%- endfor -%}}"
)
