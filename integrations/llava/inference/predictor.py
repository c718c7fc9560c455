"""Answer questions about images with a trained model, one at a time or in batches, always with the same answers."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    CompileConfig,
    LlavaProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from integrations.llava.checkpoints import load_config, load_model, load_processor
from integrations.llava.data import Collator
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, Quantization, check_compiler
from layerfuse.errors import InputError, InvalidTypeError

from .batching import Ask, answer_all
from .encoded_images import EncodedImages, join_prompts
from .loading import load_batches
from .memory import CACHE_ARGUMENT, ConversationMemory, new_static_cache
from .prompt_builder import Images, PreparedPrompts, Preparer, Prompt
from .sampling import SamplingParams, SeededSampling, generate_settings
from .streaming import StopAtTexts, StopWhenSet, WholeTextStreamer, before_texts, stream_text

__all__ = ["Predictor", "default_dtype", "load_predictor", "usable_device"]

# A cache of fixed size has room for a multiple of so many positions: one size serves prompts of many lengths.
_STEP = 256


class Predictor:
    """A model that takes images and prompts and gives answers.

    Prompts are written with the template stored in the checkpoint, exactly as in training.

    Args:
        model: with its prompt template in its config.
        processor: the one saved beside it.
        compile: keep keys and values in a cache of fixed size, with which transformers compiles decoding on CUDA, or
            where and how the config says. The first batches are slow; it pays off for many.

    Raises:
        ValueError: if the checkpoint holds no prompt template, a processor of another kind, or as `check_compiler`.
    """

    def __init__(
        self,
        model: FusedLlavaForConditionalGeneration,
        processor: LlavaProcessor,
        *,
        compile: bool | CompileConfig = False,
    ) -> None:
        self.prepare = Preparer(model.config, processor)
        if compile is True:
            _check_decoding(model.device)
        self.model = model.eval()
        self.processor = processor
        self.compile = bool(compile)
        self._compile_config = compile if isinstance(compile, CompileConfig) else None
        # For the rows of a batch: a cache of fixed size, and the positions for which it has room.
        self._fixed: tuple[int, StaticCache, int] | None = None
        # Threads take turns: what transformers keeps for a compiled model is one for all.
        self._turn = threading.Lock()
        self.collate = Collator(processor.tokenizer.pad_token_id, side="left")
        self.join = partial(join_prompts, collate=self.collate, layout=self.prepare.layout)

    def __call__(
        self,
        images: Sequence[Images],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        sampling: SamplingParams | None = None,
        decoding: SamplingParams | None = None,
        keys: Sequence[str] | None = None,
    ) -> list[str]:
        """Answer prompts.

        Args:
            images: per prompt an image, several, or None; an image may be the path of its file. Images stand in front
                of the prompt, unless the prompt has as many `<image>` tags as there are images.
            prompts: questions, or conversations that end with one.
            max_new_tokens: an answer's longest length; goes before that of `sampling`.
            batch_size: prompts at a time; it changes the speed, not the answers.
            sampling: how answers are decoded; greedily if None.
            decoding: deprecated name of `sampling`.
            keys: a text per prompt, on which, and on the seed, its sampled answer depends; its place if None.

        Returns:
            The answers, without control tokens and surrounding blanks.

        Raises:
            ValueError: if numbers of images and prompts differ, the batch size is below 1, an image file cannot be
                read, or a prompt cannot be written, see `Preparer.encode`.
            TypeError: if images or prompts are no list, or an entry is of another kind.
            FileNotFoundError: if there is no such image file.
        """
        for name, given in (("images", images), ("prompts", prompts)):
            if isinstance(given, str | bytes) or not isinstance(given, Sequence):
                raise InvalidTypeError(f"{name} is a {type(given).__name__}; give a list with one entry per prompt.")
        if len(images) != len(prompts):
            raise InputError(
                f"got {len(images)} images for {len(prompts)} prompts; give one entry of images per prompt."
            )
        sampling = _sampling(sampling, decoding, max_new_tokens)
        prepared = PreparedPrompts(self.prepare, prompts, images, max_new_tokens=sampling.max_new_tokens)
        keys = [str(index) for index in range(len(prompts))] if keys is None else keys
        if len(keys) != len(prompts):
            raise InputError(f"got {len(keys)} keys for {len(prompts)} prompts; give one key per prompt, or None.")
        ask = self.asker(prepared, keys, sampling)
        return answer_all(ask, prepared.lengths(), batch_size, groups=prepared.groups(), show_bar=False)

    def asker(
        self,
        prepared: Dataset[dict[str, Any]],
        keys: Sequence[str],
        sampling: SamplingParams,
        *,
        num_workers: int | None = 0,
    ) -> Ask:
        """Make the function that the generation loop asks: it pads each batch on the left and answers it.

        Sampled answers depend on the seed and their prompts' keys. While the model answers, `num_workers` processes
        prepare prompts and images; 0 are threads of this one, None is 4 where a GPU computes, else 0. An image that is
        shown again soon is not encoded again.
        """
        on_gpu = self.model.device.type == "cuda"
        if num_workers is None:
            num_workers = 4 if on_gpu else 0

        def ask(batches: Sequence[Sequence[int]]) -> Iterator[list[str]]:
            encoded = EncodedImages(self.model, self.prepare.preprocessing)
            size = max(map(len, batches), default=0)
            # Compiled code is for one batch size: a smaller batch is filled up with copies, whose answers are dropped.
            filled = [[*batch, *[batch[-1]] * (size - len(batch))] if self.compile else [*batch] for batch in batches]
            loader = load_batches(prepared, filled, self.join, num_workers=num_workers, for_gpu=on_gpu)
            for batch, full, tensors in zip(batches, filled, loader, strict=True):
                given = {**tensors, "encoded": encoded}
                yield self.answer_batch(given, [keys[index] for index in full], sampling)[: len(batch)]

        return ask

    def new_memory(self) -> ConversationMemory:
        """Make the memory of a conversation, which `stream` fills and reads: its turns cost their own words only."""
        return ConversationMemory(self.model, self.prepare.preprocessing, static=self.compile)

    def stream(
        self,
        images: Images,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        decoding: SamplingParams | None = None,
        memory: ConversationMemory | None = None,
    ) -> Generator[str, None, None]:
        """Answer one prompt, piece by piece; arguments are as in a call, and `memory` is that of the conversation.

        Returns:
            Pieces of text; joined they are the answer of a call. Closing the iterator stops the generation.

        Raises:
            ValueError: if the prompt cannot be written, or `sampling` has beams.
        """
        sampling = _sampling(sampling, decoding, max_new_tokens)
        if sampling.num_beams > 1:
            raise InputError(f"num_beams={sampling.num_beams}: beams cannot be streamed; set num_beams to 1.")
        longest = sampling.max_new_tokens
        sample = self.prepare(images, prompt, max_new_tokens=longest, recent=memory.pictures if memory else None)
        length = len(sample["input_ids"])
        batch = self.join([memory.resume(sample, longest) if memory else sample])
        if memory:
            batch |= {"attention_mask": torch.ones(1, length, dtype=torch.int64), "encoded": memory.encoded}

        def generate(streamer: WholeTextStreamer, stop: StopWhenSet) -> None:
            self.answer_batch(batch, ["0"], sampling, streamer=streamer, stop=stop, memory=memory)

        stops = self._stops(sampling)
        return stream_text(
            generate, WholeTextStreamer(self.processor.tokenizer, partial(self._text, stop=stops), stops)
        )

    @torch.inference_mode()
    def answer_batch(
        self,
        batch: Mapping[str, Any],
        keys: Sequence[str],
        sampling: SamplingParams,
        *,
        streamer: WholeTextStreamer | None = None,
        stop: StopWhenSet | None = None,
        memory: ConversationMemory | None = None,
    ) -> list[str]:
        """Answer a batch that `collate` or `join` made.

        Args:
            batch: with what was encoded before as `encoded`, if anything was.
            keys: as for `asker`.
            sampling: how answers are decoded.
            streamer: is told tokens as they come.
            stop: ends the answers.
            memory: that the batch, of one prompt, was resumed from.
        """
        device, stops = self.model.device, self._stops(sampling)
        prompts = {name: batch[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask")}
        length = prompts["input_ids"].shape[1]
        draw = [SeededSampling(sampling, keys, device)] if sampling.temperature else []
        settings = generate_settings(
            sampling,
            prompt_length=length,
            ends=self.prepare.ends,
            padding=self.processor.tokenizer.pad_token_id,
            forbidden=[self.prepare.image_token_id],
        )
        criteria: list[StoppingCriteria] = [StopAtTexts(stops, length, self._written)] if stops else []
        criteria += [stop] if stop else []
        encode = batch.get("encoded") or EncodedImages(self.model, self.prepare.preprocessing, most_bytes=0)
        with self._turn:
            settings |= self._cache_settings(len(prompts["input_ids"]), length, sampling, memory)
            ids = self.model.generate(
                **prompts,
                **encode(batch),
                **settings,
                logits_processor=LogitsProcessorList(draw),
                stopping_criteria=StoppingCriteriaList(criteria),
                streamer=streamer,
            )
        if memory:
            memory.hold(ids[0].tolist())
        return [self._text(row, stop=stops) for row in ids[:, length:].tolist()]

    def _cache_settings(
        self, rows: int, length: int, sampling: SamplingParams, memory: ConversationMemory | None
    ) -> dict[str, Any]:
        """Settings of `generate` that say where keys and values go, and how decoding is compiled."""
        settings: dict[str, Any] = {"compile_config": self._compile_config}
        if memory is not None:
            return settings | {CACHE_ARGUMENT: memory.cache}
        if not self.compile:
            return settings
        if sampling.num_beams > 1:  # beams are put in another order in new tensors
            return settings | {"cache_implementation": "static"}
        # The same tensors for all batches: CUDA graphs are recorded for their addresses.
        room = length + sampling.max_new_tokens
        if self._fixed is None or self._fixed[0] != rows or self._fixed[2] < room:
            self._fixed = None  # its memory is free before there is another
            self._fixed = (rows, *new_static_cache(self.model, room, step=_STEP))
        cache = self._fixed[1]
        cache.reset()
        return settings | {CACHE_ARGUMENT: cache}

    def _stops(self, sampling: SamplingParams) -> list[str]:
        """Texts that end an answer: those asked for, and that of a template whose answers end with no token."""
        template = self.prepare.template
        return [*sampling.stop, *([template.answer_end] if template.answer_end and not template.end else [])]

    def _written(self, ids: Sequence[int]) -> str:
        # The end is dropped by name: a template's token need not be one of the tokenizer's special ones.
        written = itertools.takewhile(lambda token: token not in self.prepare.ends, ids)
        text: str = self.processor.tokenizer.decode([*written], skip_special_tokens=True)
        return text

    def _text(self, ids: Sequence[int], *, stop: Sequence[str] = ()) -> str:
        text, template = before_texts(self._written(ids), stop), self.prepare.template
        if template.answer_end and template.end:
            text = text.rstrip().removesuffix(template.answer_end)
        return text.strip()


def load_predictor(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization = "none",
    compile: bool | CompileConfig = False,
) -> Predictor:
    """Load a run's folder, as `train` wrote it, for answering.

    Args:
        folder: of the run.
        device: where to compute; see `usable_device`.
        dtype: to compute in; `default_dtype` if None.
        quantize: "int8" or "nf4" stores the language model's linear layers in 8 or 4 bits.
        compile: see `Predictor`.

    Returns:
        The predictor, in evaluation mode.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if its weights do not cover the model, it has no prompt template, or as `check_compiler`.
        ImportError: if bitsandbytes is needed and not installed.
    """
    device = usable_device(device)
    if compile is True:
        _check_decoding(device)
    config, processor = load_config(folder), load_processor(folder)
    Preparer(config, processor)  # says what is missing before the weights are read
    dtype = dtype or default_dtype(folder, device, quantize)
    return Predictor(load_model(folder, device=device, dtype=dtype, quantize=quantize), processor, compile=compile)


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device that was asked for, once a tensor was made there; raise a ValueError where that fails.

    None takes CUDA if there is one (under torchrun the process's own), else the CPU.
    """
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"device {str(device)!r} cannot be used ({reason}); give cpu, or cuda where there is one."
        ) from error
    return found


def _check_decoding(device: torch.device) -> None:
    # On other devices transformers compiles nothing.
    if device.type == "cuda":
        check_compiler(device)


def default_dtype(folder: str | Path, device: torch.device, quantize: Quantization = "none") -> torch.dtype:
    """The checkpoint's dtype, but bfloat16 for float32 on CUDA, and float16 for int8: bitsandbytes computes in that."""
    if quantize == "int8":
        return torch.float16
    stored = load_config(folder).dtype or torch.float32
    assert isinstance(stored, torch.dtype)
    return torch.bfloat16 if device.type == "cuda" and stored == torch.float32 else stored


def _sampling(
    sampling: SamplingParams | None, decoding: SamplingParams | None, max_new_tokens: int | None
) -> SamplingParams:
    if decoding is not None:
        warnings.warn("decoding is now called sampling", DeprecationWarning, stacklevel=3)
    sampling = sampling or decoding or SamplingParams()
    return sampling if max_new_tokens is None else dataclasses.replace(sampling, max_new_tokens=max_new_tokens)
