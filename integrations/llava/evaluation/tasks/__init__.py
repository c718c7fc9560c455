"""One file a task; importing this package registers them."""

from __future__ import annotations

from . import detail, paper
from .contains import ContainsTask
from .exact_match import ExactMatchTask
from .multiple_choice import MultipleChoiceTask
from .number import NumberTask
from .yes_no import YesNoTask

__all__ = ["ContainsTask", "ExactMatchTask", "MultipleChoiceTask", "NumberTask", "YesNoTask", "detail", "paper"]
