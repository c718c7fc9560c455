"""Sampler and parameter groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from integrations.llava.trainer import ModalityLengthSampler, modality_length_indices, parameter_groups

lengths = st.lists(st.integers(-300, 300).filter(bool), min_size=1, max_size=60)


def indices(values: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return modality_length_indices(values, batch_size=batch_size, world_size=world_size, generator=generator)


@given(values=lengths, batch_size=st.integers(1, 8), world_size=st.integers(1, 3))
def test_every_sample_comes_once(values: list[int], batch_size: int, world_size: int) -> None:
    assert sorted(indices(values, batch_size, world_size)) == list(range(len(values)))


@given(values=lengths, batch_size=st.integers(1, 6), world_size=st.integers(1, 3))
def test_global_batches_hold_one_modality_but_for_the_last_ones(
    values: list[int], batch_size: int, world_size: int
) -> None:
    size = batch_size * world_size
    order = indices(values, batch_size, world_size)
    whole = max(0, -(-sum(v > 0 for v in values) // size) - 1) + max(0, -(-sum(v < 0 for v in values) // size) - 1)

    for number in range(whole):
        batch = order[number * size : (number + 1) * size]
        assert len({values[index] > 0 for index in batch}) == 1


def test_index_lists_are_those_of_the_goldens(goldens: Path) -> None:
    cases = json.loads((goldens / "trajectory" / "sampler.json").read_text())

    assert len(cases) == 9
    for case in cases:
        seed = case["torch_manual_seed"]
        if "raises" in case or "indices" not in case:
            with pytest.raises(ValueError, match="has length 0"):
                indices(case["lengths"], case["batch_size"], case["world_size"], seed)
        else:
            assert indices(case["lengths"], case["batch_size"], case["world_size"], seed) == case["indices"], case[
                "note"
            ]


def test_a_length_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        indices([3, 0], 1)


def test_epochs_differ_and_repeat() -> None:
    sampler = ModalityLengthSampler(range(1, 30), batch_size=4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)

    assert len(sampler) == 29
    assert first != second
    assert list(sampler) == first


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "fuser": nn.ModuleDict({"attention": nn.Linear(2, 2), "query_norm": nn.LayerNorm(2)}),
                "multi_modal_projector": nn.Linear(2, 2),
                "language_model": nn.ModuleDict({"norm": nn.RMSNorm(2), "frozen": nn.Linear(2, 2)}),
            }
        )
        self.model["language_model"]["frozen"].requires_grad_(False)


def groups_of(learning_rates: dict[str, float] | None) -> list[tuple[float, float, list[str]]]:
    groups = parameter_groups(_Model(), learning_rate=1.0, learning_rates=learning_rates, weight_decay=0.1)
    return [(group["lr"], group["weight_decay"], group["names"]) for group in groups]


def test_biases_and_norms_are_not_decayed_and_frozen_parameters_left_out() -> None:
    assert groups_of(None) == [
        (1.0, 0.1, ["model.fuser.attention.weight", "model.multi_modal_projector.weight"]),
        (
            1.0,
            0.0,
            [
                "model.fuser.attention.bias",
                "model.fuser.query_norm.weight",
                "model.fuser.query_norm.bias",
                "model.multi_modal_projector.bias",
                "model.language_model.norm.weight",
            ],
        ),
    ]


def test_the_fuser_has_a_learning_rate_of_its_own() -> None:
    assert [(rate, decay) for rate, decay, _ in groups_of({"fuser": 0.5})] == [
        (1.0, 0.1),
        (1.0, 0.0),
        (0.5, 0.1),
        (0.5, 0.0),
    ]
    assert groups_of({"fuser": 0.5})[2][2] == ["model.fuser.attention.weight"]
