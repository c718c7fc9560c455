"""Samples in one row, without padding between them: attention that stays within each, and a trial that it does.

transformers finds samples in a row by `position_ids` that begin anew, and masks what lies outside of each. Its `sdpa`
then computes the scores of all pairs of positions in the row, the masked ones too: (n T)² for n samples of T positions
instead of n T². `sdpa_by_sample`, which is registered with transformers under that name, calls its `sdpa` for one
sample after the other, as a rule without a mask, so that torch takes its fastest kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from layerfuse.errors import InputError

__all__ = ["attend_by_sample", "check_packing"]

_NAME = "sdpa_by_sample"
# Positions of the two samples of the trial, and the share of what a joined sample would differ that rounding may.
_FIRST, _SECOND, _TOLERANCE = 7, 5, 0.2


@dataclass(frozen=True)
class SampleBlocks:
    """What stands for the mask of a row of several samples.

    Attributes:
        lengths: of the samples, in their order.
        mask: (1, 1, T, T) of the whole row, True where a position is seen; None if each sees all that come before it.
    """

    lengths: list[int]
    mask: torch.Tensor | None


def attend_by_sample(language_model: PreTrainedModel) -> None:
    """Let a language model with `sdpa` attend to each sample of a row by itself; others stay as they are.

    What it computes for rows of one sample, and for padded ones, does not change.
    """
    if language_model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, _mask)
        language_model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | SampleBlocks | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`: (B, heads, T, channels) to (B, T, heads, channels)."""
    if not isinstance(attention_mask, SampleBlocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Splitting has a backward pass that writes each position once; slicing one that fills a whole row for each sample.
    parts = zip(*(tensor.split(attention_mask.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs, end = [], 0
    for part, length in zip(parts, attention_mask.lengths, strict=True):
        start, end = end, end + length
        options["attention_mask"] = (
            None if attention_mask.mask is None else attention_mask.mask[..., start:end, start:end]
        )
        outputs.append(sdpa_attention_forward(module, *part, **options)[0])
    return torch.cat(outputs, dim=1), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | SampleBlocks | None:
    """As transformers' `sdpa_mask`, but `SampleBlocks` for one row of several samples."""
    options |= {"mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap}
    options |= {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    if batch_size > 1 or q_length != kv_length or attention_mask is not None or use_vmap:
        return masking_utils.sdpa_mask(**options)  # type: ignore[no-any-return]
    zero, places = torch.zeros((), dtype=torch.long, device=device), torch.arange(q_length, device=device)
    # A sample begins where a position does not see the one before it.
    begins = ~mask_function(zero, zero, places, (places - 1).clamp(min=0))
    begins[:1] = True
    first = torch.where(begins, places, 0).cummax(0).values
    sees_first = mask_function(zero, zero, places, first).all()
    sees_next = mask_function(zero, zero, places[:-1], places[1:]).any()
    *found, causal = torch.cat([begins, (sees_first & ~sees_next)[None]]).tolist()
    starts = [place for place, begin in enumerate(found) if begin]
    if len(starts) == 1:
        return masking_utils.sdpa_mask(**options)  # type: ignore[no-any-return]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], q_length], strict=True)]
    return SampleBlocks(lengths, None if causal else masking_utils.sdpa_mask(**options))


@torch.no_grad()
def check_packing(language_model: PreTrainedModel, precision: str = "fp32") -> None:
    """Try that a language model, as `attend_by_sample` leaves it, computes samples in a row as it does each alone.

    What cannot be tried is judged by its type: a model on the meta device, quantised weights, which bitsandbytes packs
    for inference when they are first used, and attention that may need a GPU ("flash_attention_2", "flex_attention").

    Args:
        language_model: the part that gives hidden states.
        precision: "bf16" computes under autocast, as training does.

    Raises:
        ValueError: if it does not; the model is named.
    """
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        raise _refusal(language_model, "it takes no position_ids, which say where a sample begins")
    chunked = getattr(language_model.config, "attention_chunk_size", None) is not None
    if chunked and not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        raise _refusal(language_model, "this version of transformers counts chunks of attention over the whole row")
    weights: Any = language_model.get_input_embeddings().weight
    attend_by_sample(language_model)
    tried = language_model.config._attn_implementation in (_NAME, "eager")
    if not tried or any(own.is_meta or not own.is_floating_point() for own in language_model.parameters()):
        return
    learning = language_model.training
    language_model.eval()
    try:
        with torch.autocast(weights.device.type, torch.bfloat16, enabled=precision == "bf16"):
            packed, joined, alone = _second_sample(language_model, weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _refusal(language_model, f"it cannot be tried ({type(error).__name__}: {error})") from error
    finally:
        language_model.train(learning)
    apart, crossed = ((other - alone).norm() for other in (packed, joined))
    if not apart <= _TOLERANCE * crossed + 1e-6 * alone.norm():
        raise _refusal(language_model, "what it computes of a sample depends on those before it in the row")


def _second_sample(language_model: PreTrainedModel, embedding: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of a sample that stands behind another, that goes on from it, and that is alone."""
    places = torch.arange(_FIRST + _SECOND, device=embedding.device)[None]
    own_places = torch.cat([places[:, :_FIRST], places[:, :_SECOND]], dim=1)
    given = (places, own_places), (places, places), (places[:, _FIRST:], places[:, :_SECOND])
    return [
        language_model(input_ids=row % len(embedding), position_ids=numbers, use_cache=False)[0][0, -_SECOND:].float()
        for row, numbers in given
    ]


def _refusal(language_model: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"padding_free puts samples into one row, which {type(language_model).__name__} cannot take apart: {reason}. "
        "Leave padding_free out, or try model.attention: eager."
    )
