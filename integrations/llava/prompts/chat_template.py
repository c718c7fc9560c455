"""Prompt templates in Jinja, as `apply_chat_template` reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .encoder import TextEncoder
from .templates import IMAGE_TAG, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_template"]


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt template in Jinja over messages with `role` and `content` (text, or a list of text and image parts).

    For one image in front of the first question it gives the ids that `render` gives; the tokenizer decides how the
    line behind an image is spelled.
    """
    if template.caption_only:
        turns = (
            "{% if message['role'] == 'user' %}{{ images(message) }}{% elif message['role'] != 'system' %}"
            "{% generation %}{{ parts(message) }}{% endgeneration %}{% endif %}"
        )
        return _JINJA.format(line="", system="", turns=turns, generation="")
    # `render` tokenises afresh behind an image; a tokenizer that writes its blank at the very first place only needs
    # that blank spelled out to give the same ids.
    expected = TextEncoder(tokenizer)("\nx", at_start=True)
    plain = tokenizer(f"{IMAGE_TAG}\nx", add_special_tokens=False).input_ids[-len(expected) :]
    line = "\\n" if plain == expected else " \\n"
    end = tokenizer.eos_token if template.end_token else ""
    turns = (
        f"{{% if message['role'] == 'user' %}}{{{{ '{template.user}: ' + parts(message) + ' ' }}}}"
        "{% elif message['role'] == 'system' %}{{ parts(message) + ' ' }}"
        f"{{% else %}}{{{{ '{template.assistant}:' }}}}{{% generation %}}"
        f"{{{{ ' ' + parts(message) + '{template.answer_end + end}' }}}}{{% endgeneration %}}{{% endif %}}"
    )
    # A system message stands in the place of the template's own text.
    own_system = (
        "{%- if not messages or messages[0]['role'] != 'system' -%}{{ "
        f"{json.dumps(f'{template.system} ', ensure_ascii=False)} }}}}{{%- endif -%}}"
    )
    return _JINJA.format(
        line=line,
        system=own_system if template.system else "",
        turns=turns,
        generation="{% if add_generation_prompt %}{{ '" + template.assistant + ":' }}{% endif %}",
    )


_JINJA = (
    "{{%- macro parts(message) -%}}"
    "{{%- if message['content'] is string -%}}{{{{ message['content'] }}}}{{%- else -%}}"
    "{{%- for part in message['content'] -%}}"
    "{{%- if part['type'] == 'image' -%}}{{{{ '<image>{line}' }}}}{{%- else -%}}{{{{ part['text'] }}}}{{%- endif -%}}"
    "{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
    "{{%- macro images(message) -%}}"
    "{{%- for part in message['content'] if part['type'] == 'image' -%}}<image>{{%- endfor -%}}{{%- endmacro -%}}"
    "{system}{{%- for message in messages -%}}{turns}{{%- endfor -%}}{generation}"
)
