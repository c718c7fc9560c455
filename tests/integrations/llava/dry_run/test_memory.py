"""Memory of one process: the formulas give the bytes that tensors take when the real model takes a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from integrations.llava.config.schema import Recipe, StageConfig
from integrations.llava.dry_run import memory as memory_formulas
from integrations.llava.dry_run.facts import Block, build_on_meta, model_facts
from integrations.llava.dry_run.memory import Memory, Weights, block_bytes, estimate_memory, residual_bytes
from integrations.llava.modeling import RecipeParts, language_head
from integrations.llava.modeling.build import Assembled, assemble, checkpoint_activations
from tests.integrations.llava.dry_run.estimate_support import LiveBytes, make_batch, small_recipe
from tests.integrations.llava.tiny_parts import tiny_llm

BATCH, TEXT = 4, 80
SHAPES = {"all heads alike": 4, "fewer heads for keys": 2}


def llama(keys: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    widths = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": keys}
    return tiny_llm(100, num_hidden_layers=1, max_position_embeddings=64, **widths)


def described(layer: nn.Module, keys: int) -> Block:
    trained = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in layer.parameters()) - trained
    return Block(64, 160, 64, 16 * keys, 4, trained, frozen, ())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Give a list that holds, when the block ends, the bytes autograd saved, those of parameters left out."""
    kept: dict[int, torch.UntypedStorage] = {}
    result: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield result
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    result.append(sum(storage.nbytes() for storage in kept.values()))


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("weights", "learns"), [("autocast", True), ("autocast", False), ("bf16", True), ("fp32", True), ("fp32", False)]
)
def test_a_block_saves_as_many_bytes_as_the_formula_says(weights: Weights, learns: bool, keys: int) -> None:
    samples, length = 2, 32
    model = llama(keys).model.requires_grad_(learns)
    narrow = weights == "bf16" or (weights == "autocast" and not learns)
    model.to(torch.bfloat16 if narrow else torch.float32)
    layer = model.layers[0]
    block = described(layer, keys)
    dtype = torch.bfloat16 if residual_bytes(block, weights) == 2 * block.hidden else torch.float32
    hidden = torch.randn(samples, length, 64, dtype=dtype, requires_grad=True)
    positions = model.rotary_emb(hidden, torch.arange(length)[None])
    with (
        torch.autocast("cpu", torch.bfloat16) if weights != "fp32" else nullcontext(),
        saved_bytes(model) as saved,
    ):
        layer(hidden, position_embeddings=positions, attention_mask=None)

    # Besides: the rotary table, and under autocast bf16 copies of the weights, which count as copies.
    besides = 2 * positions[0].nbytes
    if weights == "autocast" and learns:
        besides += 2 * sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
    assert saved[0] == samples * length * block_bytes(block, weights) + besides


@pytest.mark.parametrize(
    ("name", "stage"), [("mmfuser_7b", "pretrain"), ("mmfuser_7b", "finetune"), ("mmfuser_7b_lora", "finetune")]
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_stays_after_a_step_has_the_estimated_size(
    name: str, stage: str, precision: str, llm_folder: Path
) -> None:
    recipe = small_recipe(name, llm_folder)
    config = stage_of(recipe, stage, precision=precision)
    assembled = assemble(recipe.model, config)
    model, optimizer = stepped(assembled, config)

    memory = estimated(recipe, config)

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [state for entry in optimizer.state.values() for state in entry.values() if state.ndim]
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in learning if parameter.grad is not None)
    assert memory.optimizer == sum(state.nbytes for state in states)


@pytest.mark.parametrize(
    ("checkpointing", "accumulation"),
    [(True, 1), (True, 2), (False, 1), (False, 2), ("selective", 1)],
    ids=["recomputed-1", "recomputed-2", "kept-1", "kept-2", "selective-1"],
)
@pytest.mark.parametrize(
    ("name", "stage"), [("mmfuser_7b", "pretrain"), ("mmfuser_7b", "finetune"), ("mmfuser_7b_lora", "finetune")]
)
def test_the_peak_is_what_live_tensors_take(
    name: str, stage: str, checkpointing: Any, accumulation: int, llm_folder: Path
) -> None:
    _check_peak(name, stage, llm_folder, checkpointing=checkpointing, accumulation=accumulation, cross_entropy="plain")


# Not of a finetune that is recomputed: in the tiny one no longer the logits, but a block's backward pass needs most.
@pytest.mark.parametrize(
    ("name", "stage", "checkpointing"),
    [("mmfuser_7b", "pretrain", True), ("mmfuser_7b", "pretrain", False), ("mmfuser_7b", "finetune", False)],
)
def test_the_peak_with_logits_of_a_chunk_is_what_live_tensors_take(
    name: str, stage: str, checkpointing: bool, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (language_head, memory_formulas):
        monkeypatch.setattr(module, "LOSS_CHUNK", 256)
    _check_peak(name, stage, llm_folder, checkpointing=checkpointing, accumulation=1, cross_entropy="chunked")


def _check_peak(
    name: str, stage: str, llm_folder: Path, *, checkpointing: Any, accumulation: int, cross_entropy: str
) -> None:
    # Dropout is another operation on CPUs, which saves four times as much as on GPUs.
    recipe = small_recipe(name, llm_folder, {"finetune.lora.dropout": 0.0})
    config = stage_of(
        recipe,
        stage,
        gradient_checkpointing=checkpointing,
        batch_size=BATCH * accumulation,
        cross_entropy=cross_entropy,
    )
    assembled = assemble(recipe.model, config)
    live = LiveBytes(assembled.model)

    stepped(assembled, config, live=live, accumulation=accumulation)

    assert estimated(recipe, config).peak == pytest.approx(live.peak, rel=0.04)


def stage_of(recipe: Recipe, stage: str, *, batch_size: int = BATCH, **values: object) -> StageConfig:
    return replace(recipe.stage(stage), micro_batch_size=BATCH, batch_size=batch_size, **values)  # type: ignore[arg-type]


def estimated(recipe: Recipe, config: StageConfig) -> Memory:
    model = build_on_meta(RecipeParts(recipe.model, offline=True), config)
    facts = model_facts(model)
    return estimate_memory(facts, config, engine="ddp", num_gpus=1, longest=facts.tokens_per_image + TEXT)


def stepped(
    assembled: Assembled, config: StageConfig, *, live: LiveBytes | None = None, accumulation: int = 1
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Take two optimizer steps as Trainer takes them; the gradients of the second are left."""
    model = assembled.model.train()
    if config.gradient_checkpointing:
        checkpoint_activations(assembled.model, selective=config.gradient_checkpointing == "selective")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = make_batch(assembled, samples=BATCH, text=TEXT)
    with live or nullcontext():
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(accumulation):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    outputs = model(**batch, use_cache=False, cross_entropy=config.cross_entropy)
                if outputs.logits is not None:
                    outputs["logits"] = outputs.logits.float()  # as accelerate does
                loss = outputs.loss
                del outputs
                loss.backward()
                del loss
            optimizer.step()
    return model, optimizer
