"""Options that every command which loads a model for answering has."""

from __future__ import annotations

import argparse
import io
import os
import sys

import torch
from transformers.utils import logging as transformers_logging

from integrations.llava.inference import Predictor, SamplingParams, default_dtype, load_predictor, usable_device
from integrations.llava.modeling import QUANTIZATIONS

__all__ = [
    "add_model_options",
    "add_sampling_options",
    "find_device",
    "find_dtype",
    "load_from_options",
    "print_anything",
    "read_sampling",
]

_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is loaded, and how."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="folder of a finished run")
    group.add_argument("--device", help="torch device (default: CUDA if there is one, else the CPU)")
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="auto: the checkpoint's, but bf16 on CUDA where that is fp32"
    )
    group.add_argument(
        "--quantize", choices=QUANTIZATIONS, default="none", help="store the language model in 8 or 4 bits"
    )
    group.add_argument(
        "--compile", action="store_true", help="compile decoding (CUDA): a slow start, then faster tokens"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are decoded."""
    default = SamplingParams()
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="longest answer")
    group.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=default.top_p, help="sample among the likeliest tokens only")
    group.add_argument("--num-beams", type=int, default=default.num_beams, help="width of beam search")
    group.add_argument("--seed", type=int, default=default.seed, help="of sampling")


def read_sampling(arguments: argparse.Namespace) -> SamplingParams:
    """Read the options of `add_sampling_options`.

    Raises:
        ValueError: if a value is not possible.
    """
    names = SamplingParams().to_dict()
    return SamplingParams(**{name: getattr(arguments, name) for name in names})


def print_anything() -> None:
    """Let this process print characters that its terminal or file has no place for, spelled as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def find_device(arguments: argparse.Namespace) -> torch.device:
    """The device that was asked for; else, if there is CUDA, this process's own under torchrun.

    Raises:
        ValueError: if it cannot be used.
    """
    if arguments.device is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return usable_device(arguments.device)


def find_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """The dtype that was asked for, or that the checkpoint and the device suggest.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model.
    """
    return _DTYPES[arguments.dtype] or default_dtype(arguments.model, find_device(arguments), arguments.quantize)


def load_from_options(arguments: argparse.Namespace) -> Predictor:
    """Load the model; progress is only shown on a terminal.

    Raises:
        FileNotFoundError: as `load_predictor`.
        ValueError: as `load_predictor`.
        ImportError: as `load_predictor`.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    return load_predictor(
        arguments.model,
        device=find_device(arguments),
        dtype=find_dtype(arguments),
        quantize=arguments.quantize,
        compile=arguments.compile,
    )
