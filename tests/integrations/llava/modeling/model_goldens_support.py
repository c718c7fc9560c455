"""Recorded runs of a whole published model (goldens' README, section 2), and what ours computes in their place.

Everything is read from the files: cases, prompts, layers, widths, vocabulary, lengths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from integrations.llava.checkpoints.key_maps import from_published
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.checkpoints.tensors import stored_model
from integrations.llava.data import Collator, ConversationDataset
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from integrations.llava.prompts import Rendered
from layerfuse.preprocessing import Preprocessing
from tests.goldens_support import SHARED

__all__ = ["CASES", "PROMPTS", "RECORDED", "Case", "Comparison", "Run", "recorded_names"]

RECORDED = SHARED / "tiny_llava"
_NOTES: dict[str, Any] = json.loads((RECORDED / "cases.json").read_text()) if RECORDED.is_dir() else {}
CASES: tuple[str, ...] = tuple(_NOTES.get("cases", ()))
"""Forward passes, some with gradients."""
PROMPTS: tuple[str, ...] = tuple(_NOTES.get("generation", ()))
"""Prompts that were answered greedily, one of them a batch."""

# The published code's number for an image in the ids.
_IMAGE = -200
# README: recommended tolerances. Gradients are relative to a tensor's largest entry; a few sampling coordinates lie
# on a kink of bilinear interpolation.
_ATOL = {
    "vision.stack": 1e-4,
    "fuser.output": 1e-4,
    "projector.output": 1e-4,
    "expanded.inputs_embeds": 1e-4,
    "logits": 2e-4,
    "loss": 1e-5,
    "scores": 2e-4,
}
_GRADIENT, _KINKED = 2e-5, 1e-3


@dataclass(frozen=True)
class Comparison:
    """One recorded tensor and ours."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor
    atol: float

    @property
    def error(self) -> float:
        """Largest difference; of gradients, as a share of the largest recorded entry."""
        scale = float(self.expected.abs().max()) if self.name.startswith("grad.") else 1.0
        return float((self.actual - self.expected).abs().max()) / scale

    def check(self) -> None:
        torch.testing.assert_close(
            self.actual, self.expected, atol=self.atol, rtol=0, msg=lambda m: f"{self.name}: {m}"
        )


class Case:
    """A recorded forward pass."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.note = _NOTES["cases"][name]
        self.tensors = load_file(RECORDED / "cases" / f"{name}.safetensors")

    @property
    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of each sample, without padding."""
        masks = self.tensors["attention_mask"].bool()
        parts = zip(self.tensors["input_ids"], self.tensors["labels"], masks, strict=True)
        return [(ids[mask], labels[mask]) for ids, labels, mask in parts]

    @cached_property
    def pixels(self) -> torch.Tensor:
        """(images, 3, height, width), a black image for each sample without one; a variant has its original's."""
        if "pixel_values" in self.tensors:
            return self.tensors["pixel_values"]
        others = (load_file(RECORDED / "cases" / f"{name}.safetensors") for name in CASES)
        return next(
            other["pixel_values"]
            for other in others
            if "pixel_values" in other and torch.equal(other["input_ids"], self.tensors["input_ids"])
        )

    @property
    def own_pixels(self) -> list[torch.Tensor]:
        """Each sample's images. There, a sample without image takes a black one's place; here, it has none."""
        counts = [int((ids == _IMAGE).sum()) for ids, _ in self.rows]
        slots = self.pixels.split([max(count, 1) for count in counts])
        return [slot[:count] for slot, count in zip(slots, counts, strict=True)]


class _RecordedTexts(ConversationDataset):
    """Our data set over recorded ids: what they become is its own work."""

    texts: list[Rendered]
    images: list[torch.Tensor]

    def render(self, index: int) -> Rendered:
        return self.texts[index]

    def pixels(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        row, index = map(int, name.split())
        pixels = self.images[row][index]
        return pixels[None], (pixels.shape[1], pixels.shape[2])


class Run:
    """Our model, converted from the recorded checkpoint.

    Args:
        folder: where the conversion is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: FusedLlavaForConditionalGeneration = load_model(folder)
        self.processor = load_processor(folder)
        self.published: dict[str, Any] = json.loads((RECORDED / "checkpoint" / "config.json").read_text())
        self.vocabulary: int = self.published["vocab_size"]

    def batch(self, case: Case) -> dict[str, torch.Tensor]:
        """Expand, cut and pad as in training."""
        image = self.model.config.image_token_index
        preprocessing = Preprocessing.from_dict(self.processor.image_processor.preprocessing)
        samples = [
            {"id": str(row), "conversations": [], "image": [f"{row} {index}" for index in range(len(pixels))]}
            for row, pixels in enumerate(case.own_pixels)
        ]
        dataset = _RecordedTexts(
            samples,
            image_folder="",
            template=None,  # type: ignore[arg-type]
            encoder=None,  # type: ignore[arg-type]
            preprocessing=preprocessing,
            layout=self.model.config.layout,
            max_length=case.note.get("tokenizer_model_max_length", self.published["tokenizer_model_max_length"]),
        )
        dataset.texts = [
            Rendered("", torch.where(ids == _IMAGE, image, ids).tolist(), labels.tolist()) for ids, labels in case.rows
        ]
        dataset.images = case.own_pixels
        batch = Collator(self.processor.tokenizer.pad_token_id)([dataset[row] for row in range(len(samples))])
        batch.pop("sample_ids", None)
        return batch

    def vision(self, case: Case) -> Iterator[Comparison]:
        """Tapped layers, fuser and projector, on every recorded image, black ones included."""
        with torch.no_grad():
            maps = self.model.model.vision_tower(case.pixels).maps
            features = self.model.get_image_features(case.pixels)
        found = {
            "vision.stack": torch.stack(maps),
            "fuser.output": features.last_hidden_state,
            "projector.output": torch.stack(list(features.pooler_output)),
        }
        yield from (self._compare(case, name, tensor) for name, tensor in found.items() if name in case.tensors)

    def text(self, case: Case) -> Iterator[Comparison]:
        """Embeddings with images in place, logits and loss; where a sample is padded nothing is compared."""
        batch = self.batch(case)
        seen: list[torch.Tensor] = []
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad(), hook:
            out = self.model(**batch)
        mask = batch["attention_mask"].bool()
        # The image token has a row of its own here, which is forbidden as an answer.
        found = {"expanded.inputs_embeds": seen[0], "logits": out.logits[..., : self.vocabulary]}
        for name, tensor in found.items():
            yield Comparison(name, tensor[mask], case.tensors[name][mask], _ATOL[name])
        yield Comparison("loss", out.loss, case.tensors["loss"][0], _ATOL["loss"])

    def gradients(self, case: Case) -> Iterator[Comparison]:
        """Gradients of the loss for every parameter that has one recorded."""
        recorded = {name.removeprefix("grad."): tensor for name, tensor in case.tensors.items() if "grad." in name}
        whole = stored_model(RECORDED / "checkpoint")
        published = {id(tensor): name for name, tensor in whole.items()}
        ours = {published[id(tensor)]: name for name, tensor in from_published(whole).items()}
        parameters = dict(self.model.named_parameters())
        self.model.zero_grad()
        self.model(**self.batch(case)).loss.backward()
        for name, expected in recorded.items():
            gradient = parameters[ours[name]].grad
            assert gradient is not None, name
            share = _KINKED if "sampling_offsets" in name else _GRADIENT
            # Our embedding and head have a row more.
            yield Comparison(f"grad.{name}", gradient[: len(expected)], expected, share * float(expected.abs().max()))
        self.model.zero_grad()

    def _compare(self, case: Case, name: str, tensor: torch.Tensor) -> Comparison:
        return Comparison(name, tensor, case.tensors[name], _ATOL[name])

    def answer(self, name: str) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Answer a prompt, or a batch of them with padding on the left.

        Yields:
            Per prompt, the new ids, and the scores (T, vocabulary) they were chosen by.
        """
        note = _NOTES["generation"][name]
        rows = note["input_ids"] if isinstance(note["input_ids"][0], list) else [note["input_ids"]]
        masks = note.get("attention_mask") or [[1] * len(row) for row in rows]
        given = note["images"] if isinstance(note["images"], list) else []
        pictures = iter(Image.open(RECORDED.parent / "images" / f"{image}.png") for image in given)
        preprocessing = Preprocessing.from_dict(self.processor.image_processor.preprocessing)
        config = self.model.config
        items = []
        for row, mask in zip(rows, masks, strict=True):
            ids = torch.tensor(row)[torch.tensor(mask).bool()]
            own = [next(pictures) for _ in range(int((ids == _IMAGE).sum()))]
            repeats = torch.where(ids == _IMAGE, config.image_seq_length, 1)
            ids = torch.where(ids == _IMAGE, config.image_token_index, ids).repeat_interleave(repeats)
            pixels = preprocessing.batch(own) if own else torch.empty(0, 3, *preprocessing.size)
            items.append({"input_ids": ids, "pixel_values": pixels})
        tokenizer = self.processor.tokenizer
        batch = Collator(tokenizer.pad_token_id, side="left")(items)
        out = self.model.generate(
            **batch,
            max_new_tokens=_new_tokens(note),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            output_scores=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[:, batch["input_ids"].shape[1] :]
        scores = torch.stack(out.scores, dim=1)[..., : self.vocabulary]
        yield from zip(new.tolist(), scores, strict=True)

    def expected_answers(self, name: str) -> Iterator[tuple[list[int], torch.Tensor | None]]:
        """The recorded new ids, and their scores where there are any."""
        ids = _NOTES["generation"][name]["output_ids"]
        scores = load_file(RECORDED / "cases" / "generation.safetensors").get(f"{name}.scores")
        for row in ids if isinstance(ids[0], list) else [ids]:
            # There, generation from embeddings puts a BOS in front.
            yield row[1:], scores

    def answers(self, name: str) -> Iterator[tuple[list[int], list[int], Comparison | None]]:
        """Answer and compare: our ids, the recorded ones, scores where recorded."""
        for (ids, actual), (expected_ids, expected) in zip(self.answer(name), self.expected_answers(name), strict=True):
            scores = None if expected is None else Comparison("scores", actual, expected, _ATOL["scores"])
            yield ids, expected_ids, scores


def _new_tokens(note: dict[str, Any]) -> int:
    ids = note["output_ids"][0] if isinstance(note["output_ids"][0], list) else note["output_ids"]
    return len(ids) - 1


def recorded_names() -> dict[str, set[str]]:
    """Every file of cases, and what it holds."""
    return {path.stem: set(load_file(path)) for path in sorted((RECORDED / "cases").glob("*.safetensors"))}
