"""The way from hidden states to logits, as the language model itself goes it, and the loss over what is text.

Most language models multiply with their head and are done. Some add a bias (Phi), scale (Granite, Cohere) or soft-cap
(Gemma 2). These are computed alike here; a language model that does anything else is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_MAPPING, Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

from integrations.llava.prompts import IGNORE_INDEX
from layerfuse.errors import InputError

__all__ = [
    "LOSS_CHUNK",
    "HeadSettings",
    "build_head",
    "chunked_text_loss",
    "decoder_of",
    "describe_head",
    "head_settings",
    "text_loss",
]

LOSS_CHUNK = 1024
"""Positions whose logits are there at a time in `chunked_text_loss`."""

# What configs call these numbers, and whether logits are multiplied with them (or divided by them).
_SCALES = {"logits_scaling": False, "logit_scale": True, "lm_head_multiplier": True}
# What the whole model's config is made of.
_NEEDED = ("hidden_size", "vocab_size", "tie_word_embeddings")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Vocabulary and tokens of the trial that compares two heads.
_ROWS, _TOKENS = 8, 4


def decoder_of(llm: PreTrainedModel) -> PreTrainedModel | None:
    """Find the part of a causal language model that gives hidden states, as AutoModel builds it when a model is loaded.

    None if there is none, such as in decoders of translation models (BART), which AutoModel builds with their encoder.
    """
    kinds: Any = MODEL_MAPPING.get(type(llm.config), ())
    kind = kinds[0] if isinstance(kinds, tuple) and kinds else kinds
    return next((module for module in llm.modules() if module is not llm and isinstance(module, kind)), None)


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the way from hidden states to logits, beside the product with the head's weight.

    Attributes:
        bias: whether the head adds one.
        scale: logits are multiplied with it.
        cap: logits are squeezed to (-cap, cap) by `cap * tanh(logits / cap)`; None leaves them.
    """

    bias: bool = False
    scale: float = 1.0
    cap: float | None = None

    @property
    def finish(self) -> bool:
        """Whether logits differ from what a linear layer gives."""
        return self.scale != 1.0 or self.cap is not None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap the output of a linear layer."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class _FinishingHead(nn.Linear):
    """A head whose logits are scaled or capped."""

    settings = HeadSettings()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.settings(super().forward(hidden))


def build_head(linear: nn.Linear, described: Mapping[str, Any] | None) -> nn.Linear:
    """Make a linear layer the head of a language model: itself, or one with its parameters that scales and caps.

    `described` holds the fields of `HeadSettings`; None is a product alone.
    """
    settings = HeadSettings(**described or {})
    if not settings.finish:
        return linear
    with torch.device("meta"):
        head = _FinishingHead(linear.in_features, linear.out_features, bias=linear.bias is not None)
    head.weight, head.bias = linear.weight, linear.bias
    head.settings = settings
    # As transformers has marked the layer: weights that are there are not drawn anew.
    head._is_hf_initialized = getattr(linear, "_is_hf_initialized", False)  # type: ignore[assignment]
    return head


def describe_head(described: Mapping[str, Any]) -> str:
    """Say in words what a head of these `HeadSettings` does beside the product with its weight."""
    settings = HeadSettings(**described)
    parts = ["adds a bias to its logits"] if settings.bias else []
    if settings.scale != 1.0:
        parts.append(f"multiplies its logits with {settings.scale:g}")
    if settings.cap is not None:
        parts.append(f"soft-caps its logits at {settings.cap:g}")
    return " and ".join(parts)


def head_settings(llm: PreTrainedModel) -> HeadSettings:
    """Find out what a language model does to its hidden states, and try that it is so.

    Its own forward pass runs on random hidden states and a head of a few random rows, in place of its decoder and its
    weights, which may be of any size, on any device, or nowhere. It is not changed.

    Raises:
        ValueError: if its logits cannot be computed here; the message names the type and the reason.
    """
    head: Any = llm.get_output_embeddings()
    decoder = decoder_of(llm)
    if lacking := [name for name in _NEEDED if not hasattr(llm.config, name)]:
        raise _refusal(llm, f"its config has no {lacking[0]}, as those of models of several parts; take its text model")
    if not isinstance(head, nn.Linear):
        raise _refusal(llm, "it has no linear layer as its head")
    if decoder is None:
        raise _refusal(llm, "AutoModel builds no decoder like its own, so that what is saved could not be loaded")
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        raise _refusal(llm, "it takes no embeddings (`inputs_embeds`), which images are")
    if not _takes_cache(decoder):
        raise _refusal(llm, "it takes no cache of transformers', with which tokens are generated about images")
    if getattr(llm, "_is_stateful", False):
        raise _refusal(llm, "it keeps a state from token to token that generation about images does not hand on")
    generator = torch.Generator("cpu").manual_seed(0)
    # The device is said, since models are also built where "meta" is the default.
    options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    hidden = 4 * torch.randn(1, _TOKENS, head.in_features, **options)
    weights = {"weight": torch.randn(_ROWS, head.in_features, **options)}
    if head.bias is not None:
        weights["bias"] = torch.randn(_ROWS, **options)
    try:
        with torch.device("cpu"):
            expected = _own_logits(llm, decoder, hidden, weights)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(llm, f"its head could not be tried ({type(error).__name__}: {error})") from error
    raw = functional.linear(hidden, **weights)
    for settings in _candidates(llm.config, bias="bias" in weights):
        finished = settings(raw)
        if finished.shape == expected.shape and torch.allclose(finished, expected, rtol=1e-4, atol=1e-4):
            return settings
    raise _refusal(llm, "its logits are not a linear head's, scaled or soft-capped as its config says")


def text_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    *,
    image_token_id: int,
    shift_labels: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Cross-entropy, in float32, over the language model's own vocabulary, which has no image token.

    A label that is the image token is measured over all rows, as any other label would be. Logits are (B, T, V), labels
    (B, T) with `IGNORE_INDEX` where nothing is supervised; options are those of transformers' loss, such as
    `num_items_in_batch`.
    """
    if shift_labels is None:
        shift_labels = _shifted(labels)
    shift_labels = shift_labels.to(logits.device)
    own = _text_logits(logits, shift_labels, image_token_id)
    loss: torch.Tensor = ForCausalLMLoss(own, labels, vocab_size, shift_labels=shift_labels, **options)
    return loss


def chunked_text_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    image_token_id: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `text_loss` from hidden states: logits of labelled positions only, `LOSS_CHUNK` of them at a time.

    The backward pass computes each chunk's logits again, so that no tensor of all positions and the whole vocabulary is
    ever there. (torch's own `linear_cross_entropy` is newer than the oldest torch we support, and knows neither
    image token nor heads that scale, cap or are sharded: the head is called as the module that it is.)

    Args:
        head: (positions, D) -> (positions, V).
        hidden: (B, T, D), of the positions of `labels`.
        labels: (B, T), `IGNORE_INDEX` where nothing is supervised.
        image_token_id: as for `text_loss`.
        num_items_in_batch: what the sum is divided by; None is the number of labels.
        places: positions of the flattened batch that are followed by a label, as `Collator` finds them; None looks for
            them, for which the host waits for a GPU.
    """
    targets = _shifted(labels).flatten().to(hidden.device)
    places = (targets != IGNORE_INDEX).nonzero().flatten() if places is None else places.to(hidden.device)
    count = len(places)
    if not count:
        # Distributed engines wait for the head's gradient, be it zero.
        places = places.new_zeros(1)
    chunks = zip(hidden.flatten(0, 1)[places].split(LOSS_CHUNK), targets[places].split(LOSS_CHUNK), strict=True)
    sums = [checkpoint(_summed_loss, head, *chunk, image_token_id, use_reentrant=False) for chunk in chunks]
    total = torch.stack(sums).sum()
    return total / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch, device=total.device)


def _summed_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, image_token_id: int) -> torch.Tensor:
    own = _text_logits(head(hidden), targets, image_token_id)
    return functional.cross_entropy(own, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """For each position, the label that follows."""
    return functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


def _text_logits(logits: torch.Tensor, targets: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Logits in float32 without the image token's, but where it is the target."""
    # A copy, so that the caller's logits stay as they are; a loss would make it in float32 as well.
    own = logits.to(torch.float32, copy=True)
    if image_token_id < own.shape[-1]:
        column = own[..., image_token_id]
        own[..., image_token_id] = torch.where(targets == image_token_id, column, torch.finfo(own.dtype).min)
    return own


def _candidates(config: Any, *, bias: bool) -> Iterator[HeadSettings]:
    scales = [1.0]
    for name, multiplied in _SCALES.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            scales.append(float(value) if multiplied else 1 / float(value))
    caps = [None, *(float(value) for name in _CAPS if (value := getattr(config, name, None)))]
    for cap, scale in product(caps, scales):
        yield HeadSettings(bias=bias, scale=scale, cap=cap)


def _takes_cache(decoder: nn.Module) -> bool:
    parameters = inspect.signature(decoder.forward).parameters
    # Its name depends on the version of transformers; a model of the user's own may leave out the type.
    kinds = [parameters[name].annotation for name in ("cache", "past_key_values") if name in parameters]
    unknown = bool(kinds) and (kinds[0] is inspect.Parameter.empty or isinstance(kinds[0], str))
    return unknown or any(Cache in (kind, *get_args(kind)) for kind in kinds)


@torch.no_grad()
def _own_logits(
    llm: PreTrainedModel, decoder: nn.Module, hidden: torch.Tensor, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Run a language model's own forward pass, with other weights in its head and these hidden states."""
    head = llm.get_output_embeddings()
    name = next(name for name, module in llm.named_modules() if module is head)
    replaced = {f"{name}.{key}": weight for key, weight in weights.items()}
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    with ExitStack() as answers:
        # Most call the decoder that they were built with; some, such as OPT, a part of it.
        for called in {decoder, llm.get_decoder()} - {llm}:
            answers.enter_context(_answering(called, hidden))
        outputs: Any = torch.func.functional_call(llm, replaced, kwargs={"input_ids": ids}, strict=False)
    logits: torch.Tensor = outputs.logits
    return logits


class _Answer(BaseModelOutputWithPast):
    """A decoder's output; what is not there is None, whatever a language model asks for."""

    def __getattr__(self, name: str) -> Any:
        return None


@contextmanager
def _answering(decoder: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    replaced = {name: value for name, value in vars(decoder).items() if name == "forward"}
    vars(decoder)["forward"] = lambda *_, **__: _Answer(last_hidden_state=hidden)
    try:
        yield
    finally:
        del vars(decoder)["forward"]
        vars(decoder).update(replaced)


def _refusal(llm: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"language model type {llm.config.model_type!r} ({type(llm).__name__}) cannot be used: {reason}. Take a causal "
        "language model such as Llama, Qwen, Mistral, Phi, Gemma 2 or Granite."
    )
