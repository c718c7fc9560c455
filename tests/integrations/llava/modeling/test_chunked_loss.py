"""Cross-entropy by chunks: loss and gradients of the plain way, without a tensor of all positions and all words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from integrations.llava.modeling import language_head
from integrations.llava.modeling.language_head import build_head, chunked_text_loss, text_loss
from integrations.llava.prompts import IGNORE_INDEX

VOCABULARY, WIDTH, IMAGE = 61, 16, 60
HEADS: dict[str, dict[str, Any] | None] = {
    "product": None,
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "cap and bias": {"bias": True, "cap": 0.7},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_head, "LOSS_CHUNK", 4)


def made(described: dict[str, Any] | None = None) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A head, hidden states of three samples, and labels, one of them the image token; a row has a label first."""
    torch.manual_seed(0)
    head = build_head(nn.Linear(WIDTH, VOCABULARY, bias=bool((described or {}).get("bias"))), described)
    hidden = torch.randn(3, 9, WIDTH, requires_grad=True)
    labels = torch.randint(0, IMAGE, (3, 9))
    labels[torch.rand(3, 9) < 0.4] = IGNORE_INDEX
    labels[1, 0], labels[2, 5] = 7, IMAGE
    return head, hidden, labels


def gradients(loss: torch.Tensor, head: nn.Linear, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    learned = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, [hidden, *learned])


def plain(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    return text_loss(head(hidden), labels, VOCABULARY, image_token_id=IMAGE, **options)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)], ids=["own", "number", "tensor"])
@pytest.mark.parametrize("described", HEADS.values(), ids=HEADS.keys())
def test_loss_and_gradients_are_those_of_all_logits(described: dict[str, Any] | None, num_items: Any) -> None:
    head, hidden, labels = made(described)
    expected = plain(head, hidden, labels, num_items_in_batch=num_items)
    loss = chunked_text_loss(head, hidden, labels, image_token_id=IMAGE, num_items_in_batch=num_items)

    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(loss, head, hidden), gradients(expected, head, hidden), atol=1e-6, rtol=1e-5)


def test_a_frozen_head_hands_gradients_on() -> None:
    head, hidden, labels = made()
    head.requires_grad_(False)
    (expected,) = gradients(plain(head, hidden, labels), head, hidden)
    (given,) = gradients(chunked_text_loss(head, hidden, labels, image_token_id=IMAGE), head, hidden)

    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)


def test_under_autocast_logits_are_bf16_and_losses_float32() -> None:
    head, hidden, labels = made()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(head, hidden, labels)
        loss = chunked_text_loss(head, hidden, labels, image_token_id=IMAGE)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(loss, head, hidden), gradients(expected, head, hidden), atol=1e-3, rtol=1e-2)


def test_without_labels_the_loss_is_zero_and_the_head_has_a_gradient() -> None:
    head, hidden, labels = made()
    loss = chunked_text_loss(
        head, hidden, torch.full_like(labels, IGNORE_INDEX), image_token_id=IMAGE, num_items_in_batch=1
    )
    of_hidden, of_head = gradients(loss, head, hidden)

    assert loss == 0
    assert not of_hidden.any() and not of_head.any()


@contextmanager
def most_logits() -> Iterator[list[int]]:
    """A list that gets, when the block ends, the most positions of a tensor with a logit for each word."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                shape = tuple(getattr(leaf, "shape", ()))
                # The head's weight and its gradient may be transposed.
                if len(shape) > 1 and shape[-1] == VOCABULARY and shape != (WIDTH, VOCABULARY):
                    self.most = max(self.most, leaf.numel() // VOCABULARY)
            return result

    found: list[int] = []
    with Watch() as watch:
        yield found
    found.append(watch.most)


def test_no_more_than_a_chunk_of_logits_is_ever_there() -> None:
    """Neither forward nor backward."""
    head, hidden, labels = made()
    with most_logits() as by_chunks:
        chunked_text_loss(head, hidden, labels, image_token_id=IMAGE).backward()
    with most_logits() as at_once:
        plain(head, hidden, labels).backward()

    assert by_chunks == [4]
    assert at_once == [hidden.shape[0] * hidden.shape[1]]
