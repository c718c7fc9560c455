"""The plain set-up: transformers' Trainer, LLaVA and image processor, and a collator that fills short samples up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from benchmarks.session import Session
from integrations.llava.config import StageConfig
from integrations.llava.synthetic import BACKBONE_FOLDER

__all__ = ["TextsAndPictures", "image_processor", "plain_trainer"]


class TextsAndPictures(Dataset[dict[str, Any]]):
    """Ids and labels, made beforehand, and the path of the picture: the plain set-up is spared the tokenising."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class PlainCollator:
    """Opens and processes pictures as transformers does, and fills ids and labels up to the longest."""

    def __init__(self, processor: Any, pad_token_id: int) -> None:
        self.processor = processor
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what LLaVA takes."""
        pictures = [Image.open(row["image"]).convert("RGB") for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "pixel_values": self.processor(images=pictures, return_tensors="pt")["pixel_values"],
        }


def image_processor(session: Session) -> Any:
    """Return CLIP's image processor, of the size that is measured."""
    from transformers import CLIPImageProcessor

    if session.device == "cpu":
        return CLIPImageProcessor.from_pretrained(BACKBONE_FOLDER)
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def plain_trainer(
    session: Session,
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    config: StageConfig,
    folder: Path,
    *,
    pad_token_id: int,
    callback: Any,
) -> Any:
    """Return a Trainer with the stage's batch, precision, learning rate and checkpointing, all else as it comes."""
    from transformers import Trainer, TrainingArguments

    micro_batch_size, accumulation = config.batches(1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,
        use_cpu=session.device == "cpu",
        save_strategy="no",
        logging_steps=config.log_every,
        report_to=[],
        disable_tqdm=True,
        seed=session.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TextsAndPictures(rows),
        data_collator=PlainCollator(image_processor(session), pad_token_id),
        callbacks=[callback],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer
