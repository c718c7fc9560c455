"""Operations: what the formulas say is what torch counts while the real model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from integrations.llava.config.schema import ModelConfig, Recipe, StageConfig
from integrations.llava.dry_run.facts import build_on_meta, model_facts
from integrations.llava.dry_run.flops import PartFlops, hours, sample_flops
from integrations.llava.dry_run.gpus import get_gpu
from integrations.llava.modeling import RecipeParts
from integrations.llava.modeling.build import assemble
from tests.integrations.llava.dry_run.estimate_support import make_batch, small_recipe

TEXT = 20
# Of transformers' own attention, every matrix product is counted; a fused one repeats products in its backward pass.
EAGER = {"model.attention": "eager"}
INJECTED = {
    "mmfuser_7b": {"model.injection.pairs": [[3, 0], [24, 1]]},
    "llava15_7b": {
        "model.injection.pairs": [[3, 8, 0]],
        "model.injection.merger": "concat",
        "model.injection.merger_options": {"norm": "layer"},
    },
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "name", ["llava15_7b", "mmfuser_7b", "mmfuser_eva02_7b", "mmfuser_siglip_7b", "concat_7b", "mmfuser_7b_lora"]
)
def test_operations_are_those_that_torch_counts(name: str, stage: str, checkpointing: bool, llm_folder: Path) -> None:
    check_operations(small_recipe(name, llm_folder, EAGER), stage, checkpointing)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", INJECTED)
def test_operations_of_layer_injection_are_the_projectors(name: str, stage: str, llm_folder: Path) -> None:
    check_operations(small_recipe(name, llm_folder, EAGER | INJECTED[name]), stage, checkpointing=True)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["mmfuser_7b", "mmfuser_7b_lora"])
def test_logits_by_chunks_are_computed_twice(name: str, stage: str, llm_folder: Path) -> None:
    check_operations(small_recipe(name, llm_folder, EAGER), stage, checkpointing=True, cross_entropy="chunked")


def check_operations(recipe: Recipe, stage: str, checkpointing: bool, cross_entropy: str = "plain") -> None:
    config = replace(
        recipe.stage(stage),
        precision="fp32",
        gradient_checkpointing=checkpointing,
        cross_entropy=cross_entropy,  # type: ignore[arg-type]
    )
    assembled = assemble(recipe.model, config)
    model = assembled.model.train()
    if checkpointing:
        switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})
    # The backbone's attention as matrix products: which fused kernels torch counts depends on its version and the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(**make_batch(assembled, samples=1, text=TEXT), cross_entropy=cross_entropy).loss
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()

    parts = estimate(recipe.model, config)

    # Torch does not count the weighted sums of deformable attention.
    fuser = forward.get_flop_counts().get("FusedLlavaForConditionalGeneration.model.fuser", {})
    uncounted = parts["fuser"].forward - sum(fuser.values())
    assert 0 <= uncounted <= 0.3 * parts["fuser"].forward
    # Older releases of transformers compute the angles of rotary positions as a matrix product.
    rotary = forward.get_flop_counts().get("FusedLlavaForConditionalGeneration.model.language_model.rotary_emb", {})
    assert sum(part.forward for part in parts.values()) - uncounted == forward.get_total_flops() - sum(rotary.values())
    repeated = sum(part.recompute + part.backward for part in parts.values())
    assert repeated - 2 * uncounted == backward.get_total_flops()


def estimate(model_config: ModelConfig, config: StageConfig) -> dict[str, PartFlops]:
    model = build_on_meta(RecipeParts(model_config, offline=True), config)
    facts = model_facts(model)
    tokens = facts.tokens_per_image + TEXT
    # What follows the last token has no label.
    labelled = tokens - 1 if config.cross_entropy == "chunked" else None
    recomputed = config.gradient_checkpointing
    return sample_flops(model, facts, images=1, tokens=tokens, checkpointing=recomputed, labelled=labelled)


def test_a_text_only_sample_costs_nothing_in_the_backbone(llm_folder: Path) -> None:
    recipe = small_recipe("mmfuser_7b", llm_folder)
    model = build_on_meta(RecipeParts(recipe.model, offline=True), recipe.finetune)

    parts = sample_flops(model, model_facts(model), images=0, tokens=30, checkpointing=True)

    assert parts["backbone"].total == parts["fuser"].total == parts["projector"].total == 0
    assert parts["llm"].total > 0


def test_nothing_runs_backward_if_nothing_learns(llm_folder: Path) -> None:
    recipe = small_recipe("mmfuser_7b", llm_folder, {"pretrain.trainable": []})
    parts = estimate(recipe.model, recipe.pretrain)

    assert all(part.backward == part.recompute == 0 for part in parts.values())


def test_hours_are_operations_over_speed() -> None:
    a100 = get_gpu("a100-80")

    assert hours(312e12 * 3600 * 8, a100, num_gpus=8, utilization=1.0) == pytest.approx(1.0)
    assert hours(312e12 * 3600, a100, num_gpus=1, utilization=0.25) == pytest.approx(4.0)


def test_an_unknown_gpu_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="GPU 'h10' is unknown; did you mean 'h100'"):
        get_gpu("h10")
