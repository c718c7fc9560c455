"""Options that every command which loads a model for answering has."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from transformers.utils import logging as transformers_logging

from integrations.llava.inference import SamplingParams
from integrations.llava.modeling import QUANTIZATIONS
from layerfuse.errors import InputError

__all__ = [
    "CommandParser",
    "add_model_options",
    "add_sampling_options",
    "add_stop_option",
    "loading_options",
    "print_anything",
    "quiet_bars",
    "read_sampling",
    "refuse_near_options",
]

_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class CommandParser(argparse.ArgumentParser):
    """A parser that says what is wrong in a line, and where all options are listed, instead of listing them."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")


def refuse_near_options(words: Sequence[str], options: Iterable[str], *, known: Iterable[str]) -> None:
    """Refuse a word that is nearly an option, such as `--dryrun`, with an InputError that says which was meant.

    Args:
        words: what the parser did not know.
        options: names of its options, without dashes in front.
        known: what else may stand behind two dashes.
    """
    for name in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
        if near and "." not in name and name not in known:
            raise InputError(f"--{name} is no option; did you mean --{near[0]}?")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is loaded, and how."""
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="folder of a finished run")
    add("--device", help="torch device (default: CUDA if there is one, else the CPU)")
    add("--dtype", choices=_DTYPES, default="auto", help="auto: the checkpoint's, but bf16 on CUDA where that is fp32")
    add("--quantize", choices=QUANTIZATIONS, default="none", help="store the language model in 8 or 4 bits")
    add("--compile", action="store_true", help="compile decoding (CUDA): a slow start, then faster tokens")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are decoded."""
    default = SamplingParams()
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="longest answer")
    add("--temperature", type=float, default=default.temperature, help="0 is greedy (default)")
    add("--top-p", type=float, default=default.top_p, help="sample among the likeliest tokens only")
    add("--num-beams", type=int, default=default.num_beams, help="width of beam search")
    add("--seed", type=int, default=default.seed, help="of sampling")
    add_stop_option(add)


def add_stop_option(add: Callable[..., object]) -> None:
    """Add the option that names texts at which answers end."""
    help = "an answer ends in front of this text; repeat for more of them"
    add("--stop", action="append", metavar="TEXT", default=[], help=help)


def read_sampling(arguments: argparse.Namespace) -> SamplingParams:
    """Read the options of `add_sampling_options`; a ValueError if a value is not possible."""
    return SamplingParams(**{field.name: getattr(arguments, field.name) for field in fields(SamplingParams)})


def print_anything() -> None:
    """Let this process print characters that its terminal or file has no place for, spelled as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_predictor` and `answer_requests`, from the options of `add_model_options`."""
    return {
        "device": arguments.device,
        "dtype": _DTYPES[arguments.dtype],
        "quantize": arguments.quantize,
        "compile": arguments.compile,
    }


def quiet_bars() -> None:
    """Show transformers' bars of progress on a terminal only."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
