"""What a harness is told as text, and what its tasks say about decoding, read strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

from integrations.llava.inference import SamplingParams
from integrations.llava.modeling import Quantization
from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

__all__ = ["HarnessArguments", "cut_answer", "read_arguments", "read_decoding"]

_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Settings of decoding that a task may name though we do not do them, and the values that ask for nothing; None: any
# (an image's aspect ratio is the checkpoint's matter).
_WITHOUT_EFFECT = {
    "image_aspect_ratio": None,
    "use_cache": None,
    "skip_special_tokens": (True,),
    "repetition_penalty": (1, None),
    "top_k": (0, -1, None),
}
_READ = ("max_new_tokens", "max_gen_toks", "until", "do_sample", "temperature", "top_p", "num_beams", "seed")


@dataclass(frozen=True)
class HarnessArguments:
    """Arguments of `layerfuse_llava`.

    Attributes:
        pretrained: a run's folder.
        dtype: to compute in; None is the checkpoint's, but bfloat16 on CUDA where that is float32.
        device: None is CUDA if there is one (under torchrun or accelerate the process's own), else the CPU.
        batch_size: prompts at a time.
        max_new_tokens: an answer's longest length where a task says none.
        quantize: "int8" or "nf4" stores the language model in 8 or 4 bits.
        compile: compile decoding.
    """

    pretrained: str
    dtype: torch.dtype | None = None
    device: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 1024
    quantize: Quantization = "none"
    compile: bool = False


def read_arguments(given: Mapping[str, Any]) -> HarnessArguments:
    """Read what a harness was told; `max_batch_size`, which matters to batches of automatic size only, is passed over.

    Raises:
        ValueError: if a name is unknown, `pretrained` is missing, or a value is none of those allowed.
    """
    values = {name: value for name, value in given.items() if name != "max_batch_size"}
    known = [field.name for field in fields(HarnessArguments)]
    for name in values:
        if name not in known:
            raise InputError(unknown_name_message("argument of layerfuse_llava", name, known))
    if not values.get("pretrained"):
        raise InputError("layerfuse_llava needs a checkpoint; give --model_args pretrained=FOLDER of a finished run.")
    values["pretrained"] = str(values["pretrained"])
    if "dtype" in values:
        values["dtype"] = _choose("dtype", values["dtype"], _DTYPES)
    if "quantize" in values:
        values["quantize"] = _choose("quantize", values["quantize"], {name: name for name in get_args(Quantization)})
    for name in ("batch_size", "max_new_tokens"):
        if name in values:
            values[name] = _whole_number(name, values[name])
    if not isinstance(values.get("compile", False), bool):
        raise InputError(f"compile is {values['compile']!r}; give True or False.")
    if values.get("device") == "cuda":
        values["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return HarnessArguments(**values)


def read_decoding(given: Mapping[str, Any], longest: int) -> tuple[SamplingParams, tuple[str, ...]]:
    """Read a task's settings of decoding, which are left as they are, and the texts that end an answer.

    Greedy, as LLaVA answers benchmarks, unless the temperature is above 0; `longest` is an answer's longest length if
    the task says none. A lone blank line among `until` is what lmms-eval fills in where a task names no end: answers of
    several paragraphs would lose all but the first, so it ends none, as with lmms-eval's own LLaVA.

    Raises:
        ValueError: if a setting is unknown, or its value is not possible.
    """
    for name, value in given.items():
        if name in _READ:
            continue
        allowed = _WITHOUT_EFFECT.get(name, ())
        if allowed is not None and value not in allowed:
            raise InputError(
                f"the task sets {name}={value!r} for decoding, which layerfuse_llava does not do; it reads "
                f"{', '.join(_READ)}. Set others with --gen_kwargs, or take them out of the task."
            )
    until = given.get("until") or ()
    ends = (until,) if isinstance(until, str) else until
    if not isinstance(ends, Sequence) or not all(isinstance(end, str) for end in ends):
        raise InputError(f"the task ends answers at until={until!r}; give a text or a list of texts.")
    temperature = float(given.get("temperature") or 0) if given.get("do_sample") is not False else 0.0
    top_p = given.get("top_p")
    length = given.get("max_new_tokens") or given.get("max_gen_toks") or longest
    sampling = SamplingParams(
        max_new_tokens=_whole_number("max_new_tokens", length),
        temperature=temperature,
        top_p=float(top_p) if temperature and top_p else 1.0,
        num_beams=_whole_number("num_beams", given.get("num_beams") or 1),
        seed=int(given.get("seed") or 0),
    )
    return sampling, () if list(ends) == ["\n\n"] else tuple(end for end in ends if end)


def cut_answer(text: str, ends: Sequence[str]) -> str:
    """Take what stands before the first of the texts that end an answer, without surrounding blanks."""
    return text[: min((text.find(end) for end in ends if end in text), default=len(text))].strip()


def _choose(name: str, value: Any, choices: Mapping[str, Any]) -> Any:
    if str(value) not in choices:
        raise InputError(f"{name} is {value!r}; give one of {', '.join(choices)}.")
    return choices[str(value)]


def _whole_number(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; give a whole number from 1 on.")
    return number
