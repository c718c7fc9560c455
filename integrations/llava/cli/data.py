"""The command line of data: check a data file against its images, clean it, convert it; look at benchmarks' data."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from integrations.llava.config import StageConfig
from integrations.llava.data import (
    SampleFile,
    SampleSource,
    convert_samples,
    read_samples,
    refuse_existing,
    usable_indices,
)
from integrations.llava.data.doctor import (
    TokenLimit,
    clean_path,
    findings_table,
    sources_table,
    survey_report,
    survey_samples,
    verdict,
    write_clean,
    write_lines,
)
from integrations.llava.evaluation import TASKS, survey_data, survey_text
from integrations.llava.evaluation.tables import chosen_tasks
from integrations.llava.image_layout import AnyResLayout, FixedLayout, ImageLayout, default_pinpoints
from integrations.llava.prompts import TEMPLATES, TOKENIZER, Template, TextEncoder, find_template, get_template
from layerfuse.errors import ExistingFileError, FileAccessError, InputError, MissingFileError, UserError
from layerfuse.files import atomic_file

from .options import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return 0 if the data are sound, 1 if they have problems. Wrong usage exits with 2."""
    parser = CommandParser(
        prog="python -m integrations.llava data",
        description="Check, clean and convert data in LLaVA's format; look at the data of benchmarks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    check = commands.add_parser("check", help="look for faults in a data file and its images")
    _add_check_arguments(check)
    convert = commands.add_parser("convert", help="write data of any form as LLaVA's jsonl and images")
    convert.add_argument(
        "paths", nargs="*", metavar="SOURCE… OUT", help="data of any form, several or shares are mixed; a new folder"
    )
    convert.add_argument("--image-folder", type=Path, help="what image names are relative to that are not inside")
    convert.add_argument(
        "--template", choices=TEMPLATES, default="v1", help="that samples are checked by (default: v1)"
    )
    convert.add_argument(
        "--bad-samples", choices=("fail", "skip"), default="fail", help="stop at them, or leave them out"
    )
    convert.add_argument(
        "--data", type=Path, help="instead of SOURCE: a json file, written as jsonl without its images"
    )
    convert.add_argument("--output", type=Path, help="that file (default: beside the old one, ending in .jsonl)")
    for command in (check, convert):
        command.add_argument(
            "--seed",
            type=int,
            default=StageConfig.seed,
            help="that samples of a share are drawn by (default: a stage's own, %(default)s)",
        )
    survey = commands.add_parser("eval", help="say which benchmarks have their data, and what the others lack")
    survey.add_argument("--data", type=Path, required=True, help="folder of all benchmarks' data")
    survey.add_argument(
        "--tasks", nargs="+", default=["paper"], metavar="NAME", help="tasks (default: paper, all of its)"
    )
    survey.add_argument("--protocol", help="llava, lmms or official (default: the first that each task has)")
    arguments = parser.parse_args(argv)
    command, run = {
        "check": (check, _check),
        "convert": (convert, _convert),
        "eval": (survey, _survey),
    }[arguments.command]
    try:
        return run(arguments)
    except FileAccessError as error:
        command.error(str(error))
    except UserError as error:
        print(f"{command.prog}: {error}", file=sys.stderr)
        return 1


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="samples in any form of docs/data.md; several are mixed")
    add("--image-folder", type=Path, help="what the image names are relative to; needed unless all images are inside")
    add(
        "--template",
        choices=(*TEMPLATES, TOKENIZER),
        default="v1",
        help="prompt template of the training stage (default: v1)",
    )
    add(
        "--images", choices=("decode", "size", "none"), default="decode", help="how to look at images (default: decode)"
    )
    add("--max-pixels", type=int, help="larger images are a problem (default: what Pillow opens)")
    add("--tokenizer", help="folder or hub name; checks lengths in tokens too")
    add("--max-length", type=int, default=2048, help="tokens, images included (default: 2048)")
    add("--image-tokens", type=int, default=576, help="positions that an image takes up (default: 576)")
    add(
        "--anyres",
        type=int,
        metavar="EDGE",
        help="images are cut into tiles of so many pixels an edge, as LLaVA-NeXT does; --image-tokens are a tile's",
    )
    add("--pinpoints", nargs="+", metavar="HxW", help="sizes that --anyres scales images into (default: LLaVA-NeXT's)")
    add("--workers", type=int, help="processes (default: one per CPU)")
    add("--report", type=Path, help="write everything that was found to this JSON file")
    add("--strict", action="store_true", help="exit with 1 also if there are warnings only")
    add("--fix", action="store_true", help="write the usable samples to X.clean.jsonl beside X, which stays as it is")


def _check(arguments: argparse.Namespace) -> int:
    _refuse_missing(arguments.image_folder)
    if arguments.report is not None:
        _refuse_unwritable(arguments.report)
    samples, data = read_samples(arguments.data, seed=arguments.seed), " ".join(arguments.data)
    folder = _image_folder(samples, arguments.image_folder)
    target = clean_path(samples)
    if arguments.fix and target is None:
        raise InputError(
            f"--fix writes one json or jsonl file anew, and {data} is none; write what can be used of it: "
            f"data convert {data} OUT --bad-samples skip."
        )
    if arguments.fix and target is not None and target.exists():
        raise ExistingFileError(f"{target} exists and is left alone; move it away or remove it, or leave out --fix.")
    if arguments.fix and target is not None:
        _refuse_unwritable(target)
    tokenizer = _tokenizer(arguments)
    template = _template(arguments, tokenizer)
    found = survey_samples(
        samples,
        image_folder=folder,
        template=template,
        check_images=arguments.images,
        max_pixels=arguments.max_pixels,
        tokens=None if tokenizer is None else _token_limit(arguments, tokenizer, template),
        workers=arguments.workers,
    )
    print(f"{data}, images {'inside' if samples.images_inside else f'in {folder}'} ({_DEPTH[arguments.images]})\n")
    print(sources_table(found))
    if found.findings:
        print(f"\n{findings_table(found)}")
    print(f"\n{verdict(found)}")
    if arguments.report is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        settings["data"] = data
        with atomic_file(arguments.report) as file:
            file.write(json.dumps(survey_report(found, settings), indent=1).encode())
        print(f"report: {arguments.report}")
    if found.problems and target is None:
        print(f"data convert {data} OUT --bad-samples skip writes the samples that can be used")
    elif found.problems and not arguments.fix:
        print(f"--fix writes the samples that can be used to {target}")
    elif found.problems:
        assert isinstance(samples, SampleFile)
        cleaned = write_clean(samples, found)
        print(
            f"clean file: {cleaned.path} with {cleaned.num_samples:,} samples, {cleaned.num_repaired:,} repaired, "
            f"{cleaned.num_dropped:,} left out; {data} is as it was"
        )
    return 1 if found.problems or (arguments.strict and found.findings) else 0


def _image_folder(samples: SampleSource, given: Path | None) -> Path:
    if given is None and not samples.images_inside:
        raise MissingFileError("image names are relative to a folder, which is missing; give --image-folder FOLDER.")
    return given or Path()


def _refuse_missing(image_folder: Path | None) -> None:
    if image_folder is not None and not image_folder.is_dir():
        raise MissingFileError(f"image folder {image_folder} does not exist; give an existing folder.")


def _refuse_unwritable(path: Path) -> None:
    """Try the place of a file that is written at the end, before millions of samples are read."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FileAccessError(f"{path} cannot be written ({error.strerror}); give another file.") from error


_DEPTH = {"decode": "decoded", "size": "headers only", "none": "not looked at"}


def _tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    if arguments.tokenizer is None:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(arguments.tokenizer)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"tokenizer {arguments.tokenizer} cannot be loaded ({error}); give its folder or hub name."
        ) from error
    return tokenizer


def _template(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None) -> Template:
    if tokenizer is not None:
        return find_template(arguments.template, tokenizer)
    if arguments.template == TOKENIZER:
        raise InputError(f"--template {TOKENIZER} is made of a tokenizer; name it, too: --tokenizer FOLDER_OR_NAME.")
    return get_template(arguments.template)


def _token_limit(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, template: Template) -> TokenLimit:
    # The tokenizer need not know images; no token of its own has this id.
    layout = _layout(arguments.image_tokens, arguments.anyres, arguments.pinpoints)
    encoder = TextEncoder(tokenizer, template.control_tokens)
    return TokenLimit(encoder, layout=layout, max_length=arguments.max_length)


def _layout(num_tokens: int, tile: int | None, pinpoints: Sequence[str] | None) -> ImageLayout:
    if tile is None:
        if pinpoints:
            raise InputError("--pinpoints are of images that are cut into tiles; give --anyres EDGE, too.")
        return FixedLayout(-1, num_tokens)
    edge = math.isqrt(num_tokens)
    if edge**2 != num_tokens:
        raise InputError(
            f"--image-tokens {num_tokens} make no square tile; give a square number, such as 576 (24 x 24)."
        )
    given = [re.fullmatch(r"(\d+)x(\d+)", text) for text in pinpoints or ()]
    if None in given:
        raise InputError(
            f"--pinpoints {' '.join(pinpoints or ())}: give height x width in pixels each, such as 336x672."
        )
    canvases = tuple((int(own[1]), int(own[2])) for own in given if own is not None)
    return AnyResLayout(-1, (tile, tile), (edge, edge), canvases or default_pinpoints((tile, tile)))


def _survey(arguments: argparse.Namespace) -> int:
    kinds = {name: TASKS.get(name) for name in chosen_tasks(arguments.tasks)}
    own = arguments.protocol
    tasks = {name: kind(own) for name, kind in kinds.items() if own is None or own in kind.protocols}
    states = [survey_data(name, task, arguments.data) for name, task in tasks.items()]
    print(survey_text(states))
    return 0 if all(state.state == "complete" for state in states) else 1


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.data is not None:
        return _write_lines(arguments.data, arguments.output)
    if len(arguments.paths) < 2:
        raise InputError("give the data and a new folder: data convert SOURCE… OUT.")
    *sources, target = arguments.paths
    refuse_existing(Path(target))
    _refuse_missing(arguments.image_folder)
    samples = read_samples(sources, seed=arguments.seed)
    folder = _image_folder(samples, arguments.image_folder)
    usable, problems = usable_indices(
        samples,
        image_folder=folder,
        template=get_template(arguments.template),
        check_images="decode",
        bad_samples=arguments.bad_samples,
    )
    written = convert_samples(samples, usable, Path(target), image_folder=folder)
    left_out = f", {len(samples) - len(usable):,} left out" if problems else ""
    print(f"{written.num_samples:,} samples{left_out}, {written.num_images:,} images: {target}/samples.jsonl, images/")
    return 0


def _write_lines(data: Path, output: Path | None) -> int:
    samples = SampleFile(data)
    if samples.has_lines:
        raise ExistingFileError(f"{data} already has one sample a line; there is nothing to convert.")
    target = output or data.with_suffix(".jsonl")
    _refuse_unwritable(target)
    write_lines(samples, target)
    print(f"{len(samples):,} samples: {target}")
    return 0
