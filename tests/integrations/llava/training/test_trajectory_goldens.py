"""Whole training runs against the published code's: batches, groups, rates, losses, gradients, weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.prompts import IGNORE_INDEX
from integrations.llava.training.train import train
from integrations.llava.training.trainer import LlavaTrainer
from tests.integrations.llava.training.trajectory_support import RUNS, RecordedRun

pytestmark = pytest.mark.skipif(not RUNS, reason="goldens not found; set LAYERFUSE_GOLDENS to their folder")

NORMS = {
    "gamma1_norm": ("model.fuser.output_scale.",),
    "gamma2_norm": ("model.fuser.self_scale.",),
    "fuser_norm": ("model.fuser.",),
    "mlp_norm": ("model.multi_modal_projector.",),
    "llm_norm": ("model.language_model.", "lm_head."),
}
# Everything in the fuser hangs on its sampling offsets, which do not reproduce (README, section 5).
FUSER_NORMS = {"gamma1_norm", "gamma2_norm", "fuser_norm"}


@dataclass
class _Recorder(TrainerCallback):
    """Notes rates and groups before, and norms of weights after, every step."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    scale_gradients: list[float] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups = [
            {key: group[key] for key in ("weight_decay", "initial_lr", "betas", "eps")}
            | {"names": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        (scale,) = (parameter for parameter, name in names.items() if name.startswith(NORMS["gamma1_norm"]))
        self.scale_gradients.append(0.0 if scale.grad is None else float(scale.grad.norm()))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        self.norms.append({norm: _norm(model, prefixes) for norm, prefixes in NORMS.items()})


def _norm(model: nn.Module, prefixes: tuple[str, ...]) -> float:
    squares = [
        parameter.detach().double().square().sum()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes)
    ]
    return float(torch.stack(squares).sum().sqrt())


class _Recorded(Sampler[int]):
    """The recorded order, epoch by epoch."""

    def __init__(self, run: RecordedRun) -> None:
        places = {sample["id"]: place for place, sample in enumerate(run.samples)}
        self.order = [places[name] for name in run.sample_ids]
        self.length = min(len(places), len(self.order))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(self.order[start : start + self.length])


@dataclass
class Trained:
    """A recorded run and ours."""

    run: RecordedRun
    recorder: _Recorder = field(default_factory=_Recorder)
    own_order: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def error(self, name: str, expected: torch.Tensor) -> float:
        """Largest error of a weight; our vocabulary has one more row, for `<image>`."""
        return float((self.weights[name][: len(expected)] - expected).abs().max())


@pytest.fixture(scope="module", params=list(RUNS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run our training entry on the recorded order of samples."""
    run: RecordedRun = RUNS[request.param]
    folder = tmp_path_factory.mktemp(run.path.stem)
    result = Trained(run)
    own_sampler, own_batches = LlavaTrainer._get_train_sampler, LlavaTrainer.get_batch_samples

    def sampler(trainer: LlavaTrainer, *args: Any) -> Sampler[int]:
        result.own_order += own_sampler(trainer, *args)
        return _Recorded(run)

    def batches(trainer: LlavaTrainer, *args: Any) -> Any:
        fetched, divisor = own_batches(trainer, *args)
        result.supervised += [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in fetched]
        return fetched, divisor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaTrainer, "_get_train_sampler", sampler)
        patch.setattr(LlavaTrainer, "get_batch_samples", batches)
        train(
            run.recipe(),
            folder / "run",
            stages=[run.stage],
            adapter=run.initial_file,
            callbacks=[result.recorder],
        )
    result.rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    result.weights = load_file(folder / "run" / "model.safetensors")
    return result


def test_our_own_sampler_takes_the_samples_of_goldens(trained: Trained) -> None:
    names = [sample["id"] for sample in trained.run.samples]
    first_epoch = trained.run.sample_ids[: len(names)]

    assert [names[index] for index in trained.own_order][: len(first_epoch)] == first_epoch


def test_tokens_supervised_in_goldens_are_supervised(trained: Trained) -> None:
    run = trained.run
    recorded = [batch for step in run.steps for batch in step["micro_batches"]]

    assert len(trained.supervised) == len(recorded)
    for ours, batch in zip(trained.supervised, recorded, strict=True):
        # Recorded before images are expanded, where the model then cuts again; ours is the number after that.
        is_cut = batch["input_shape"][1] + run.tokens_per_image - 1 > run.max_length
        assert 0 < ours <= batch["supervised_tokens"] if is_cut else ours == batch["supervised_tokens"]


def test_parameter_groups_of_goldens_by_name(trained: Trained) -> None:
    names = trained.run.published_names()
    expected = trained.run.record["optimizer"]

    assert len(trained.recorder.groups) == len(expected["groups"])
    for group, recorded in zip(trained.recorder.groups, expected["groups"], strict=True):
        assert sorted(group["names"]) == sorted(names[name] for name in recorded["names"])
        assert group["weight_decay"] == recorded["weight_decay"]
        assert group["initial_lr"] == recorded["initial_lr"]
        assert list(group["betas"]) == expected["defaults"]["betas"]
        assert group["eps"] == expected["defaults"]["eps"]


def test_learning_rates_of_goldens_to_the_last_digits(trained: Trained) -> None:
    assert len(trained.recorder.rates) == len(trained.run.steps)
    for rates, step in zip(trained.recorder.rates, trained.run.steps, strict=True):
        assert rates == pytest.approx(step["lr"], rel=0, abs=1e-12)
    logged = [row["learning_rate"] for row in trained.rows]
    assert logged == pytest.approx([step["lr"][0] for step in trained.run.steps], rel=0, abs=1e-12)


def test_losses_of_goldens_in_every_step(trained: Trained) -> None:
    ours = [row["loss"] for row in trained.rows]
    tolerance = 5e-5 if trained.run.stage == "pretrain" else 2e-4

    assert ours == pytest.approx([step["loss"] for step in trained.run.steps], rel=0, abs=tolerance)


def test_gradient_norms_of_goldens_in_every_step(trained: Trained) -> None:
    ours = [row["grad_norm"] for row in trained.rows]
    expected = [step["grad_norm_before_clipping"] for step in trained.run.steps]

    assert ours == pytest.approx(expected, rel=1e-4)


def test_clipped_gradients_of_the_outer_scale_of_goldens(trained: Trained) -> None:
    # Zero where a step has no image, also here: the parameter has a gradient, and momentum and decay still move it.
    expected = [step["gamma1_grad_norm_after_clipping"] for step in trained.run.steps]

    assert trained.recorder.scale_gradients == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_norms_of_the_weights_of_goldens_after_every_step(trained: Trained) -> None:
    assert len(trained.recorder.norms) == len(trained.run.steps)
    for ours, step in zip(trained.recorder.norms, trained.run.steps, strict=True):
        for name, norm in ours.items():
            loose = name in FUSER_NORMS and not trained.run.is_generic
            assert norm == pytest.approx(step["after_step"][name], rel=1e-2 if loose else 1e-5, abs=1e-6), name


def test_final_weights_of_goldens(trained: Trained) -> None:
    compared = 0
    for name, expected in trained.run.final_weights().items():
        if trained.run.is_generic:
            tolerance = 2e-5
        elif "sampling_offsets" in name:
            # Not reproducible: the default start lies on kinks of the interpolation (README, section 5).
            continue
        else:
            tolerance = 2e-3 if name.startswith("model.fuser.") else 1e-4
        assert trained.error(name, expected) <= tolerance, name
        compared += 1
    assert compared
