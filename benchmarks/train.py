"""Training end to end, data included: a recipe of ours beside transformers' LLaVA, Trainer and a plain collator.

python -m benchmarks.train

On the CPU the tiny recipe's finetune, the candidates in turn; on a GPU both stages of LLaVA-1.5-7B with random weights,
one after the other, since one alone fills the memory. All read the same samples, each in the order of its own sampler:
ours as the recipe has it, transformers' at random. Conversations differ in length, as real ones do, so that batches
have padding (`padding` in a row is its share of positions), but for those of "padding-free". Seconds are counted per
position that is no padding, steps after the first. "No fuser" is the recipe with `select` of the penultimate layer,
which is the model that transformers has; the others have MMFuser on top. On a GPU ours keeps as many activations as the
dry run says fit.

MFU = floating point operations of a step, forward and backward, without those that checkpointing repeats and without
padding (`integrations.llava.dry_run.flops`: 2 per multiply-add of matrix products, attention with T² scores), over the
step's seconds, over the data sheet's dense bf16 speed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from benchmarks.llava_models import assemble_ours, gpu_of, load_size, plain_model
from benchmarks.measure import Timing
from benchmarks.plain_training import plain_trainer
from benchmarks.session import Session, say
from integrations.llava.config import Recipe, StageConfig
from integrations.llava.data import read_samples
from integrations.llava.dry_run import dry_run
from integrations.llava.dry_run.facts import model_facts
from integrations.llava.dry_run.flops import sample_flops
from integrations.llava.modeling import Assembled
from integrations.llava.synthetic import make_dataset
from integrations.llava.training.stage import stage_trainer

__all__ = ["StepClock", "run"]

BENCHMARK = "training, seconds per token"
OURS, PACKED, PLAIN = "layerfuse", "layerfuse, padding-free", "transformers"
UNFUSED = "layerfuse, no fuser, padding-free"
AS_FAST = "layerfuse, as fast as the dry run allows"

GIB = 2**30


class StepClock(TrainerCallback):
    """Notes when each optimizer step ends, and how many positions, padding aside, it took."""

    def __init__(self, device: str, model: nn.Module) -> None:
        self.device = device
        self.ends: list[tuple[float, float]] = []
        self.counts: list[torch.Tensor] = []
        self.places = 0
        self.loss = float("nan")
        self._now: list[torch.Tensor] = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs["input_ids"]
        whole = mask is None or mask.shape != ids.shape
        self._now.append(torch.tensor(ids.numel()) if whole else mask.sum())
        self.places += ids.numel()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))
        self.counts.append(torch.stack([count.cpu() for count in self._now]).sum())
        self._now = []

    def on_log(self, *args: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Keep the last loss that is logged."""
        self.loss = (logs or {}).get("loss", self.loss)

    def per_token(self) -> list[tuple[float, float]]:
        """Take the hook off; return seconds and processor seconds per position of each step after the first."""
        self._hook.remove()
        counts = [int(count) for count in self.counts]
        steps = zip(self.ends, self.ends[1:], counts[1:], strict=False)
        return [((b[0] - a[0]) / count, (b[1] - a[1]) / count) for a, b, count in steps]

    @property
    def padding(self) -> float:
        """Share of all positions that are padding."""
        return 1 - sum(int(count) for count in self.counts) / self.places

    @property
    def tokens(self) -> float:
        """Positions of a step, on average, padding aside."""
        counts = [int(count) for count in self.counts[1:]]
        return sum(counts) / max(len(counts), 1)


@dataclasses.dataclass
class Stage:
    """What is trained: the settings, the samples and where they are."""

    name: str
    recipe: Recipe
    config: StageConfig
    folder: Path
    data: Path

    @property
    def samples(self) -> Any:
        """The samples of the stage."""
        return read_samples(self.config.data.path)


def run(session: Session) -> None:
    """Train for a few steps of each stage."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = session.pick(512 if session.device == "cpu" else 192, 96, 8)
        data = make_dataset(folder / "data", seed=session.seed, num_train=count, num_val=1, num_test=1)
        _vary_lengths(session, data / "train.json")
        for name in ("finetune",) if session.goals_of == "cpu" else ("pretrain", "finetune"):
            if session.device == "cuda" and not session.has_time(100, BENCHMARK, OURS, stage=name):
                continue
            with session.attempt(BENCHMARK, OURS, stage=name):
                if session.goals_of == "cpu":
                    _alternate(session, _stage(session, name, data, folder))
                else:
                    _one_after_the_other(session, _fitting_stage(session, name, data, folder))


def _vary_lengths(session: Session, path: Path) -> None:
    """Give conversations 1 to 80 turns (tiny: 1 to 40), most of them few (log-uniform); the demo's are all alike.

    So the longest come near `max_length`, as in LLaVA's own data. Turns come from all conversations, so that they need
    not be about the picture; nobody learns anything here.
    """
    draw, samples = random.Random(session.seed), json.loads(path.read_text(encoding="utf-8"))
    turns = [
        sample["conversations"][k : k + 2] for sample in samples for k in range(2, len(sample["conversations"]), 2)
    ]
    most = session.pick(80 if session.goals_of == "cuda" else 40, 8, 4)
    for sample in samples:
        count = round(math.exp(draw.uniform(0, math.log(most))))
        sample["conversations"] = sample["conversations"][:2] + [
            turn for pair in draw.choices(turns, k=count - 1) for turn in pair
        ]
    path.write_text(json.dumps(samples), encoding="utf-8")


def _stage(session: Session, name: str, data: Path, folder: Path, *, blocks: int | None = None) -> Stage:
    recipe = load_size(session, blocks=blocks)
    config = recipe.stage(name)
    path = data / {"pretrain": "pretrain.json", "finetune": "train.json"}[name]
    micro = session.pick(config.micro_batch_size or config.batch_size, 8, 2)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(path), image_folder=str(data / "images")),
        micro_batch_size=micro,
        batch_size=micro,
        max_steps=session.pick(6 if session.device == "cuda" else 5, 3, 2),
        save_every=None,
        log_every=1,
        engine="ddp",
        seed=session.seed,
    )
    return Stage(name, dataclasses.replace(recipe, **{name: config}), config, folder, data)


def _fitting_stage(session: Session, name: str, data: Path, folder: Path) -> Stage:
    """Return the stage with the largest micro batch that fits, and fewer blocks where not even one sample does."""
    for blocks in (None, 24, 16, 8):
        stage = _stage(session, name, data, folder, blocks=blocks)
        largest = _dry(session, stage).largest_micro_batch[1]
        if largest:
            return _changed(stage, micro_batch_size=largest, batch_size=largest)
        say(f"  {name}: does not fit with {blocks or 'all'} blocks")
    raise AssertionError(f"{name} does not fit on this device")


def _fastest(session: Session, stage: Stage) -> Stage:
    """Return the stage with the least that is computed twice if memory is to suffice."""
    for checkpointing in (False, "selective"):
        changed = _changed(stage, gradient_checkpointing=checkpointing)
        (memory, *_) = _dry(session, changed).memory
        if memory.fits(gpu_of(session).memory) == "yes":
            return changed
    return stage


def _changed(stage: Stage, **settings: Any) -> Stage:
    config = dataclasses.replace(stage.config, **settings)
    return dataclasses.replace(stage, config=config, recipe=dataclasses.replace(stage.recipe, **{stage.name: config}))


def _dry(session: Session, stage: Stage) -> Any:
    report = dry_run(stage.recipe, gpu=gpu_of(session).name, stages=[stage.name], num_gpus=[1])
    return report.stages[0]


def _alternate(session: Session, stage: Stage) -> None:
    """Train the candidates in turn, each several times, all of them in memory."""
    bare = dataclasses.replace(stage.recipe.model, fuser="select", layers=(-2,), fuser_options={})
    unfused = dataclasses.replace(stage.recipe, model=bare)
    ours, packed = assemble_ours(session, stage.recipe, stage.config), _changed(stage, padding_free=True).config
    candidates = {
        OURS: (ours, stage.config),
        PACKED: (ours, packed),
        UNFUSED: (assemble_ours(session, unfused, stage.config), packed),
    }
    plain, rows = plain_model(session, ours, stage.config), _rows(stage, ours)
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in (*candidates, PLAIN)}
    padding = {}
    for number in range(session.pick(2, 1, 1)):
        for label in seconds if number % 2 == 0 else reversed(seconds):
            if label == PLAIN:
                clock = _train_plain(session, stage, plain, rows, ours)
            else:
                clock = _train_ours(session, stage, *candidates[label])
            seconds[label] += clock.per_token()
            padding[label] = round(clock.padding, 3)
    timings = {label: Timing(*map(tuple, zip(*values, strict=True))) for label, values in seconds.items()}
    case = f"{stage.recipe.name} {stage.name}"
    facts = {**_facts(stage), "tokens_per_step": round(clock.tokens), "padding": padding}
    session.record_timings(BENCHMARK, timings, ours=tuple(candidates), case=case, facts=facts)


def _one_after_the_other(session: Session, stage: Stage) -> None:
    """Train ours, free it, train the plain one: two models of 7B with their optimizers do not fit side by side."""
    fast, seconds, peaks = _fastest(session, stage), {}, {}
    ours = assemble_ours(session, stage.recipe, stage.config)
    # With the settings of ours: a model that once checkpoints goes on doing so.
    rows, blocks = _rows(fast, ours), ours.model.config.get_text_config().num_hidden_layers
    case = f"{stage.recipe.name} {stage.name}, {blocks} blocks"
    try:
        clock = _measure(OURS, seconds, peaks, lambda: _train_ours(session, fast, ours, fast.config))
    except torch.OutOfMemoryError as error:
        session.record(BENCHMARK, AS_FAST, case=case, status="failed", error=str(error)[:200], **_facts(fast))
        _free()
        fast = stage
        clock = _measure(OURS, seconds, peaks, lambda: _train_ours(session, stage, ours, stage.config))
    with session.attempt(BENCHMARK, PACKED, stage=stage.name):
        packed = _changed(fast, padding_free=True).config
        _measure(PACKED, seconds, peaks, lambda: _train_ours(session, fast, ours, packed))
    ours.model.to("meta")
    _free()
    with session.attempt(BENCHMARK, PLAIN, stage=stage.name):
        plain = plain_model(session, ours, stage.config)
        _measure(PLAIN, seconds, peaks, lambda: _train_plain(session, stage, plain, rows, ours))
        plain.to("meta")
    _free()
    facts = {**_facts(fast), "tokens_per_step": round(clock.tokens), "padding": {OURS: round(clock.padding, 3)}}
    session.record_timings(BENCHMARK, seconds, ours=(OURS, PACKED), case=case, facts=facts)
    _record_use(session, fast, ours, seconds, clock.tokens)
    (expected, *_) = _dry(session, fast).memory
    for label, peak in peaks.items():
        says = None if label == PLAIN else round(expected.peak / GIB, 2)
        facts = {"unit": "GiB", "dry_run_says": says, **_facts(fast)}
        session.record("training, peak memory", label, case=case, value=round(peak / GIB, 2), **facts)


def _measure(
    label: str,
    seconds: dict[str, Timing],
    peaks: dict[str, float],
    train: Callable[[], StepClock],
) -> StepClock:
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = train()
    peaks[label] = torch.cuda.max_memory_allocated() if on_cuda else 0
    seconds[label] = Timing(*map(tuple, zip(*clock.per_token(), strict=True)))
    return clock


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _facts(stage: Stage) -> dict[str, Any]:
    config = stage.config
    return {
        "stage": stage.name,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "our_settings": {"gradient_checkpointing": config.gradient_checkpointing},
    }


def _rows(stage: Stage, ours: Assembled) -> list[dict[str, Any]]:
    """Return ids, labels and pictures of our own data set, so that both models read the same."""
    trainer = stage_trainer(ours, stage.config, stage.samples, None, stage.folder / "rows" / "none", num_processes=1)
    dataset, images = trainer.train_dataset, stage.data / "images"
    rows = []
    for index, sample in enumerate(stage.samples):
        prepared = dataset[index]
        rows.append(
            {
                "input_ids": prepared["input_ids"],
                "labels": prepared["labels"],
                "image": str(images / sample["image"]),
            }
        )
    return rows


def _train_ours(session: Session, stage: Stage, ours: Assembled, config: StageConfig) -> StepClock:
    clock = StepClock(session.device, ours.model)
    folder = Path(tempfile.mkdtemp(dir=stage.folder)) / stage.name
    trainer = stage_trainer(ours, config, stage.samples, None, folder, num_processes=1, callbacks=[clock])
    trainer.train()
    return clock


def _train_plain(
    session: Session, stage: Stage, model: nn.Module, rows: Sequence[Mapping[str, Any]], ours: Assembled
) -> StepClock:
    clock = StepClock(session.device, model)
    trainer = plain_trainer(
        *(session, model, rows, stage.config, stage.folder / "plain"),
        pad_token_id=ours.tokenizer.pad_token_id,
        callback=clock,
    )
    trainer.train()
    return clock


def _record_use(session: Session, stage: Stage, ours: Assembled, seconds: Mapping[str, Timing], tokens: float) -> None:
    """Record samples and tokens a second, and the share of the device's speed that does useful work."""
    gpu, per_step = gpu_of(session), stage.config.batch_size
    model = ours.model
    checkpointing = stage.config.gradient_checkpointing
    counts = sample_flops(model, model_facts(model), images=1.0, tokens=tokens / per_step, checkpointing=checkpointing)
    case = f"{stage.recipe.name} {stage.name}"
    for label, timing in seconds.items():
        parts = {name: part for name, part in counts.items() if label != PLAIN or name != "fuser"}
        useful = per_step * sum(part.forward + part.backward for part in parts.values())
        step = timing.median * tokens
        session.record(
            "training, MFU",
            label,
            case=case,
            value=round(useful / step / (gpu.tflops * 1e12), 4),
            unit="share of the data sheet's speed",
            samples_per_second=round(per_step / step, 3),
            tokens_per_second=round(tokens / step),
            useful_flops_per_step=float(f"{useful:.4g}"),
            peak_tflops=gpu.tflops,
            **_facts(stage),
        )


if __name__ == "__main__":
    from benchmarks.command import main

    main("train")
