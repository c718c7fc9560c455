"""Our own layout: `config.json` of type `layerfuse_llava`, safetensors, processor.

A converted model also has a folder `converted_from`: the small files it came with, and the weights of the vision model
that ours leaves out, so that it can go back as it came.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from integrations.llava.modeling import (
    FusedLlavaConfig,
    LayerfuseImageProcessor,
    LayerfuseVisionConfig,
    build_processor,
    injection_settings,
)
from integrations.llava.prompts import Template, get_template
from layerfuse.backbones import backbone_from_config
from layerfuse.errors import InputError
from layerfuse.fusers import fuser_from_config
from layerfuse.preprocessing import preprocessing_from_dict

from ..content import KEPT_FILES, Content, Options, Origin, check_weights, copy_files, meta_model, reading, token_ids
from ..tensors import CONFIG_FILE, read_json, stored_model, stored_tensors, write_json, write_sharded

__all__ = ["OWN", "read_own", "write_own"]

OWN = "layerfuse"
"""Name of the layout."""
_KEPT = "converted_from"
_TAIL = "vision_tail.safetensors"
_GENERATION = "generation_config.json"


def read_own(folder: Path, options: Options) -> Content:
    """Read a model that training or a conversion wrote.

    Raises:
        FileNotFoundError: if weights are missing.
        ValueError: if it has no prompt template and none is given, or names do not fit.
    """
    with reading(f"the config of {folder}"):
        described = FusedLlavaConfig.from_pretrained(folder)
    vision = described.vision_config
    if not isinstance(vision, LayerfuseVisionConfig) or vision.backbone is None or described.fuser is None:
        raise InputError(f"the config of {folder} describes no backbone and fuser; take the one that was saved.")
    if options.template is None and described.prompt_template is None:
        raise InputError(f"{folder} holds no prompt template; say which one it was trained with: --template v1")
    with reading(f"the prompt template of {folder}"):
        template = (
            get_template(options.template) if options.template else Template.from_dict(described.prompt_template or {})
        )
    with reading(f"the config of {folder}"), torch.device("meta"):
        backbone, fuser = backbone_from_config(vision.backbone), fuser_from_config(described.fuser)
    model = meta_model(
        backbone,
        fuser,
        described.get_text_config(),
        image_token_id=described.image_token_index,
        template=template,
        head=described.head,
        layout=described.layout,
        injection=injection_settings(described.injection),
    )
    with reading(f"the processor of {folder}"):
        processor = AutoProcessor.from_pretrained(folder)
        image_processor = processor.image_processor
    if not isinstance(image_processor, LayerfuseImageProcessor):
        raise InputError(
            f"the processor of {folder} prepares images by {type(image_processor).__name__}; expected "
            f"{LayerfuseImageProcessor.__name__}. Take the processor_config.json that was saved with the model."
        )
    preprocessing = preprocessing_from_dict(image_processor.preprocessing)
    tensors = check_weights(model, stored_model(folder), str(folder))
    kept, origin = folder / _KEPT, None
    if kept.is_dir():
        noted = read_json(kept / "conversion.json")
        origin = Origin(noted["layout"], kept, noted["has_tower"], read_json(kept / CONFIG_FILE))
    generation = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    return Content(
        model=model,
        tensors=tensors,
        tokenizer=processor.tokenizer,
        preprocessing=preprocessing.changed(mode=options.image_mode),
        template=template,
        folder=folder,
        tail=stored_tensors(kept / _TAIL) if (kept / _TAIL).is_file() else {},
        origin=origin,
        generation=generation or token_ids(described.get_text_config()),
    )


def write_own(content: Content, folder: Path) -> None:
    """Write a model that `load_model` and transformers' Auto classes read into a folder that exists."""
    model = content.model
    model.config.architectures = [type(model).__name__]
    model.config.dtype = content.dtype
    write_sharded(content.tensors, folder)
    build_processor(model, content.tokenizer, content.preprocessing, content.template).save_pretrained(folder)
    write_json(folder / _GENERATION, content.generation_config)
    if content.origin is not None:
        kept = folder / _KEPT
        copy_files(content.origin.folder, kept, KEPT_FILES)
        noted = {"layout": content.origin.layout, "has_tower": content.origin.has_tower}
        write_json(kept / "conversion.json", noted)
        if content.tail:
            tail = {name: tensor.read().contiguous() for name, tensor in content.tail.items()}
            save_file(tail, kept / _TAIL, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
