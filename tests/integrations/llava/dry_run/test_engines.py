"""Memory under the engines: what is shared out, what is gathered, and what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from integrations.llava.config.schema import LoraConfig, StageConfig
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.dry_run.facts import ModelFacts, build_on_meta, model_facts
from integrations.llava.dry_run.memory import GIB, RESERVE, Memory, engines_for, estimate_memory
from integrations.llava.modeling import RecipeParts

SHARDED = ("zero3", "fsdp2")


@pytest.fixture(scope="module")
def full_size() -> tuple[ModelFacts, StageConfig]:
    recipe = load_recipe("mmfuser_7b")
    return model_facts(build_on_meta(RecipeParts(recipe.model, offline=True), recipe.finetune)), recipe.finetune


def on(full_size: tuple[ModelFacts, StageConfig], engine: str, num_gpus: int, longest: int = 2048) -> Memory:
    return estimate_memory(*full_size, engine=engine, num_gpus=num_gpus, longest=longest)


@pytest.mark.parametrize("engine", ["ddp", "zero2", *SHARDED])
def test_a_trained_parameter_takes_sixteen_bytes_on_one_gpu(
    full_size: tuple[ModelFacts, StageConfig], engine: str
) -> None:
    facts, memory = full_size[0], on(full_size, engine, 1)

    frozen = 2 * facts.num_frozen
    assert memory.weights + memory.gradients + memory.optimizer - frozen == 16 * facts.num_trained


@pytest.mark.parametrize("engine", SHARDED)
def test_sharding_divides_weights_gradients_and_states(full_size: tuple[ModelFacts, StageConfig], engine: str) -> None:
    one, eight = on(full_size, engine, 1), on(full_size, engine, 8)

    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8)


def test_zero2_keeps_the_weights_whole(full_size: tuple[ModelFacts, StageConfig]) -> None:
    one, eight = on(full_size, "zero2", 1), on(full_size, "zero2", 8)

    assert eight.weights == one.weights
    assert eight.gradients == one.gradients / 8 and eight.optimizer == one.optimizer / 8


def test_ddp_holds_gradients_twice_from_two_gpus_on(full_size: tuple[ModelFacts, StageConfig]) -> None:
    assert on(full_size, "ddp", 2).gradients == 2 * on(full_size, "ddp", 1).gradients


def test_ddp_on_one_gpu_copies_matrices_where_engines_compute_in_bf16(
    full_size: tuple[ModelFacts, StageConfig],
) -> None:
    assert on(full_size, "ddp", 1).copies == 2 * full_size[0].matrices
    # The stream between the blocks is float32 under autocast, bf16 under the engines.
    assert on(full_size, "ddp", 8).activations > 1.5 * on(full_size, "fsdp2", 8).activations


def test_the_finetune_fits_where_it_was_published(full_size: tuple[ModelFacts, StageConfig]) -> None:
    """LLaVA's README: the 7B finetune ran under ZeRO-3 on eight A100s of 40 GB."""
    assert on(full_size, "zero3", 8).fits(39.4) == "yes"
    assert on(full_size, "ddp", 8).fits(79.2) == "no"
    assert on(full_size, "fsdp2", 8).fits(79.2) == "yes"


def test_peak_grows_with_length_and_is_below_the_sum(full_size: tuple[ModelFacts, StageConfig]) -> None:
    for engine in ("ddp", "zero2", *SHARDED):
        short, long = on(full_size, engine, 8, longest=700), on(full_size, engine, 8, longest=2048)
        held = long.weights + long.gradients + long.optimizer
        assert short.peak < long.peak <= held + long.activations + long.logits + long.copies


def test_quantised_weights_take_half_a_byte_or_one_and_are_not_sharded() -> None:
    recipe = load_recipe("mmfuser_7b_qlora")
    facts, config = (
        model_facts(build_on_meta(RecipeParts(recipe.model, offline=True), recipe.finetune)),
        recipe.finetune,
    )
    sizes = {}
    for kind in ("none", "int8", "nf4"):
        stored = replace(config, lora=replace(config.lora, quantize=kind))
        sizes[kind] = estimate_memory(facts, stored, engine="ddp", num_gpus=1, longest=2048).weights

    blocks = facts.quantized
    assert blocks == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert sizes["none"] - sizes["int8"] == blocks
    # 4 bits, an 8-bit scale for 64 weights, a float32 scale for 256 of those.
    assert sizes["int8"] - sizes["nf4"] == pytest.approx(blocks * (1 - 0.5 - 1 / 64 - 4 / (64 * 256)))
    assert engines_for(config, 8) == ("ddp", "zero2")
    assert engines_for(replace(config, lora=LoraConfig()), 8) == ("ddp", "zero2", "zero3", "fsdp2")
    assert engines_for(config, 1) == ("ddp",)


def test_what_fits_leaves_room_for_cuda_and_the_allocator(full_size: tuple[ModelFacts, StageConfig]) -> None:
    memory = on(full_size, "fsdp2", 8)
    peak = memory.peak / GIB

    assert memory.fits(peak) == "no"
    assert memory.fits(peak + RESERVE + 0.01) == "tight"
    assert memory.fits(1.06 * peak + RESERVE) == "yes"


def test_a_batch_that_cannot_be_divided_is_refused(full_size: tuple[ModelFacts, StageConfig]) -> None:
    with pytest.raises(ValueError, match="cannot be divided among 3 processes"):
        on(full_size, "fsdp2", 3)
