"""Prompt templates as data: LLaVA-1.5's (arXiv:2310.03744) and those of families of language models.

A template is a few patterns. `{text}` stands for a message, `{system}` for the system turn, `{bos}` and `{eos}` for the
tokenizer's tokens that begin and end a text; other control tokens are spelled out, and listed. Every family is written
by the same code, `render`; `docs/language_models.md` says which source each was held against.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

__all__ = ["BOS", "EOS", "IGNORE_INDEX", "IMAGE_TAG", "TEMPLATES", "Message", "Template", "get_template"]

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""
IMAGE_TAG = "<image>"
"""Marks an image's place in a message."""
BOS, EOS = "{bos}", "{eos}"
"""Stand in patterns for the tokenizer's tokens that begin and end a text, whatever their spelling."""

Message = Mapping[str, str]
"""A turn in LLaVA's format: {"from": "human" | "gpt", "value": text}; in front of all, one from "system"."""

_ROLES = ("system", "human", "gpt")
# Fields that 0.1 stored; it wrote all of them.
_OF_0_1 = {"name", "system", "user", "assistant", "answer_end", "end_token", "caption_only"}


@dataclass(frozen=True)
class Template:
    """How a conversation is written out: `begin`, then for each exchange `user_turn`, `prompt`, `answer`.

    The answer, as its pattern writes it, is supervised, and nothing else.

    Attributes:
        name: what recipes and checkpoints call it.
        begin: pattern in front of all turns. What the tokenizer itself begins texts with stands there anyway.
        system_turn: pattern of the system's text; it is written where `{system}` stands, in `begin` or in the first
            `user_turn`. Where `{system}` stands nowhere, the family knows no system turn.
        system: its text where the conversation has none; None writes no system turn then.
        user_turn: pattern of the human's words; without `{text}` these are left out, and images stand alone.
        prompt: pattern behind which the model answers.
        last_prompt: pattern behind the last `prompt` only, such as the empty thoughts of Qwen3.
        answer: pattern of the model's words. The control token at its end ends answers; without one, its text does.
        after_answer: pattern between an answer and the next turn.
        control_tokens: spellings in the patterns that are tokens; texts never become them.
        strip: roles ("system", "human", "gpt") whose texts lose the blanks around them.
        drop_empty: write an empty message without the blanks around it, and an empty answer that is not the last not
            at all, as LLaVA's code does.
    """

    name: str
    begin: str = "{system}"
    system_turn: str = "{text}"
    system: str | None = None
    user_turn: str = "{text}"
    prompt: str = ""
    last_prompt: str = ""
    answer: str = "{text}{eos}"
    after_answer: str = ""
    control_tokens: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    drop_empty: bool = False

    def __post_init__(self) -> None:
        for pattern in ("system_turn", "answer"):
            if getattr(self, pattern).count("{text}") != 1:
                raise InputError(
                    f"template {self.name!r}: {pattern} is {getattr(self, pattern)!r}; write {{text}} in it once, "
                    "where the message stands."
                )
        if unknown := sorted({*self.strip} - {*_ROLES}):
            raise InputError(
                f"template {self.name!r}: strip has {', '.join(map(repr, unknown))}; roles are {', '.join(_ROLES)}."
            )

    @property
    def caption_only(self) -> bool:
        """Whether the human's words and the system text are left out: images, answer, nothing else."""
        return "{text}" not in self.user_turn

    @property
    def takes_system(self) -> bool:
        """Whether a conversation may have a system turn."""
        return "{system}" in self.begin + self.user_turn

    @property
    def end(self) -> str:
        """The control token that ends an answer, as patterns spell it; empty where a text does."""
        *_, last = self.parts("answer")
        return last if self.is_control(last) else ""

    @property
    def answer_end(self) -> str:
        """Text between an answer's words and the token that ends it."""
        return self.answer.partition("{text}")[2].removesuffix(self.end)

    def is_control(self, part: str) -> bool:
        """Whether a part of a pattern is a control token."""
        return part in (BOS, EOS, *self.control_tokens)

    def parts(self, name: str, *, empty: bool = False) -> list[str]:
        """Parts of a pattern in their order: texts, control tokens, `{text}`, `{system}`.

        Args:
            name: of the pattern.
            empty: whether the message is empty, and the blanks around it go, see `drop_empty`.
        """
        pattern: str = getattr(self, name)
        if empty and self.drop_empty:
            pattern = re.sub(r" ?\{text\} ?", "", pattern)
        spelled = sorted((BOS, EOS, "{text}", "{system}", *self.control_tokens), key=len, reverse=True)
        return [part for part in re.split(f"({'|'.join(map(re.escape, spelled))})", pattern) if part]

    def written(self, role: str, text: str) -> str:
        """A message's text as the template takes it."""
        return text.strip() if role in self.strip else text

    def to_dict(self) -> dict[str, Any]:
        """Describe the template so that JSON can hold it."""
        described = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Template:
        """Make a template of what `to_dict` gave, here or in version 0.1.

        Raises:
            ValueError: if that describes none.
        """
        if described.keys() == _OF_0_1:
            return _between_roles(**described)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described.items()
        }
        for field in dataclasses.fields(cls):
            kind = str if field.name in ("name", "system") else type(field.default)
            value = values.get(field.name, field.default)
            if field.name in values and not isinstance(value, kind) and value != field.default:
                wanted = {tuple: "a list of texts", bool: "true or false"}.get(kind, "text")
                raise InputError(f"the prompt_template has {field.name}={value!r}; give {wanted}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(
                f"the prompt_template is {described!r:.200}, which is none ({error}); store what "
                "get_template(name).to_dict() gives."
            ) from error


def _between_roles(
    name: str,
    system: str = "",
    user: str = "USER",
    assistant: str = "ASSISTANT",
    answer_end: str = "",
    end_token: bool = True,
    caption_only: bool = False,
) -> Template:
    """Template of 0.1's fields: roles with a colon, blanks between all, answers behind their images only."""
    end = answer_end + (EOS if end_token else "")
    if caption_only:
        return Template(name, begin="", user_turn="", answer="{text}" + end)
    return Template(
        name,
        system=system or None,
        system_turn="{text} ",
        user_turn=f"{user}: {{text}} ",
        prompt=f"{assistant}:",
        answer=" {text}" + end,
        drop_empty=True,
    )


_V1 = _between_roles(
    "v1",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
)
assert _V1.system is not None
_GEMMA = Template(
    "gemma",
    begin=BOS,
    user_turn="<start_of_turn>user\n{text}<end_of_turn>\n",
    prompt="<start_of_turn>model\n",
    answer="{text}<end_of_turn>",
    after_answer="\n",
    control_tokens=("<start_of_turn>", "<end_of_turn>"),
    strip=("human", "gpt"),
)
_FAMILIES: Sequence[Template] = (
    Template(
        "chatml",
        system_turn="<|im_start|>system\n{text}<|im_end|>\n",
        user_turn="<|im_start|>user\n{text}<|im_end|>\n",
        prompt="<|im_start|>assistant\n",
        answer="{text}<|im_end|>",
        after_answer="\n",
        control_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    Template(
        "llama-2",
        begin="",
        system_turn="<<SYS>>\n{text}\n<</SYS>>\n\n",
        user_turn="{bos}[INST] {system}{text} [/INST]",
        answer=" {text} {eos}",
        strip=("human", "gpt"),
    ),
    Template(
        "llama-3",
        begin="{bos}{system}",
        system_turn="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
        user_turn="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{text}<|eot_id|>",
        control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=("system", "human", "gpt"),
    ),
    Template(
        "mistral",
        begin=BOS,
        system_turn="{text}\n\n",
        user_turn="[INST] {system}{text}[/INST]",
        answer=" {text}{eos}",
        control_tokens=("[INST]", "[/INST]"),
        strip=("gpt",),
    ),
    Template(
        "phi",
        system_turn="<|system|>\n{text}<|end|>\n",
        user_turn="<|user|>\n{text}<|end|>\n",
        prompt="<|assistant|>\n",
        answer="{text}<|end|>",
        after_answer="\n",
        control_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    _GEMMA,
    dataclasses.replace(
        _GEMMA,
        name="gemma-3",
        system_turn="{text}\n\n",
        user_turn="<start_of_turn>user\n{system}{text}<end_of_turn>\n",
    ),
    dataclasses.replace(_V1, name="vicuna"),
)
TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        _V1,
        dataclasses.replace(_V1, name="llava_v1", system=_V1.system.replace("user", "human")),
        dataclasses.replace(_V1, name="brief", system=None),
        _between_roles("plain", answer_end="\n", end_token=False, caption_only=True),
        *_FAMILIES,
    )
}
"""`v1`: vicuna, as LLaVA-1.5 finetunes. `llava_v1`: the same about a "human". `brief`: v1 without system text. `plain`:
captions, as LLaVA-1.5 pretrains. The others are those of families of language models, under the families' names."""


def get_template(name: str) -> Template:
    """Look a template up.

    Raises:
        ValueError: if no template has that name; the message gives the nearest match and the full list.
    """
    if name not in TEMPLATES:
        raise InputError(unknown_name_message("prompt template", name, TEMPLATES))
    return TEMPLATES[name]
