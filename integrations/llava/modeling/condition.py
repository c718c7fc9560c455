"""What a fuser with a condition is told about an image: the mean embedding of what is asked about it.

The language model's own embeddings are read, so that no second model is needed, and detached, so that they learn from
the text alone.
"""

from __future__ import annotations

import torch
from torch import nn

from integrations.llava.prompts import IGNORE_INDEX
from layerfuse.errors import InputError
from layerfuse.fusers import Fuser

__all__ = ["blank_condition", "mean_embedding", "read_condition"]


def mean_embedding(embedding: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Average the embeddings of token ids, in float32; no ids give zeros.

    Args:
        embedding: of D numbers per token; takes part in no gradient.
        ids: (images, Q), filled up with `IGNORE_INDEX`.

    Returns:
        (images, D).

    Raises:
        ValueError: on the CPU, if an id is none of the embedding's. Elsewhere the device says so: to look would make
            the host wait for it.
    """
    with torch.no_grad():
        known = ids != IGNORE_INDEX
        try:
            vectors = embedding(ids.masked_fill(~known, 0).long()).float()
        except IndexError as error:
            given, rows = ids[known], len(next(embedding.parameters()))
            raise InputError(
                f"condition holds token ids from {int(given.min())} to {int(given.max())}; the language model's "
                f"embedding knows 0 to {rows - 1}. Give ids of its own tokenizer, filled up with {IGNORE_INDEX}."
            ) from error
        total: torch.Tensor = vectors.masked_fill(~known.unsqueeze(-1), 0).sum(1)
        return total / known.sum(1, keepdim=True).clamp(min=1)


def read_condition(fuser: Fuser, condition: torch.Tensor | None, embedding: nn.Module) -> torch.Tensor | None:
    """Return the condition that a fuser is given.

    Args:
        fuser: takes one or not.
        condition: (images, D_c), or ids as `mean_embedding` takes them.
        embedding: of the language model.

    Raises:
        ValueError: if the fuser needs a condition and there is none, or it is neither vectors nor ids.
    """
    if fuser.condition_channels is None:
        return condition  # which the fuser refuses, if there is one
    if isinstance(condition, torch.Tensor):
        if condition.is_floating_point():
            return condition
        if condition.ndim == 2 and condition.dtype != torch.bool and not condition.is_complex():
            return mean_embedding(embedding, condition)
    if condition is None:
        problem = "condition is missing"
    elif isinstance(condition, torch.Tensor):
        problem = f"condition has shape {tuple(condition.shape)} and dtype {condition.dtype}"
    else:
        problem = f"condition is a {type(condition).__name__}"
    raise InputError(
        f"the model's fuser {fuser.name!r} reads what is asked about each image, and {problem}; give the token ids of "
        f"the questions, (images, Q) filled up with {IGNORE_INDEX}, or vectors, (images, {fuser.condition_channels}). "
        "The Predictor gives it by itself."
    )


def blank_condition(fuser: Fuser, num_images: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return a condition that says nothing, all zeros; None for a fuser that takes none.

    Args:
        fuser: takes one or not.
        num_images: rows.
        like: has device and dtype of the result.
    """
    return None if fuser.condition_channels is None else like.new_zeros(num_images, fuser.condition_channels)
