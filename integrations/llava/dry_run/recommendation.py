"""The verdict of a dry run: how many GPUs a recipe needs at least, and how many to take."""

from __future__ import annotations

from .estimate import Report, StageReport
from .flops import hours
from .memory import GIB, RESERVE, Memory, engines_for

__all__ = ["recommend"]

# Share of a GPU's memory that an estimate may fill before it is called roomy: what it leaves out has to fit, too.
_ROOMY = 0.8


def recommend(report: Report) -> str:
    """Say in a sentence or two how many GPUs all stages need at least, with their engines, and how many to take.

    At least: some micro batch of every stage fits. To take: the micro batches of the recipe fill at most four fifths of
    a GPU, so that an estimate which is a little too low does no harm.
    """
    numbers = sorted(set.intersection(*({memory.num_gpus for memory in stage.memory} for stage in report.stages)))
    if not numbers:
        return "no number of GPUs that was looked at can share the batches of all stages."
    possible = [number for number in numbers if all(stage.largest_micro_batch[number] for stage in report.stages)]
    if not possible:
        return f"does not fit on {numbers[-1]} x {report.gpu.name}, nor on fewer. {_way_out(report)}"
    whole = [number for number in possible if not _smaller(report, number)]
    roomy = [number for number in whole if all(_is_roomy(_own(stage, number), report) for stage in report.stages)]
    least, take = possible[0], next(iter(roomy or whole or possible[-1:]))
    return f"{_amount(least, take, report.gpu.name)}{_reason(report, take, roomy=bool(roomy))}"


def _amount(least: int, take: int, name: str) -> str:
    if take == 1:
        return f"one {name} is enough"
    return f"needs {take} x {name}" if least == take else f"needs at least {least} x {name}, take {take}"


def _reason(report: Report, take: int, *, roomy: bool) -> str:
    each = [hours(s.run_flops, report.gpu, num_gpus=take, utilization=report.utilization) for s in report.stages]
    time = f"{sum(each):,.1f} hours" if sum(each) >= 0.05 else "minutes"
    if smaller := _smaller(report, take):
        flags = " ".join(f"--{stage.name}.micro_batch_size {stage.largest_micro_batch[take]}" for stage in smaller)
        return f" with {flags}; {time}. The recipe's own micro batches need more GPUs or more memory."
    peaks = ", ".join(f"{stage.name} {_need(_own(stage, take)):.1f}" for stage in report.stages)
    tight = "" if roomy else " That leaves little room: more memory is safer."
    return f": {peaks} of {report.gpu.memory:g} GiB; {time}.{tight}"


def _smaller(report: Report, number: int) -> list[StageReport]:
    """Stages that fit with a smaller micro batch only."""
    return [stage for stage in report.stages if stage.largest_micro_batch[number] < _own(stage, number).micro_batch]


def _own(stage: StageReport, number: int) -> Memory:
    """Memory of a stage on so many GPUs with its own engine, or the one that its weights allow."""
    engine = stage.config.engine if stage.config.engine in engines_for(stage.config, number) else "ddp"
    return next(memory for memory in stage.memory if memory.num_gpus == number and memory.engine == engine)


def _need(memory: Memory) -> float:
    """GiB with what CUDA and libraries take."""
    return memory.peak / GIB + RESERVE


def _is_roomy(memory: Memory, report: Report) -> bool:
    return _need(memory) <= _ROOMY * report.gpu.memory


def _way_out(report: Report) -> str:
    """Name engines with which the stages that do not fit would, or else what else helps."""
    flags = []
    for stage in report.stages:
        if any(stage.largest_micro_batch.values()):
            continue
        fits = [memory for memory in stage.memory if memory.fits(report.gpu.memory) == "yes"]
        if not fits:
            return "Take GPUs with more memory, or train adapters (LoRA, QLoRA) in place of all weights."
        best = min(fits, key=lambda memory: memory.num_gpus)
        flags.append(f"--{stage.name}.engine {best.engine} ({best.num_gpus} GPUs)")
    return f"With {' and '.join(flags)} it does."
