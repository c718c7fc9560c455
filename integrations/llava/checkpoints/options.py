"""What a conversion has to be told, because the files do not say it."""

from __future__ import annotations

from dataclasses import dataclass

from layerfuse.preprocessing import Mode

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Choices for a conversion; None leaves them to the files.

    Attributes:
        template: name of the prompt template the model was trained with.
        image_mode: how images are brought to the model's size.
        vision_tower: folder or hub name of the vision model: its weights where the checkpoint has none, its config
            where the checkpoint only names it, and the name that is written where a layout wants one.
    """

    template: str | None = None
    image_mode: Mode | None = None
    vision_tower: str | None = None
