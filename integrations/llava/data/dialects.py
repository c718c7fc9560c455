"""Ways to write a sample that are read beside LLaVA's own; each becomes LLaVA's form, which alone the rest knows.

    {"messages": [{"role": "system" | "user" | "assistant", "content": text | parts}], "images": [name, …]}
    {"conversations": [{"from": …, "value": …}], "images": [name, …], "system": text}      ShareGPT, LLaMA-Factory
    {"image": name, "question": text, "answer": text}
    {"image": name, "caption": text}

Parts are OpenAI's: {"type": "text", "text": …}, {"type": "image"} (the next of `images`, or its own "image", "path" or
"url"), {"type": "image_url", "image_url": {"url": name}}; they are joined by line breaks. Where no user's text has an
`<image>` tag, the images stand in front of the first one, as in TRL. A system turn is {"from": "system", "value": …}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from integrations.llava.prompts import IMAGE_TAG

__all__ = ["FORM_KEYS", "as_sample", "with_label"]

FORM_KEYS = (("conversations",), ("messages",), ("question", "answer"), ("caption",))
"""Keys that a sample needs, one of these sets."""

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
# What a dialect has instead of, or beside, `image` and `conversations`.
_READ = {"messages", "conversations", "images", "image", "system", "question", "answer", "caption"}


def as_sample(row: Any) -> Any:
    """An entry of a data file in LLaVA's form.

    What is in none of these forms, or in none throughout, is left as far as it is not understood: the data doctor says
    what is wrong with it.
    """
    if not isinstance(row, Mapping):
        return row
    keys = next((keys for keys in FORM_KEYS if all(key in row for key in keys)), None)
    if keys is None or (keys == ("conversations",) and not _is_foreign(row)):
        return row
    given, media = row["image"] if row.get("image") is not None else row.get("images"), dict[str, Any]()
    names = [] if given is None else [_name(name) for name in (given if isinstance(given, list | tuple) else [given])]
    if keys[0] in ("conversations", "messages"):
        turns = row[keys[0]]
        if not isinstance(turns, list):
            return row
        turns = _turns(turns, names, media)
    else:
        # A question about an image has one; an empty cell of a table is no question without.
        names = names or [""] * ("image" in row)
        question, answer = (row[key] for key in keys) if len(keys) == 2 else ("", row["caption"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if isinstance(row.get("system"), str) and row["system"]:
        turns = [{"from": "system", "value": row["system"]}, *turns]
    kept = {key: value for key, value in row.items() if key not in _READ} | media
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {**kept, **image, "conversations": _tagged(turns, len(names))}


def with_label(sample: Any, label: str) -> Any:
    """A sample whose images' names begin with a label; links and what is no name stay."""
    names = sample.get("image") if isinstance(sample, Mapping) else None
    if isinstance(names, str) and names:
        return {**sample, "image": f"{label}/{names}"}
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return {**sample, "image": [f"{label}/{name}" for name in names]}
    return sample


def _is_foreign(row: Mapping[str, Any]) -> bool:
    """Whether a row with `conversations` is not LLaVA's own."""
    turns, image = row["conversations"], row.get("image")
    if any(isinstance(name, Mapping) for name in (image if isinstance(image, list) else [image])):
        return True
    has_roles = isinstance(turns, list) and any(isinstance(turn, Mapping) and "role" in turn for turn in turns)
    return has_roles or bool(row.get("system")) or (bool(row.get("images")) and image is None)


def _name(given: Any) -> Any:
    """Name of an image file, also of {"path": name} and a file's URL; anything else as it is."""
    if isinstance(given, Mapping):
        given = next((given[key] for key in ("image", "path", "url") if isinstance(given.get(key), str)), given)
    return unquote(given.removeprefix("file://")) if isinstance(given, str) and given.startswith("file://") else given


def _turns(turns: Sequence[Any], names: list[Any], media: dict[str, Any]) -> list[Any]:
    """Turns in LLaVA's form; images that their parts name go into `names`, other media into `media`."""
    given, placed, written = [*names], list[Any](), list[Any]()
    for turn in turns:
        if not isinstance(turn, Mapping) or "from" in turn or turn.get("role") not in _ROLES:
            written.append(turn)
            continue
        content = turn.get("content")
        if isinstance(content, list) and all(map(_is_part, content)):
            content = "\n".join(_texts(content, given, placed, media))
        written.append({"from": _ROLES[turn["role"]], "value": content})
    names[:] = placed + given
    return written


def _is_part(part: Any) -> bool:
    kinds = ("text", "image", "image_url", "video", "video_url")
    return isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") in kinds)


def _texts(parts: Sequence[Any], given: list[Any], placed: list[Any], media: dict[str, Any]) -> Iterator[str]:
    """Text of each part, a tag for an image: its own name is placed, or the next of those that are given."""
    for part in parts:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind == "text":
            yield part if isinstance(part, str) else str(part.get("text") or "")
        elif kind in ("image", "image_url"):
            own = _name(part if kind == "image" and not part.get("image") else part.get(kind))
            if isinstance(own, str):
                placed.append(own)
            elif given:
                placed.append(given.pop(0))
            yield IMAGE_TAG
        else:
            media[kind] = part.get(kind) or part


def _tagged(turns: list[Any], num_images: int) -> list[Any]:
    """Put images in front of the first human's text, where no text says where they stand."""
    humans = [
        place
        for place, turn in enumerate(turns)
        if isinstance(turn, Mapping) and turn.get("from") == "human" and isinstance(turn.get("value"), str)
    ]
    if not humans or any(IMAGE_TAG in turns[place]["value"] for place in humans):
        return turns
    first, text = humans[0], turns[humans[0]]["value"]
    tagged = "\n".join([*[IMAGE_TAG] * num_images, *([text] if text else [])])
    return [*turns[:first], {**turns[first], "value": tagged}, *turns[first + 1 :]] if num_images else turns
