"""What LLaVA-1.5 adds to questions, and where its question files come from."""

from __future__ import annotations

__all__ = ["EVAL_ZIP", "OPTION_LETTER", "SHORT_ANSWER"]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
EVAL_ZIP = "eval.zip of LLaVA-1.5, linked in docs/Evaluation.md of github.com/haotian-liu/LLaVA"
