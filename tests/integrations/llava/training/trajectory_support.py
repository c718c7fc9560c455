"""Find the recorded training runs and make recipes of them (the goldens' README, section 5).

Every file with steps is a run, whatever its name; sizes, rates, layers, paths and lengths are read from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from integrations.llava.checkpoints.key_maps import from_published
from integrations.llava.checkpoints.tensors import StoredTensor, stored_tensors
from integrations.llava.config.schema import DataConfig, ModelConfig, Recipe, StageConfig
from tests.goldens_support import SHARED

__all__ = ["RUNS", "RecordedRun"]

FOLDER = SHARED / "trajectory"
DEFAULT_SEED = 42
"""The published entry's."""


class RecordedRun:
    """One run of the published training code.

    Args:
        path: its json file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.arguments: dict[str, str] = self.record["arguments"]
        self.steps: list[dict[str, Any]] = self.record["steps"]

    @property
    def stage(self) -> str:
        """Which of our stages it is."""
        return "pretrain" if self.arguments.get("tune_mm_mlp_adapter") == "True" else "finetune"

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The data set."""
        loaded: list[dict[str, Any]] = json.loads((FOLDER / self.arguments["data_path"]).read_text(encoding="utf-8"))
        return loaded

    @property
    def sample_ids(self) -> list[str]:
        """Ids of all samples in the order in which the run took them."""
        return [name for step in self.steps for batch in step["micro_batches"] for name in batch["ids"]]

    @property
    def is_generic(self) -> bool:
        """Whether it starts from a randomised projector, away from the kinks of the default start (README)."""
        scales = [tensor for name, tensor in load_file(self.initial_file).items() if "gamma" in name]
        return self.stage == "pretrain" and all(bool(scale.any()) for scale in scales)

    @property
    def initial_file(self) -> Path:
        """Fuser and projector before step 1, in the published layout."""
        if self.stage == "finetune":
            return FOLDER / "stage1_final.safetensors"
        own = FOLDER / f"{self.path.stem}_init_projector.safetensors"
        return own if own.exists() else FOLDER / "stage1_init_projector.safetensors"

    def published_names(self) -> dict[str, str]:
        """Published name -> our name, of every trained parameter, by our converter."""
        numbered = {name: StoredTensor.of(torch.tensor(number)) for number, name in enumerate(self.trainable, start=1)}
        return {self.trainable[int(tensor.read()) - 1]: ours for ours, tensor in from_published(numbered).items()}

    @property
    def trainable(self) -> list[str]:
        """Published names of the trained parameters."""
        return list(self.record["trainable"])

    @property
    def max_length(self) -> int:
        """Longer samples are cut."""
        return int(self.arguments["model_max_length"])

    @property
    def tokens_per_image(self) -> int:
        """Positions an image takes up."""
        return int(self._vision["image_size"] // self._vision["patch_size"]) ** 2

    @property
    def _vision(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self._tower / "config.json").read_text(encoding="utf-8"))
        return dict(config.get("vision_config", config))

    @property
    def layers(self) -> tuple[int, ...]:
        """Tapped layers."""
        return tuple(map(int, self.arguments["mm_vision_select_layer"].removeprefix("list").split("/")))

    @property
    def _tower(self) -> Path:
        named = self.arguments["vision_tower"]
        return next(folder / named for folder in (FOLDER, SHARED / "tiny_llava") if (folder / named).is_dir())

    def final_weights(self) -> dict[str, torch.Tensor]:
        """Recorded weights after the last step, under our names."""
        stored = from_published(stored_tensors(FOLDER / f"{self.path.stem}_final.safetensors"))
        return {name: tensor.read() for name, tensor in stored.items()}

    def recipe(self) -> Recipe:
        """The run as a recipe."""
        given = self.arguments
        accumulation = int(given.get("gradient_accumulation_steps", 1))
        micro_batch_size = int(given["per_device_train_batch_size"])
        stage = StageConfig(
            trainable=("fuser", "projector") if self.stage == "pretrain" else ("fuser", "projector", "llm"),
            template=given["version"],
            data=DataConfig(
                path=str(FOLDER / given["data_path"]),
                image_folder=str(FOLDER / given["image_folder"]),
                image_mode="pad" if given.get("image_aspect_ratio") == "pad" else "crop",
                max_length=self.max_length,
            ),
            learning_rate=float(given["learning_rate"]),
            learning_rates={"fuser": float(given["ms_cross_attn_lr"])} if "ms_cross_attn_lr" in given else {},
            batch_size=micro_batch_size * accumulation,
            micro_batch_size=micro_batch_size,
            epochs=float(given["num_train_epochs"]),
            max_steps=int(given["max_steps"]) if "max_steps" in given else None,
            warmup_ratio=float(given["warmup_ratio"]),
            weight_decay=float(given["weight_decay"]),
            scheduler=given["lr_scheduler_type"],
            max_grad_norm=float(self.record["max_grad_norm"]),
            gradient_checkpointing=given["gradient_checkpointing"] == "True",
            group_by_modality=given.get("group_by_modality_length") == "True",
            log_every=5,
            seed=int(given.get("seed", DEFAULT_SEED)),
        )
        model = ModelConfig(
            family="transformers",
            backbone=str(self._tower),
            layers=self.layers,
            fuser="mmfuser",
            llm=str(FOLDER / given["model_name_or_path"]),
        )
        return Recipe(name=self.path.stem, model=model, **{self.stage: stage})  # type: ignore[arg-type]


def _runs() -> dict[str, RecordedRun]:
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    return {
        path.stem: RecordedRun(path) for path, record in found.items() if isinstance(record, dict) and "steps" in record
    }


RUNS = _runs()
"""Every recorded run by name; empty where the goldens are not."""
