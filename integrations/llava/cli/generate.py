"""The command line of generation: questions as arguments, or a file of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from integrations.llava.data import read_image
from integrations.llava.inference import (
    SamplingParams,
    answer_requests,
    find_shard,
    load_predictor,
    load_preparer,
    read_requests,
)
from layerfuse.errors import InputError, UserError

from .options import (
    CommandParser,
    add_model_options,
    add_sampling_options,
    loading_options,
    print_anything,
    quiet_bars,
    read_sampling,
)

__all__ = ["main"]

_EXAMPLES = """examples:
  one question about one image     --image a.jpg --prompt "What is this?"
  the same about two images each   --image a.jpg --image b.jpg --prompt "What is this?"
  one question about two images    --image a.jpg b.jpg --prompt "What differs?"
  a file of questions              --input questions.jsonl --image-folder images --output answers.jsonl
  the same on four GPUs            torchrun --nproc-per-node 4 -m integrations.llava generate --input ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer from the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.input is None) == (arguments.prompt is None):
        parser.error("give either --prompt TEXT or --input FILE --output FILE")
    if (arguments.input is None) != (arguments.output is None):
        parser.error("--input and --output belong together: a file of questions gives a file of answers")
    if arguments.input is not None and arguments.image:
        parser.error("--image belongs to --prompt; images of a file of questions are named in it")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size} is too small; answer at least 1 prompt at a time")
    quiet_bars()
    try:
        sampling = read_sampling(arguments)
        return _answer_prompts(arguments, sampling) if arguments.input is None else _answer_file(arguments, sampling)
    except UserError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m integrations.llava generate",
        description="Answer questions about images.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("questions as arguments").add_argument
    add("--image", action="append", nargs="+", default=[], help="the images of one question; repeat for more questions")
    add("--prompt", action="append", help="question; one for all images, or one each")
    add = parser.add_argument_group("questions in a file").add_argument
    add("--input", help="jsonl or json: id, prompt (or text, or conversations), image")
    add("--image-folder", help="what image names are relative to (default: the input's folder)")
    add("--output", help="jsonl of id, prompt, answer, model_id, metadata; continued if it is there")
    add("--shard", metavar="INDEX/COUNT", help="answer a share (default: torchrun's RANK/WORLD_SIZE)")
    add("--overwrite", action="store_true", help="answer anew; earlier answers go once a new one is there")
    add("--num-workers", type=int, help="processes that prepare images (default: 4 with CUDA, else 0: threads)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    add_model_options(parser)
    add_sampling_options(parser)
    return parser


def _answer_prompts(arguments: argparse.Namespace, sampling: SamplingParams) -> int:
    count = max(len(arguments.image), len(arguments.prompt))
    if len(arguments.prompt) not in (1, count) or len(arguments.image) not in (0, 1, count):
        raise InputError(
            f"got {len(arguments.image)} times --image and {len(arguments.prompt)} prompts; give one for all, or as "
            "many. Several images for one prompt stand behind one --image."
        )
    images = [[read_image(path) for path in paths] for paths in arguments.image] or [[]]
    images = images if len(images) == count else images * count
    prompts = arguments.prompt if len(arguments.prompt) == count else arguments.prompt * count
    preparer = load_preparer(arguments.model)
    for shown, prompt in zip(images, prompts, strict=True):
        preparer.encode(prompt, preparer.sizes(shown), max_new_tokens=sampling.max_new_tokens)
    predictor = load_predictor(arguments.model, **loading_options(arguments))
    print_anything()
    for answer in predictor(images, prompts, batch_size=arguments.batch_size, sampling=sampling):
        print(answer)
    return 0


def _answer_file(arguments: argparse.Namespace, sampling: SamplingParams) -> int:
    shard, requests = find_shard(arguments.shard), read_requests(arguments.input)
    output, answered = answer_requests(
        requests,
        arguments.model,
        arguments.output,
        image_folder=arguments.image_folder or Path(arguments.input).parent,
        sampling=sampling,
        batch_size=arguments.batch_size,
        shard=shard,
        overwrite=arguments.overwrite,
        num_workers=arguments.num_workers,
        # Processes that torchrun started share a terminal: one bar is enough.
        show_bar=False if int(os.environ.get("LOCAL_RANK", 0)) else None,
        **loading_options(arguments),
    )
    missing = output.merge()
    who = f"process {shard.index} of {shard.count}: " if shard.count > 1 else ""
    others = f"{missing} are left to other processes; the last one writes {output.path}"
    rest = others if missing else f"all {len(requests)} are in {output.path}"
    print(f"{who}{answered} questions answered; {rest}", file=sys.stderr)
    return 0
