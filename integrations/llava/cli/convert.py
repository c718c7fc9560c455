"""The command line of conversion: a checkpoint in, a checkpoint of another layout out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import get_args

from integrations.llava.checkpoints import LAYOUTS, Options, convert, convert_connector
from integrations.llava.prompts import TEMPLATES
from layerfuse.errors import UserError
from layerfuse.preprocessing import Mode

from .options import CommandParser, quiet_bars

__all__ = ["main"]

_LAYOUTS = """layouts:
  layerfuse  ours, which this project's commands and transformers' Auto classes read (the default)
  mmfuser    yuecao0119/MMFuser: LLaVA-1.5's with a fuser
  llava      haotian-liu/LLaVA: LLaVA-1.5, no fuser
  llava-hf   transformers' LlavaForConditionalGeneration, no fuser
  vip-llava  transformers' VipLlavaForConditionalGeneration, several layers side by side
The source may have any of them; its files tell which.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint."""
    parser = CommandParser(
        prog="python -m integrations.llava convert",
        description="Convert checkpoints between layouts, one tensor at a time; numbers and types stay as they are.",
        epilog=_LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, help="folder of a checkpoint, or an adapter file")
    add("--to", dest="target", required=True, help="folder to be written; new or empty")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of what is written")
    add("--template", choices=sorted(TEMPLATES), help="prompt template the model was trained with (default: v1)")
    add("--image-mode", choices=get_args(Mode), help="how images are prepared (default: as the checkpoint says)")
    add("--vision-tower", metavar="FOLDER_OR_NAME", help="the vision model, where the checkpoint lacks it or its name")
    add("--base", metavar="FOLDER_OR_NAME", help="the model of a LoRA folder of LLaVA, if its files do not say")
    add("--merge-lora", metavar="FOLDER", help="adapters to merge into the language model")
    add("--adapter-only", action="store_true", help="convert fuser and projector alone")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_bars()
    options = Options(
        template=arguments.template,
        image_mode=arguments.image_mode,
        vision_tower=arguments.vision_tower,
        base=arguments.base,
    )
    if arguments.adapter_only and (arguments.merge_lora or options != Options()):
        parser.error("--adapter-only takes no other options than --from, --to and --layout")
    try:
        if arguments.adapter_only:
            written = convert_connector(arguments.source, arguments.target, arguments.layout)
        else:
            written = convert(
                arguments.source, arguments.target, arguments.layout, options=options, lora=arguments.merge_lora
            )
    except UserError as error:
        parser.error(str(error))
    print(f"converted: {written}")
    return 0
