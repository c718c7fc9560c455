"""A template made of a tokenizer's own chat template: of what that writes around known words.

Tools and thinking are off. What a chat template does beyond patterns (other text by the number of the turn, the date of
the day) is refused, but for what is written in front of the last answer only, such as Qwen3's empty thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from layerfuse.errors import InputError

from .encoder import TextEncoder
from .render import render
from .templates import BOS, TEMPLATES, Message, Template, get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER", "find_template", "misfits", "own_text", "template_of"]

TOKENIZER = "tokenizer"
"""Name of the template that is made of the tokenizer's own chat template."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SYSTEM = "zqsystemqz"
_WORDS = ("zqaskedqz", "zqsaidqz", "zqagainqz", "zqlastqz")
# What is tried with the finished template: texts with what Jinja or a tokenizer might treat in a way of its own.
_TRIED = ("Is it\nred, or <b>blue</b>?", 'It\'s "red" & 7.', "And  this?", "No\n\nidea", "Sure?", "Yes")
# Llama 3.1 writes the day; its template has this one where there is no clock.
_PATTERNS = ("begin", "system_turn", "user_turn", "prompt", "last_prompt", "answer", "after_answer")
_OPTIONS: dict[str, Any] = {"enable_thinking": False, "thinking": False, "date_string": "26 Jul 2024"}


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Look a template up for a tokenizer, `TOKENIZER` being that tokenizer's own.

    Raises:
        ValueError: if there is none of that name, the tokenizer lacks control tokens of it, or as `template_of`.
    """
    if name == TOKENIZER:
        return template_of(tokenizer)
    template = get_template(name)
    if missing := TextEncoder(tokenizer).lacks(template.control_tokens):
        raise InputError(
            f"template {name!r} writes {', '.join(missing)}, and the language model's tokenizer has no such tokens; "
            f"take the template of its family, {TOKENIZER!r} for the tokenizer's own, or 'v1', which needs none."
        )
    return template


def misfits(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say where a template and a language model's tokenizer do not fit, which training would not notice."""
    encoder, said = TextEncoder(tokenizer), []
    if BOS in template.begin + template.user_turn and not encoder.spelling(BOS):
        said.append("it begins with the tokenizer's first token (bos), which this tokenizer has not")
    if template.caption_only or not tokenizer.chat_template:
        return said
    if difference := _difference(template, tokenizer, _turns(_TRIED)):
        said.append(f"the tokenizer's own chat template writes {difference}; template: {TOKENIZER} takes that one")
    return said


def own_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool | None = None
) -> str:
    """What a tokenizer's chat template writes, up to where an answer begins if none is the last message.

    Raises:
        ValueError: if the template refuses the messages.
    """
    chat = [{"role": _ROLES[message["from"]], "content": message["value"]} for message in messages]
    answer_next = messages[-1]["from"] == "human" if answer_next is None else answer_next
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer_next, **_OPTIONS)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise _refusal(f"it raises {type(error).__name__}: {error}") from error
    assert isinstance(text, str)
    return text


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Take a tokenizer's chat template apart.

    Raises:
        ValueError: if it has none, or that is no matter of patterns.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"template: {TOKENIZER} takes the tokenizer's own chat template, and it has none; name a template "
            f"({', '.join(TEMPLATES)})."
        )
    source = str(tokenizer.chat_template)
    if "strftime_now" in source and "date_string" not in source:
        raise _refusal("it writes the date of the day, which would be another tomorrow")
    chat = _Chat(tokenizer)
    begin, plain = _without_system(chat)
    for count in (1, len(_TRIED) - 1, len(_TRIED)):
        if difference := _difference(plain, tokenizer, _turns(_TRIED[:count])):
            raise _refusal(f"it writes {difference}")
    for template in _with_system(chat, begin, plain):
        tried = [_turns(_TRIED[:count], "Be brief.") for count in (1, len(_TRIED) - 1, len(_TRIED))]
        if not any(_difference(template, tokenizer, turns) for turns in tried):
            return template
    return plain


def _refusal(reason: str) -> InputError:
    return InputError(
        f"the tokenizer's chat template cannot be made a template of ours: {reason}. Name one instead (template: "
        f"{', '.join(TEMPLATES)})."
    )


def _turns(words: Sequence[str], system: str | None = None) -> list[Message]:
    turns: list[Message] = [{"from": "system", "value": system}] if system is not None else []
    return turns + [{"from": ("human", "gpt")[place % 2], "value": word} for place, word in enumerate(words)]


class _Chat:
    """A tokenizer's chat template, asked about known words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos: str = tokenizer.bos_token or ""
        self.controls = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len)[::-1]

    def around(self, messages: Sequence[Message], *, answer_next: bool | None = None) -> list[str]:
        """Texts around the words of messages: one more than there are messages."""
        text, pieces = own_text(self.tokenizer, messages, answer_next=answer_next), []
        for message in messages:
            before, word, text = text.partition(message["value"])
            if not word:
                raise _refusal(f"a message of {_ROLES[message['from']]!r} is missing in what it writes")
            pieces.append(before)
        return [*pieces, text]

    def parts(self, text: str) -> list[str]:
        """A text's control tokens, and what stands between them."""
        return [part for part in re.split(f"({'|'.join(map(re.escape, self.controls))})", text) if part]

    def common(self, first: str, second: str) -> str:
        """Parts with which two texts begin."""
        pairs = zip(self.parts(first), self.parts(second), strict=False)
        return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def made(self, **patterns: str | None) -> Template:
        """A template of patterns in which control tokens are spelled out."""
        written = {
            name: pattern.replace(self.bos, BOS) if pattern and self.bos and name in ("begin", "user_turn") else pattern
            for name, pattern in patterns.items()
        }
        used = "".join(pattern or "" for name, pattern in written.items() if name != "system")
        tokens = tuple(token for token in self.controls if token in self.parts(used))
        described = {"control_tokens": list(tokens), "strip": self._strip()}
        return Template.from_dict({"name": TOKENIZER, **written, **described})

    def _strip(self) -> list[str]:
        """Roles whose words lose the blanks around them."""
        found = []
        for role, word in (("human", _WORDS[0]), ("gpt", _WORDS[1]), ("system", _SYSTEM)):
            plain = _turns(_WORDS, _SYSTEM if role == "system" else None)
            padded = [{**turn, "value": turn["value"].replace(word, f" {word}  ")} for turn in plain]
            try:
                text = own_text(self.tokenizer, plain)
                found += [role] if word in text and text == own_text(self.tokenizer, padded) else []
            except InputError:  # it knows no system turn
                continue
        return found


def _without_system(chat: _Chat) -> tuple[str, Template]:
    """What is written in front of all turns, and a template that knows no system turn."""
    front, first, between, last, tail = chat.around(_turns(_WORDS))
    _, asked = chat.around(_turns(_WORDS[:1]))
    last_prompt = last.removeprefix(first) if last.startswith(first) else None
    if last_prompt is None or not (asked == last if last_prompt else first.startswith(asked)):
        raise _refusal("what stands in front of an answer depends on its turn, or on whether it is being written")
    prompt = first if last_prompt else asked
    # The first control token behind an answer ends it.
    written = list(takewhile(lambda part: part not in chat.controls, parts := chat.parts(between)))
    end = "".join(parts[: len(written) + 1])
    if end == "".join(written) or not tail.startswith(end):
        raise _refusal("no token of the tokenizer ends an answer, whichever turn it stands in")
    rest = between.removeprefix(end)
    after = chat.common(rest, tail.removeprefix(end))
    if not front.endswith(rest.removeprefix(after)):
        after = rest.removesuffix(_common_end(rest, front))
    user = rest.removeprefix(after)
    shown = chat.common(chat.around(_turns(_WORDS[:1]), answer_next=False)[1], prompt)
    begin = front.removesuffix(user)
    return begin, chat.made(
        begin=begin,
        user_turn=f"{user}{{text}}{shown}",
        prompt=prompt.removeprefix(shown),
        last_prompt=last_prompt,
        answer=f"{first.removeprefix(prompt)}{{text}}{end}",
        after_answer=after,
    )


def _with_system(chat: _Chat, begin: str, plain: Template) -> Iterator[Template]:
    """Templates that may be the one with its system turn: in front of all, or inside the first question."""
    try:
        before, behind, *_ = chat.around(_turns(_WORDS, _SYSTEM))
    except InputError:
        return
    user = plain.user_turn.partition("{text}")[0].replace(BOS, chat.bos)
    patterns = {name: getattr(plain, name).replace(BOS, chat.bos) for name in _PATTERNS}
    if behind.endswith(user):
        behind = behind.removesuffix(user)
        if begin and begin.startswith(before) and begin.removeprefix(before).endswith(behind):
            # A text of its own stands where none is given.
            first = chat.bos if before.startswith(chat.bos) else ""
            own = {"begin": first + "{system}", "system": begin.removeprefix(before).removesuffix(behind)}
            yield chat.made(**{**patterns, **own, "system_turn": f"{before.removeprefix(first)}{{text}}{behind}"})
        elif before.startswith(begin):
            own = {"begin": begin + "{system}", "system_turn": f"{before.removeprefix(begin)}{{text}}{behind}"}
            yield chat.made(**{**patterns, **own})
    elif before.startswith(begin + user):
        turn = patterns["user_turn"].replace("{text}", "{system}{text}")
        system_turn = f"{before.removeprefix(begin + user)}{{text}}{behind}"
        yield chat.made(**{**patterns, "user_turn": turn, "system_turn": system_turn})


def _common_end(first: str, second: str) -> str:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]


def _difference(template: Template, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> str:
    """Where the tokenizer's own chat template writes otherwise than a template; nothing where it does not."""
    encoder = TextEncoder(tokenizer, template.control_tokens)
    answer_next = turns[-1]["from"] == "human"
    ours = render(
        turns, template=template, encoder=encoder, image_token_id=-1, num_images=0, answer_next=answer_next
    ).prompt
    try:
        theirs = own_text(tokenizer, turns)
    except InputError as error:
        return str(error)
    if theirs == ours or (theirs.startswith(ours) and not answer_next):
        return ""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    place = sum(1 for _ in same)
    return f"{theirs[place : place + 40]!r} where {ours[place : place + 40]!r} was expected"
