"""A dry run written out for a terminal of 110 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from integrations.llava._text import aligned, column_widths
from integrations.llava.config import PARTS
from integrations.llava.data import tile_bytes
from integrations.llava.data.doctor import findings_table, verdict
from integrations.llava.image_layout import ImageLayout
from integrations.llava.modeling import injection_settings

from .estimate import Report, StageReport
from .flops import PartFlops, hours
from .gpus import Gpu
from .memory import GIB, RESERVE, SLACK, engines_for
from .recommendation import recommend

__all__ = ["WIDTH", "render"]

WIDTH = 110
"""Columns."""

# LLaVA-1.5 without fuser on 8 A100s, one epoch of each stage: README of haotian-liu/LLaVA.
_PUBLISHED_HOURS = {
    "lmsys/vicuna-7b-v1.5": {"pretrain": 3.5, "finetune": 10.0},
    "lmsys/vicuna-13b-v1.5": {"pretrain": 5.5, "finetune": 20.0},
}
_A100_TFLOPS, _PUBLISHED_GPUS = 312.0, 8
_PUBLISHED_TOKENS = 576

_ASSUMPTIONS = (
    "Operations: 2 per weight and token forward; backward 2 for gradients passed on and 2 for weights that learn; "
    "attention 4 T² per channel, twice that backward; checkpointing repeats the language model's blocks. A frozen "
    "language model still passes gradients on to projector and fuser. Padding is counted where data are given, as "
    "micro batches on one GPU have it. All text has labels, and with cross_entropy chunked only text has logits, which "
    "are computed twice.",
    "Memory: a micro batch of the longest samples; trained parameters, gradients and AdamW's two states in float32, "
    "frozen parameters in the computing precision. Copies are bf16 weights that autocast or an engine makes. The peak "
    "is the largest moment of a step, not the sum of the columns.",
    f"Fits: peak + {RESERVE:.0f} GiB for CUDA and libraries + {SLACK:.0%} that the allocator loses; tight: only "
    "without the latter.",
)


def render(report: Report) -> str:
    """Text of several tables about a dry run, lines of at most 110 characters where names allow it."""
    sections = (_model, _parameters, _steps, _compute, _hours, _memory, _data, _assumptions)
    name = report.recipe.name or report.recipe.model.checkpoint
    head = f"Dry run of {name} on {report.gpu.name}: an estimate; nothing was trained or downloaded."
    first = "\n".join([head, *_wrapped(f"Verdict: {recommend(report)}", bullet="")])
    return "\n\n".join([first, *("\n".join(section(report)) for section in sections)]) + "\n"


def _title(text: str) -> str:
    return f"{text} ".ljust(WIDTH, "─")


def _table(rows: Sequence[Sequence[str]], *, left: int = 1, groups: Sequence[str] = ()) -> Iterator[str]:
    """Lay rows out in columns, the first few flush left; groups are titles that share the others evenly."""
    if groups:
        widths = column_widths(rows)
        span = (len(widths) - left) // len(groups)
        spans = [sum(widths[start : start + span]) + 2 * (span - 1) for start in range(left, len(widths), span)]
        titles = [f" {title} ".center(width, "·") for title, width in zip(groups, spans, strict=True)]
        yield "  ".join(["", *(" " * width for width in widths[:left]), *titles])
    yield from (f"  {line}".rstrip() for line in aligned(rows, left=left))


def _wrapped(text: str, bullet: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _model(report: Report) -> Iterator[str]:
    config, model = report.recipe.model, report.model.model
    hidden = model.multi_modal_projector.linear_2.out_features
    read = zip(model.fuser_grids, model.fuser.in_channels, strict=True)
    shapes = dict.fromkeys(f"{rows} x {columns} x {channels:,}" for (rows, columns), channels in read)
    maps = f"{model.fuser.num_layers} maps of {', '.join(shapes)}"
    yield _title("Model")
    yield from _table(
        [
            *_backbones(report),
            ("fuser", f"{model.fuser.name}: {maps}"),
            ("projector", f"{config.projector}: {model.fuser.out_channels:,} -> {hidden:,}"),
            *_injection(report),
            ("llm", f"{_language_model(report)} ({report.llm_origin})"),
            ("image", _image(report.model.config.layout)),
            ("template", ", ".join(f"{stage.name}: {stage.config.template}" for stage in report.stages)),
        ],
        left=2,
    )
    for stage in report.stages:
        for misfit in stage.misfits:
            yield from _wrapped(f"{stage.name}: template {stage.config.template!r} and the language model: {misfit}.")


def _backbones(report: Report) -> Iterator[tuple[str, str]]:
    config, members = report.recipe.model, report.model.model.vision_tower.backbone.members
    names = [own.name for own in config.backbones]
    if config.checkpoint:
        names = [f"{own.family}:{type(own.model).__name__}" for own in members]
    for name, backbone in zip(names, members, strict=True):
        height, width = backbone.image_size
        layers = ", ".join(map(str, backbone.layers))
        yield "backbone", " ".join(name.split(":", 1))
        yield "", f"layers {layers} of {backbone.num_blocks}, {height} x {width} pixels"


def _image(layout: ImageLayout) -> str:
    size = layout.largest_size
    tokens = f"{layout.num_tokens(size):,} tokens"
    if size is None:
        return tokens
    return f"up to {tokens}: {size[0]} x {size[1]} pixels (height x width), {layout.num_tiles(size)} tiles"


def _injection(report: Report) -> Iterator[tuple[str, str]]:
    config = report.recipe.model
    # A checkpoint's are numbered among its taps.
    found = injection_settings(report.model.config.injection) if config.checkpoint else config.injection
    if found is not None and found.pairs:
        pairs = ", ".join(f"{' + '.join(map(_tap, taps))} -> {layer}" for *taps, layer in found.pairs)
        kind = "taps" if config.checkpoint else "layers"
        yield "injection", f"{found.merger}: {kind} {pairs}, {found.when} these decoder layers"


def _language_model(report: Report) -> str:
    config = report.recipe.model
    if not config.checkpoint:
        return config.llm
    described: Any = report.model.config.text_config
    return f"{described.model_type}, {described.num_hidden_layers} layers of {described.hidden_size:,}"


def _tap(tap: int | tuple[int, ...]) -> str:
    return str(tap) if isinstance(tap, int) else f"{tap[1]} of backbone {tap[0]}"


def _parameters(report: Report) -> Iterator[str]:
    yield _title("Parameters")
    counted = [counts for stage in report.stages for counts in (stage.facts.trained, stage.facts.frozen)]
    rows = [["part", *("trained", "frozen") * len(report.stages)]]
    rows += [[part, *(f"{counts[part]:,}" if counts[part] else "–" for counts in counted)] for part in PARTS]
    rows.append(["all", *(f"{sum(counts.values()):,}" for counts in counted)])
    yield from _table(rows, groups=[stage.name for stage in report.stages])


def _steps(report: Report) -> Iterator[str]:
    yield _title("Samples and steps")
    rows = [["stage", "samples", "tokens", "image", "text", "padding", "longest", "epochs", "batch", "steps"]]
    origins: dict[str, list[str]] = {}
    for stage in report.stages:
        config, work = stage.config, stage.workload
        lengths = (work.samples, work.tokens, work.image_tokens, work.text_tokens, work.padding, work.longest)
        epochs = f"{config.epochs:g}" if config.max_steps is None else "–"
        numbers = ["–" if length is None else f"{length:,.0f}" for length in lengths]
        rows.append([stage.name, *numbers, epochs, f"{config.batch_size:,}", f"{stage.steps:,}"])
        origins.setdefault(work.origin, []).append(stage.name)
    yield from _table(rows)
    for origin, names in origins.items():
        yield from _wrapped(f"{' and '.join(names)}: {origin}.")


def _compute(report: Report) -> Iterator[str]:
    totals = [PartFlops(*map(sum, zip(*stage.flops.values(), strict=True))) for stage in report.stages]
    unit, name = (1e12, "TFLOP") if max(total.total for total in totals) >= 1e11 else (1e9, "GFLOP")
    kinds = ("forward", "recompute", "backward")
    yield _title(f"Operations of a sample, {name}")
    rows = [["part", *kinds * len(report.stages)]]
    for part in (*PARTS, "all"):
        columns = totals if part == "all" else [stage.flops[part] for stage in report.stages]
        counts = [getattr(flops, kind) for flops in columns for kind in kinds]
        rows.append([part, *(f"{count / unit:.3f}" if count else "–" for count in counts)])
    yield from _table(rows, groups=[stage.name for stage in report.stages])
    for stage, total in zip(report.stages, totals, strict=True):
        yield f"  {stage.name}: {total.total / unit:.1f} {name} a sample, {stage.run_flops:.2e} FLOP the run"


def _hours(report: Report) -> Iterator[str]:
    gpu, share = report.gpu, report.utilization
    yield _title(f"Hours at {share:.0%} of {gpu.tflops:,.0f} TFLOP/s a GPU (bf16, dense)")
    numbers = sorted({memory.num_gpus for stage in report.stages for memory in stage.memory})
    rows = [["stage", *(f"{number} x {gpu.name}" for number in numbers)]]
    for stage in report.stages:
        times = [hours(stage.run_flops, gpu, num_gpus=number, utilization=share) for number in numbers]
        rows.append([stage.name, *(f"{time:,.1f}" for time in times)])
    yield from _table(rows)
    published = [line for stage in report.stages for line in _published(report, stage)]
    yield from _wrapped(" ".join(published) or "No published hours to compare with.")
    for stage in report.stages:
        if stage.config.precision == "fp32":
            yield from _wrapped(f"{stage.name} computes in fp32, which is several times slower than that.")
        elif not gpu.has_bf16:
            yield from _wrapped(f"{gpu.name} has no bf16 units: {stage.name} will be several times slower than that.")


def _published(report: Report, stage: StageReport) -> Iterator[str]:
    """Say which share of the peak the published hours mean, where that run was like this one."""
    config = report.recipe.model
    known = _PUBLISHED_HOURS.get("" if config.checkpoint else config.llm, {}).get(stage.name)
    alike = stage.facts.tokens_per_image == _PUBLISHED_TOKENS and not stage.config.lora.rank
    if known is None or not alike or stage.config.max_steps is not None:
        return
    reached = stage.run_flops / (known * 3600 * _PUBLISHED_GPUS * _A100_TFLOPS * 1e12)
    yield (
        f"LLaVA-1.5 without fuser took {known:g} h on {_PUBLISHED_GPUS} A100s for {stage.name} (its README): "
        f"{reached:.0%} of their peak by this count."
    )


def _memory(report: Report) -> Iterator[str]:
    gpu = report.gpu
    for index, stage in enumerate(report.stages):
        unit, name = (GIB, "GiB") if max((m.peak for m in stage.memory), default=GIB) >= GIB else (GIB / 1024, "MiB")
        if index:
            yield ""
        yield _title(
            f"Memory of one GPU in {stage.name}, {name}; micro batches of {stage.workload.longest:,} tokens a sample"
        )
        columns = ("weights", "gradients", "optimizer", "activations", "logits", "copies", "peak")
        rows = [["GPUs", "engine", "batch", *columns, f"fits {gpu.name}"]]
        for memory in stage.memory:
            engine = memory.engine + (" *" if memory.engine == stage.config.engine else "")
            batch = f"{memory.micro_batch} x {memory.accumulation}"
            sizes = [f"{getattr(memory, column) / unit:.1f}" for column in columns]
            number = memory.num_gpus
            rows.append([str(number), "none" if number == 1 else engine, batch, *sizes, memory.fits(gpu.memory)])
        yield from _table(rows, left=2)
        yield from _wrapped(_advice(stage, gpu))
        host = max((memory.weights for memory in stage.memory if memory.engine == "ddp"), default=0.0)
        yield f"  Every process builds the model on its machine first: {host / unit:,.0f} {name} of host memory each."


def _advice(stage: StageReport, gpu: Gpu) -> str:
    engine, own = stage.config.engine, {memory.num_gpus: memory.micro_batch for memory in stage.memory}
    said = [f"{gpu.name}: {gpu.memory:g} GiB. Batch: micro batch x accumulation. * is the recipe's engine, {engine}."]
    smaller: dict[int, list[str]] = {}
    for number, size in stage.largest_micro_batch.items():
        if size < own[number]:
            smaller.setdefault(size, []).append(str(number))
    none = smaller.pop(0, [])
    if any(number > 1 and engine not in engines_for(stage.config, number) for number in own):
        said.append(f"Quantised weights cannot be taken apart: set --{stage.name}.engine ddp.")
    if not own:
        said.append(f"batch_size={stage.config.batch_size} cannot be divided among these numbers of GPUs.")
    if smaller:
        sizes = ", ".join(f"{size} on {_gpus(numbers)}" for size, numbers in smaller.items())
        said.append(f"To fit, set --{stage.name}.micro_batch_size: {sizes}.")
    if none:
        said.append(f"On {_gpus(none)} not even one sample at a time fits.")
    return " ".join(said)


def _gpus(numbers: Sequence[str]) -> str:
    return f"{', '.join(numbers)} GPU{'' if list(numbers) == ['1'] else 's'}"


def _data(report: Report) -> Iterator[str]:
    yield _title("Data")
    yield from _feature_caches(report)
    for stage in report.stages:
        if stage.survey is None:
            yield f"  {stage.name}: not given; --data FILE --image-folder FOLDER checks them"
            continue
        yield f"  {stage.name}: {' '.join(stage.config.data.sources)}: {verdict(stage.survey)}"
        if stage.survey.findings:
            yield textwrap.indent(findings_table(stage.survey), "  ")


def _feature_caches(report: Report) -> Iterator[str]:
    """Say what each stage's feature cache takes on disk, if no two samples share an image."""
    for stage in report.stages:
        if stage.config.feature_cache:
            each = tile_bytes(report.model.model.vision_tower.backbone, stage.config.feature_cache_dtype)
            count = stage.workload.samples * stage.workload.tiles
            yield from _wrapped(
                f"{stage.name}: feature cache ({stage.config.feature_cache_dtype}) of up to {count:,.0f} pictures x "
                f"{each / 2**20:.2f} MiB: {count * each / GIB:,.2f} GiB on disk."
            )


def _assumptions(report: Report) -> Iterator[str]:
    yield _title("Assumptions")
    for text in _ASSUMPTIONS:
        yield from _wrapped(text, bullet="  - ")
