"""The dry run of a recipe: sizes, steps, operations, memory and data of each stage, before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from integrations.llava.checkpoints import model_source
from integrations.llava.config import STAGES, Recipe, StageConfig
from integrations.llava.data import drawn_evenly, read_samples, select_samples
from integrations.llava.data.doctor import Survey, survey_samples
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, ModelSource
from integrations.llava.prompts import misfits
from layerfuse.errors import InputError

from .facts import ModelFacts, build_on_meta, model_facts
from .flops import PartFlops, sample_flops
from .gpus import Gpu, get_gpu
from .memory import Memory, engines_for, estimate_memory
from .workload import Workload, assumed_workload, measured_workload, optimizer_steps, samples_seen

__all__ = ["NUM_GPUS", "UTILIZATION", "Report", "StageReport", "dry_run"]

NUM_GPUS = (1, 2, 4, 8)
"""Numbers of GPUs that are looked at."""

UTILIZATION = 0.4
"""Share of a GPU's peak that hours are computed with, between what LLaVA-1.5's published hours mean by our count (32
and 41 %) and the 45 % that LLaVA-OneVision-1.5 states, all on A100s."""


@dataclass(frozen=True)
class StageReport:
    """Estimates for one stage.

    Attributes:
        facts: of the model as this stage trains it.
        workload: its samples.
        steps: optimizer steps.
        flops: part -> operations of an average sample.
        run_flops: of all samples.
        memory: for every number of GPUs and every engine.
        largest_micro_batch: number of GPUs -> the largest micro batch that fits with the stage's engine; 0 if none.
        survey: faults of the data; None if no data were given.
        misfits: where template and language model do not fit, see `misfits`.
    """

    name: str
    config: StageConfig
    facts: ModelFacts
    workload: Workload
    steps: int
    flops: Mapping[str, PartFlops]
    run_flops: float
    memory: Sequence[Memory]
    largest_micro_batch: Mapping[int, int]
    survey: Survey | None
    misfits: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """Estimates for a recipe, from `dry_run`.

    Attributes:
        utilization: share of the GPU's peak that hours are computed with.
        model: of the first stage, on the meta device.
        llm_origin: of the language model's config.
    """

    recipe: Recipe
    gpu: Gpu
    utilization: float
    model: FusedLlavaForConditionalGeneration
    llm_origin: str
    stages: Sequence[StageReport]


def dry_run(
    recipe: Recipe,
    *,
    gpu: str = "h100",
    stages: Sequence[str] | None = None,
    num_gpus: Sequence[int] = NUM_GPUS,
    utilization: float = UTILIZATION,
) -> Report:
    """Estimate a run, and check its data, without starting it; `render` writes the report out.

    The model is built on the meta device: seconds, and no memory to speak of. Data are read if the recipe names them.

    Args:
        recipe: from `load_recipe`.
        gpu: name from `GPUS`.
        stages: names of stages; None for the recipe's `default_stages`.
        num_gpus: one estimate each.
        utilization: share of the GPU's peak speed that training reaches, for the hours.

    Raises:
        ValueError: if a name is unknown, a layer or option is not possible, or nothing describes the language model.
        FileNotFoundError: if a data file does not exist.
    """
    if not 0 < utilization <= 1:
        raise InputError(f"utilization={utilization} is no share of the peak; give a number above 0 and up to 1.")
    hardware = get_gpu(gpu)
    source = model_source(recipe.model, offline=True)
    recipe = source.resolved(recipe)
    stages = recipe.default_stages if stages is None else stages
    models = {name: build_on_meta(source, recipe.stage(name)) for name in stages}
    if not models:
        raise InputError(f"no stage was asked for; give {' or '.join(STAGES)}.")
    reports = [_stage_report(name, recipe.stage(name), source, models[name], hardware, num_gpus) for name in models]
    return Report(recipe, hardware, utilization, models[stages[0]], source.described_by, reports)


def _stage_report(
    name: str,
    config: StageConfig,
    source: ModelSource,
    model: FusedLlavaForConditionalGeneration,
    gpu: Gpu,
    num_gpus: Sequence[int],
) -> StageReport:
    facts, template = model_facts(model), source.template(config)
    if config.data.path:
        every = read_samples(config.data.path, seed=config.seed)
        samples = select_samples(every, drawn_evenly(len(every), config.data.max_samples))
        survey = survey_samples(
            samples,
            image_folder=config.data.image_folder,
            template=template,
            check_images=config.data.check_images,
        )
        workload = measured_workload(samples, config, model.config.layout, template)
    else:
        survey, workload = None, assumed_workload(name, config, model.config.layout, template)
    tiles, tokens, longest = workload.tiles, workload.tokens + (workload.padding or 0.0), workload.longest
    flops = sample_flops(
        model,
        facts,
        images=tiles,
        tokens=tokens,
        checkpointing=config.gradient_checkpointing is True,
        labelled=workload.text_tokens if config.logits_in_chunks else None,
    )
    numbers = [number for number in num_gpus if config.batch_size % (number * (config.micro_batch_size or 1)) == 0]
    return StageReport(
        name=name,
        config=config,
        facts=facts,
        workload=workload,
        steps=optimizer_steps(workload.samples, config),
        flops=flops,
        run_flops=samples_seen(workload.samples, config) * sum(part.total for part in flops.values()),
        memory=[
            estimate_memory(facts, config, engine=engine, num_gpus=number, longest=longest)
            for number in numbers
            for engine in engines_for(config, number)
        ],
        largest_micro_batch={number: _largest_micro_batch(facts, config, number, longest, gpu) for number in numbers},
        survey=survey,
        misfits=misfits(template, source.tokenizer) if source.tokenizer is not None else (),
    )


def _largest_micro_batch(facts: ModelFacts, config: StageConfig, num_gpus: int, longest: int, gpu: Gpu) -> int:
    """Find the largest micro batch, up to the stage's, that fits with the stage's engine; 0 if none does."""
    largest, accumulation = config.batches(num_gpus)
    engine = config.engine if config.engine in engines_for(config, num_gpus) else "ddp"
    for size in range(largest, 0, -1):
        if largest * accumulation % size:
            continue
        smaller = replace(config, micro_batch_size=size)
        memory = estimate_memory(facts, smaller, engine=engine, num_gpus=num_gpus, longest=longest)
        if memory.fits(gpu.memory) == "yes":
            return size
    return 0
