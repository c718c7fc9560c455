"""Answers: the first token and those after it, beside transformers' own LLaVA and `generate`; and the fuser's share.

python -m benchmarks.generation --device cuda

Times begin with prepared tensors on the host. Both models answer greedily, exactly as many tokens as they are told to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.llava_models import assemble_ours, load_size, plain_model
from benchmarks.measure import Call, Timing, time_in_turn
from benchmarks.session import Session
from integrations.llava.inference import Predictor, SamplingParams
from integrations.llava.modeling import Assembled, build_processor
from integrations.llava.prompts import get_template
from integrations.llava.synthetic import make_dataset

__all__ = ["run"]

OURS, PLAIN = "layerfuse", "transformers"
FIRST, NEXT = "generation, first token", "generation, seconds per token"


def run(session: Session) -> None:
    """Build both models once, and answer batches of 1 and of 32."""
    transformers.utils.logging.disable_progress_bar()
    if session.device == "cuda" and not session.has_time(90, NEXT, OURS):
        return
    recipe = load_size(session)
    ours = assemble_ours(session, recipe, None)
    dtype = torch.bfloat16 if session.device == "cuda" else torch.float32
    nn.Module.to(ours.model, dtype)
    plain = plain_model(session, ours, None).to(session.device, dtype).eval()
    predictor = _predictor(session, ours, recipe.finetune.template)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_dataset(Path(scratch) / "data", seed=session.seed, num_train=1, num_val=1, num_test=1)
        picture = next((data / "images").glob("train_*"))
        for batch_size in session.pick((1, 32), (1, 8), (1, 2)):
            if session.device == "cuda" and not session.has_time(60, NEXT, OURS, case=f"B={batch_size}"):
                continue
            with session.attempt(NEXT, OURS, case=f"B={batch_size}"):
                batch = _batch(predictor, picture, batch_size)
                _compare(session, predictor, plain, batch, batch_size)
            with session.attempt("fuser's share of the first token", "mmfuser", case=f"B={batch_size}"):
                _fuser_share(session, ours.model, batch, batch_size)


def _predictor(session: Session, ours: Assembled, template: str) -> Predictor:
    model, written = ours.model, get_template(template)
    model.config.prompt_template = written.to_dict()
    processor = build_processor(model, ours.tokenizer, model.model.vision_tower.backbone.preprocessing, written)
    return Predictor(model, processor, compile=session.device == "cuda")


def _batch(predictor: Predictor, picture: Path, batch_size: int) -> dict[str, Any]:
    prompts = [predictor.prepare([picture], "What colour is the large shape?", max_new_tokens=128)] * batch_size
    return predictor.collate(prompts)


def _compare(
    session: Session, predictor: Predictor, plain: nn.Module, batch: Mapping[str, Any], batch_size: int
) -> None:
    length = session.pick(65, 17, 3)
    calls: dict[str, Call] = {}
    pixels = _normalised(predictor.model, batch)
    for label, answer in ((OURS, _ours(predictor, batch)), (PLAIN, _plain(session, plain, batch, pixels))):
        for count in (1, length):
            calls[f"{label}, {count}"] = lambda answer=answer, count=count: answer(count)
    for call in calls.values():  # what is compiled or recorded at first calls is not timed
        for _ in range(2 if session.device == "cuda" else 0):
            call()
    timings = time_in_turn(calls, device=session.device, pace=session.pace(20.0, fewest=3))
    first = {label: timings[f"{label}, 1"] for label in (OURS, PLAIN)}
    after = {label: _rest(timings[f"{label}, {length}"], first[label], length - 1) for label in (OURS, PLAIN)}
    case, tokens = f"B={batch_size}", batch["input_ids"].shape[1]
    facts = {"batch_size": batch_size, "prompt_tokens": tokens, "new_tokens": length}
    session.record_timings(FIRST, first, ours=(OURS,), case=case, facts=facts)
    session.record_timings(NEXT, after, ours=(OURS,), case=case, facts=facts, per=batch_size)


def _rest(whole: Timing, first: Timing, count: int) -> Timing:
    """Seconds of each token behind the first, from answers of two lengths."""

    def each(long: tuple[float, ...], short: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(max(a - b, 1e-9) / count for a, b in zip(long, short, strict=True))

    return Timing(each(whole.wall, first.wall), each(whole.processor, first.processor))


def _ours(predictor: Predictor, batch: Mapping[str, Any]) -> Any:
    keys = [str(index) for index in range(len(batch["input_ids"]))]

    def answer(count: int) -> object:
        predictor.model.generation_config.min_new_tokens = count
        return predictor.answer_batch(batch, keys, SamplingParams(max_new_tokens=count))

    return answer


def _normalised(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the pictures as transformers' image processors hand them over."""
    pixels = batch["pixel_values"]
    return model.model.vision_tower.backbone.preprocessing.normalize(pixels) if pixels.dtype == torch.uint8 else pixels


def _plain(session: Session, model: nn.Module, batch: Mapping[str, Any], pixels: torch.Tensor) -> Any:
    names = ("input_ids", "attention_mask")

    @torch.inference_mode()
    def answer(count: int) -> object:
        tensors = {name: batch[name].to(session.device) for name in names}
        tensors["pixel_values"] = pixels.to(session.device, model.dtype)
        return model.generate(**tensors, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)

    return answer


def _fuser_share(session: Session, model: Any, batch: Mapping[str, Any], batch_size: int) -> None:
    """Time the fuser alone on the maps of the batch, over the whole of the first token."""
    inner = model.model
    with torch.no_grad():
        features = inner.vision_tower(_normalised(model, batch).to(session.device, model.dtype))

        def fuse() -> object:
            with torch.no_grad():
                return inner.fuser(features)

        seconds = time_in_turn({"fuser": fuse}, device=session.device, pace=session.pace(2.0, fewest=5))["fuser"].median
    rows = [row for row in session.rows if row["benchmark"] == FIRST and row["candidate"] == OURS]
    whole = next(row["median_seconds"] for row in rows if row["batch_size"] == batch_size)
    session.record(
        *("fuser's share of the first token", "mmfuser"),
        case=f"B={batch_size}",
        value=round(seconds / whole, 4),
        unit="share",
        batch_size=batch_size,
        fuser_seconds=float(f"{seconds:.4g}"),
    )


if __name__ == "__main__":
    from benchmarks.command import main

    main("generation")
