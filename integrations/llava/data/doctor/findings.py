"""The kinds of faults that data can have, and one fault of one sample.

A *problem* stops training, or leaves the sample out if the recipe says so. A *warning* is what training copes with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["KINDS", "Fault", "Finding", "Kind"]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its name in reports, its title in tables, what to do about it, and whether training copes."""

    name: str
    title: str
    advice: str
    level: Literal["problem", "warning"] = "problem"


_DOWNLOAD = "Download the file again, or remove the sample."
_REMOVE = "Correct the sample or remove it."

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("not_json", "line is not JSON", _REMOVE),
        Kind("unreadable_sample", "sample cannot be read", _REMOVE),
        Kind("not_an_object", "entry is no object", _REMOVE),
        Kind("no_conversation", "no conversation", _REMOVE),
        Kind("bad_turn", "turn of unknown form", "Write every turn as {'from': 'human' | 'gpt', 'value': text}."),
        Kind("turn_order", "turns out of order", _REMOVE),
        Kind("system_turn", "system turn", "Move its text into the question, or take another template."),
        Kind("image_tags", "tags and images differ in number", "Write one <image> for every image into the question."),
        Kind("caption_form", "no caption of an image", "Finetune on such samples; the template takes captions only."),
        Kind("bad_image_entry", "image entry is no name", "Leave 'image' out, or give one name or a list of names."),
        Kind(
            "outside_folder", "image outside the folder", "Give names inside it; for absolute names, / as the folder."
        ),
        Kind("linked_image", "image is a link", "Download it into the image folder, and give the file's name."),
        Kind("unread_media", "media under a key that is not read", "Give the images' names as 'image'."),
        Kind("half_character", "half of a character in the text", "Write the character whole, or remove it."),
        Kind("backslash_name", "image named with backslashes", "Write names with slashes; --fix does."),
        Kind("wrong_extension", "image has another ending", "Name the file that is there; --fix does."),
        Kind("missing_image", "image missing", _DOWNLOAD),
        Kind("empty_image", "image file of zero bytes", _DOWNLOAD),
        Kind("truncated_image", "image cut off", _DOWNLOAD),
        Kind("broken_image", "image cannot be decoded", _DOWNLOAD),
        Kind("unclear_values", "pixel values without a known range", "Scale them to 0…255, and save 8 bits."),
        Kind("large_image", "image over the pixel limit", "Scale the image down, or allow more pixels."),
        Kind("images_too_long", "images exceed max_length", "Raise max_length, or remove the sample."),
        Kind("nothing_supervised", "every answer is cut off", "Raise max_length, or remove the sample."),
        Kind("too_long", "longer than max_length", "Nothing; the end is cut. Or raise max_length.", "warning"),
        Kind(
            "turned_image",
            "stored turned",
            "Training reads pixels as stored, as the published code does; inference turns them. Or save them upright.",
            "warning",
        ),
        Kind(
            "deep_image", "16 bits a pixel", "Nothing; they are scaled. Or save 8 bits, if they hold less.", "warning"
        ),
        Kind("mislabeled_image", "content differs from ending", "Nothing; images are read by content.", "warning"),
        Kind("duplicate_id", "id used before", "Nothing; but ids in messages are ambiguous then.", "warning"),
        Kind("empty_answer", "answer without text", "Nothing, if the model shall learn to be silent.", "warning"),
        Kind("control_token", "typed control token", "Nothing; it is text and never becomes a token.", "warning"),
    )
}
"""Name -> kind, problems first."""


@dataclass(frozen=True)
class Fault:
    """A fault, without the sample that has it.

    Attributes:
        kind: name of the kind.
        message: what is wrong, as the end of a sentence about the sample.
        image: name of the image at fault.
        repair: name of the file that the sample should have named.
    """

    kind: str
    message: str
    image: str | None = None
    repair: str | None = None

    @property
    def is_problem(self) -> bool:
        """Whether training does not cope with it."""
        return KINDS[self.kind].level == "problem"


@dataclass(frozen=True, kw_only=True)
class Finding(Fault):
    """A fault of a sample.

    Attributes:
        index: of the sample, in its file.
        place: line or entry of the file.
        sample_id: the sample's id, or its index if it has none.
        source: the data set that its image comes from.
    """

    index: int
    place: str
    sample_id: str
    source: str

    def __str__(self) -> str:
        """Describe it in one line."""
        return f"sample {self.sample_id}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Describe it so that JSON can hold it."""
        return {key: value for key, value in asdict(self).items() if value is not None}
