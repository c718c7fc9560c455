"""Chat templates that families of language models are published with, and where they can be read.

They are data of the models, taken over as the named files have them; branches for tools are left out, marked by `…`
in the comment, since nothing here gives any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.integrations.llava.tiny_parts import make_tokenizer

__all__ = ["PUBLISHED", "Published", "family_tokenizer"]


@dataclass(frozen=True)
class Published:
    """A family's chat template.

    Attributes:
        model: whose tokenizer has it.
        source: repository and file where it can be read.
        jinja: the template.
        family: name of our template, None if it is only made from the tokenizer.
        tokens: control tokens that the family's tokenizer adds, beside the first and last of a text.
        bos: the token that begins a text; "" where the tokenizer has none.
        eos: the token that ends a text.
        eats: whether these tokens swallow the blanks behind them.
        adds_bos: whether the tokenizer itself begins texts with that token.
    """

    model: str
    source: str
    jinja: str
    family: str | None
    tokens: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"
    eats: bool = False
    adds_bos: bool = True


_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_CHATML = ("<|im_start|>", "<|im_end|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_TRL = "huggingface/trl trl/chat_templates/"
_LLAMA_CPP = "ggml-org/llama.cpp tests/test-chat-template.cpp"

PUBLISHED: Mapping[str, Published] = {
    "openhermes": Published(
        "teknium/OpenHermes-2.5-Mistral-7B",
        _LLAMA_CPP,
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "chatml",
        _CHATML,
    ),
    "qwen2.5": Published(
        "Qwen/Qwen2.5-7B-Instruct",
        _TRL + "qwen2_5_training.jinja",  # … tools, {% generation %}
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
        "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
        "{%- endif %}{%- for message in messages %}"
        '{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}'
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        '{%- elif message.role == "assistant" %}'
        "{{- '<|im_start|>assistant' }}{{- '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        None,  # writes a system turn of its own
        _CHATML,
        bos="",
        eos="<|im_end|>",
    ),
    "qwen3": Published(
        "Qwen/Qwen3-8B",
        _TRL + "qwen3.jinja",  # … tools
        "{%- if messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        '{%- if ns.multi_step_tool and message.role == "user" and message.content is string %}'
        "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- set content = message.content %}"
        '{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}'
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
        "{%- elif message.role == \"assistant\" %}{%- set reasoning_content = '' %}"
        "{%- if '</think>' in content %}"
        "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index %}"
        "{%- if loop.last or (not loop.last and reasoning_content) %}"
        "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' "
        "+ content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
        "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
        "{%- endif %}{%- endif %}",
        None,
        (*_CHATML, "<think>", "</think>"),
        bos="",
        eos="<|im_end|>",
    ),
    "llama-2": Published(
        "meta-llama/Llama-2-13b-chat-hf",
        "EricLBuehler/mistral.rs mistralrs-core/src/pipeline/mod.rs",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        + _ALTERNATE
        + "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        "llama-2",
    ),
    "llama-3": Published(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        _TRL + "llama3.jinja",
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
        "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "llama-3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "llama-3.2": Published(
        "meta-llama/Llama-3.2-3B-Instruct",
        "ggerganov/llama.cpp models/templates/meta-llama-Llama-3.2-3B-Instruct.jinja",  # … tools
        "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        "{%- endif %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
        '{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}'
        '{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}'
        '{{- "Cutting Knowledge Date: December 2023\n" }}{{- "Today Date: " + date_string + "\n\n" }}'
        '{{- system_message }}{{- "<|eot_id|>" }}'
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        None,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "mistral": Published(
        "mistralai/Mistral-7B-Instruct-v0.3",
        _TRL + "mistral.jinja",  # … tools
        '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}"
        '{%- if message["role"] == "user" %}{%- if loop.last and system_message is defined %}'
        '{{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}'
        '{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}'
        '{%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}'
        "{%- endif %}{%- endfor %}",
        "mistral",
        ("[INST]", "[/INST]"),
    ),
    "mistral-v0.2": Published(
        "mistralai/Mistral-7B-Instruct-v0.2",
        _LLAMA_CPP,
        "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        None,
    ),
    "phi-3": Published(
        "microsoft/Phi-3-mini-4k-instruct",
        _TRL + "phi3.jinja",
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "phi",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        eats=True,
        adds_bos=False,
    ),
    "gemma-2": Published(
        "google/gemma-2-9b-it",
        _TRL + "gemma_training.jinja",  # … {% generation %}
        "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}"
        "{{- raise_exception('System role not supported') -}}{%- endif -%}"
        "{%- for message in messages -%}" + _ALTERNATE + "{%- if message['role'] == 'assistant' -%}"
        "{{- '<start_of_turn>model\n' -}}{{- message['content'] | trim + '<end_of_turn>\n' -}}{%- else -%}"
        "{{- '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' -}}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}",
        "gemma",
        _GEMMA,
        bos="<bos>",
        eos="<eos>",
    ),
    "gemma-3": Published(
        "google/gemma-3-4b-it",
        _TRL + "gemma3_training.jinja",  # … images, {% generation %}
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
        '{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}'
        "{%- for message in loop_messages -%}" + _ALTERNATE + "{%- if message['role'] == 'assistant' -%}"
        "{{ '<start_of_turn>model\n' }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- else -%}"
        "{{ '<start_of_turn>' + message['role'] + '\n' + (first_user_prefix if loop.first else \"\") }}"
        "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
        "gemma-3",
        _GEMMA,
        bos="<bos>",
        eos="<eos>",
    ),
}
"""Short name -> template."""


def family_tokenizer(own: Published, *, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's control tokens, and its way of beginning a text.

    It is byte-level, as GPT-2's, and knows no unknown token; or of SentencePiece's kind, and does.
    """
    if sentencepiece:
        description = json.loads(make_tokenizer("llama").backend_tokenizer.to_str())
        description.update(post_processor=None, added_tokens=[])
        tokenizer = Tokenizer.from_str(json.dumps(description))
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    ends = [token for token in dict.fromkeys((own.bos, own.eos)) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ends])
    tokens = [AddedToken(token, special="think" not in token, rstrip=own.eats) for token in own.tokens]
    tokenizer.add_tokens([token for token in tokens if token.content not in ends])
    if own.bos and own.adds_bos:
        single = [(own.bos, tokenizer.token_to_id(own.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{own.bos} $A", special_tokens=single)
    special = ({"bos_token": own.bos} if own.bos else {}) | ({"unk_token": "<unk>"} if sentencepiece else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=own.eos, chat_template=own.jinja, padding_side="left", **special
    )
