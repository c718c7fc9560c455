"""One optimizer step of a recipe's finetune at full size: seconds, and memory beside the dry run's estimate."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from measure import Session

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.dry_run import dry_run
from integrations.llava.modeling.build import assemble, checkpoint_activations
from integrations.llava.synthetic import LLM_FOLDER
from integrations.llava.training.trainer import parameter_groups

__all__ = ["bench_training_step"]

GIB = 2**30


def bench_training_step(session: Session, *, recipe: str, gpu: str, runs: int) -> None:
    """Time steps of one micro batch of the longest samples, after one that is not timed.

    Args:
        session: records the row.
        recipe: name of the recipe. Weights are random where it describes its language model, and the tokenizer then
            is the demo's; else both are its own.
        gpu: name of the GPU that the estimate reckons with; it decides how many samples fit.
        runs: timed steps.
    """
    weights = {"model.backbone_pretrained": False, "model.llm_pretrained": False, "model.tokenizer": str(LLM_FOLDER)}
    loaded = load_recipe(recipe)
    if loaded.model.llm_architecture:
        loaded = load_recipe(recipe, weights)
    (stage,) = dry_run(loaded, gpu=gpu, stages=["finetune"], num_gpus=[1]).stages
    micro = max(stage.largest_micro_batch[1], 1)
    loaded = dataclasses.replace(loaded, finetune=dataclasses.replace(loaded.finetune, micro_batch_size=micro))
    (stage,) = dry_run(loaded, gpu=gpu, stages=["finetune"], num_gpus=[1]).stages
    (expected,) = stage.memory
    seconds, loss = _steps(loaded, micro, stage.workload.longest, session.device, runs)
    on_cuda = session.device == "cuda"
    session.record(
        {
            "benchmark": "optimizer step of finetune",
            "candidate": recipe,
            "micro_batch_size": micro,
            "tokens": stage.workload.longest,
            "median_seconds": round(statistics.median(seconds), 4),
            "tokens_per_second": round(micro * stage.workload.longest / statistics.median(seconds)),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if on_cuda else None,
            "estimated_peak_gib": round(expected.peak / GIB, 2),
            "loss": round(loss, 4),
            "runs": runs,
        }
    )


def _steps(recipe: Recipe, micro: int, tokens: int, device: str, runs: int) -> tuple[list[float], float]:
    config = recipe.finetune
    assembled = assemble(recipe.model, config)
    model = assembled.model.to(device).train()
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    groups = parameter_groups(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    for group in groups:
        del group["names"]
    optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
    height, width = model.model.vision_tower.backbone.image_size
    ids = torch.randint(3, assembled.image_token_id, (micro, tokens), device=device)
    ids[:, 1 : 1 + model.config.layout.num_tokens()] = assembled.image_token_id
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == assembled.image_token_id, -100),
        "pixel_values": torch.randn(micro, 3, height, width, device=device),
    }
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for run in range(runs + 1):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if run:
            seconds.append(time.perf_counter() - start)
    return seconds, value
