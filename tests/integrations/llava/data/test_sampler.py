"""Samplers: the published index lists, and orders that a resumed run meets again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.data.samplers import ModalityLengthSampler, ShuffleSampler, modality_length_indices

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

    assert any("indices" in case for case in cases)
    for case in cases:
        arguments = (case["lengths"], case["batch_size"], case["world_size"], case["torch_manual_seed"])
        if "indices" in case:
            assert indices(*arguments) == case["indices"], case["note"]
        else:
            with pytest.raises(ValueError, match="has length 0"):
                indices(*arguments)


def test_a_length_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        indices([3, 0], 1)


@pytest.mark.parametrize(
    "sampler", [ModalityLengthSampler(range(1, 30), batch_size=4, seed=3), ShuffleSampler(29, seed=3)]
)
def test_epochs_differ_and_repeat(sampler: ShuffleSampler) -> None:
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)

    assert len(sampler) == 29
    assert sorted(first) == sorted(second) == list(range(29))
    assert first != second
    assert list(sampler) == first


def test_the_first_epoch_has_the_order_of_torchs_own_sampler_behind_a_data_loader() -> None:
    data = list(range(20))
    torch.manual_seed(5)
    expected = [int(batch) for batch in torch.utils.data.DataLoader(data, shuffle=True)]  # type: ignore[arg-type, var-annotated]

    assert list(ShuffleSampler(20, seed=5)) == expected


@given(values=lengths, batch_size=st.integers(1, 4))
def test_global_batches_do_not_depend_on_how_processes_share_them(values: list[int], batch_size: int) -> None:
    """So a run that goes on with another number of processes meets the same batches."""
    size = 4 * batch_size
    one, two, four = (
        indices([abs(value) for value in values], size // world_size, world_size) for world_size in (1, 2, 4)
    )

    def batches(order: list[int]) -> list[list[int]]:
        return [sorted(order[start : start + size]) for start in range(0, len(order), size)]

    assert batches(one) == batches(two) == batches(four)
