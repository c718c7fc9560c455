"""The layout of transformers' own LLaVA, which the checkpoints of `llava-hf` on the hub have: no fuser but `select`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from integrations.llava.modeling import add_image_token, describe_head
from integrations.llava.prompts import IMAGE_TAG, chat_template, get_template
from layerfuse.backbones import Backbone
from layerfuse.errors import InputError
from layerfuse.fusers import Fuser, create_fuser

from ..content import (
    KEPT_FILES,
    Content,
    Options,
    Origin,
    check_weights,
    copy_files,
    meta_model,
    read_tokenizer,
    reading,
    refuse_injection,
    token_ids,
)
from ..key_maps import BACKBONE, from_llava_hf, to_llava_hf
from ..tensors import CONFIG_FILE, stored_model, write_json, write_sharded
from ..vision_weights import backbone_like, split_tail, vision_config_of, whole_tower
from .layerfuse import OWN

__all__ = ["LLAVA_HF", "content_of", "read_llava_hf", "shared_fields", "write_content", "write_llava_hf"]

LLAVA_HF = "llava-hf"
"""Name of the layout."""
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_llava_hf(folder: Path, config: Mapping[str, Any], options: Options) -> Content:
    """Read a checkpoint of transformers' LLaVA, whatever version wrote it; errors are those of `read_published`."""
    with reading(f"the config of {folder}"):
        described = AutoConfig.from_pretrained(folder)
    assert isinstance(described, LlavaConfig)
    layers = described.vision_feature_layer
    backbone = backbone_like(folder, (layers,) if isinstance(layers, int) else tuple(layers))
    _check(described, backbone)
    fuser = create_fuser("select", in_channels=backbone.embed_dim, num_layers=1)
    return content_of(folder, config, options, LLAVA_HF, described=described, backbone=backbone, fuser=fuser)


def content_of(
    folder: Path,
    config: Mapping[str, Any],
    options: Options,
    layout: str,
    *,
    described: PreTrainedConfig,
    backbone: Backbone,
    fuser: Fuser,
) -> Content:
    """Read what transformers' LLaVA and VipLlava have in common: all but what is tapped, and how it is fused.

    Args:
        folder: of the checkpoint.
        config: its `config.json`.
        options: what the files do not say.
        layout: the checkpoint's.
        described: the same config, as transformers reads it.
        backbone: on the meta device.
        fuser: in front of the projector.

    Raises:
        ValueError: if config, tokenizer and weights do not belong together.
    """
    tokenizer = read_tokenizer(folder)
    image_token_id = add_image_token(tokenizer)
    if image_token_id != described.image_token_index:
        raise InputError(
            f"the config's image_token_index is {described.image_token_index}, but the tokenizer's {IMAGE_TAG} is "
            f"{image_token_id}; config and tokenizer do not belong together."
        )
    template = get_template(options.template or "v1")
    text_config = described.get_text_config()
    model = meta_model(backbone, fuser, text_config, image_token_id=image_token_id, template=template)
    own, tail = split_tail(model, from_llava_hf(stored_model(folder)))
    return Content(
        model=model,
        tensors=check_weights(model, own, str(folder)),
        tokenizer=tokenizer,
        preprocessing=replace(backbone.preprocessing, mode=options.image_mode or backbone.preprocessing.mode),
        template=template,
        folder=folder,
        tail=tail,
        origin=Origin(layout, folder, True, dict(config)),
        generation=token_ids(text_config),
    )


def _check(config: LlavaConfig, backbone: Backbone) -> None:
    strategy = "default" if backbone.num_prefix_tokens else "full"
    faults = []
    if len(backbone.layers) != 1:
        faults.append(f"vision_feature_layer is {config.vision_feature_layer}, expected one layer")
    if config.vision_feature_select_strategy != strategy:
        faults.append(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, expected {strategy!r}"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        faults.append("the projector is not linear, GELU, linear with biases")
    if faults:
        raise InputError(f"this checkpoint is no LLaVA-1.5: {'; '.join(faults)}. Only those can be converted.")


def write_llava_hf(content: Content, folder: Path, options: Options) -> None:
    """Write a checkpoint for `LlavaForConditionalGeneration` into a folder that exists.

    Layers of the vision model behind the tapped one come from the model's origin, or else from `options.vision_tower`.

    Raises:
        ValueError: if there is a fuser or layer injection, the head does more than a product, or the vision model is
            not to be had whole.
    """
    refuse_injection(content, LLAVA_HF)
    backbone, fuser = content.backbone, content.fuser
    if fuser.name != "select" or fuser.num_layers != 1:
        raise InputError(
            f"the model has the fuser {fuser.name!r} over {fuser.num_layers} layers; transformers' LLaVA has no place "
            "for a fuser. Only 'select' on one layer fits; an MMFuser can be written as 'mmfuser'."
        )
    write_content(
        content,
        folder,
        options,
        LLAVA_HF,
        LlavaConfig(
            **shared_fields(content),
            image_seq_length=content.model.config.layout.num_tokens(),
            vision_feature_layer=backbone.layers[0] - backbone.num_blocks - 1,
            vision_feature_select_strategy="default" if backbone.num_prefix_tokens else "full",
            architectures=["LlavaForConditionalGeneration"],
        ),
    )


def shared_fields(content: Content) -> dict[str, Any]:
    """Fields of transformers' LlavaConfig and VipLlavaConfig that say the same in both.

    Raises:
        ValueError: if the vision model is none of transformers, or the head does more than a product.
    """
    own = content.model.config
    if own.head is not None:
        raise InputError(
            f"the language model {describe_head(own.head)}; transformers' LLaVA only multiplies with its head's "
            f"weight, whatever its language model is. Keep the layout {OWN!r}, which holds this model as it is."
        )
    return {
        "vision_config": vision_config_of(content.backbone),
        "text_config": own.get_text_config().to_dict(),
        "image_token_index": own.image_token_index,
        "projector_hidden_act": "gelu",
        "dtype": content.dtype,
    }


def write_content(content: Content, folder: Path, options: Options, layout: str, config: PreTrainedConfig) -> None:
    """Write weights, tokenizer, processor and config of a layout of transformers into a folder that exists.

    Raises:
        ValueError: if the vision model is not to be had whole.
    """
    rest = {name: tensor for name, tensor in content.tensors.items() if not name.startswith(BACKBONE)}
    tower = whole_tower(content, vision_config_of(content.backbone), options)
    write_sharded(to_llava_hf({**tower, **rest}), folder)
    # What it came with, if it comes from there with images prepared like that; else its processor is described anew.
    as_it_came = content.only_preprocessing.mode == content.backbone.preprocessing.mode
    if content.origin is not None and content.origin.layout == layout and as_it_came:
        copy_files(content.origin.folder, folder, tuple(name for name in KEPT_FILES if name != CONFIG_FILE))
    else:
        _write_processor(content, folder)
        # Our head forbids the image token; transformers' has a row for it.
        suppressed = {"suppress_tokens": [content.model.config.image_token_index]}
        write_json(folder / "generation_config.json", {**content.generation_config, **suppressed})
    config.save_pretrained(folder)


def _write_processor(content: Content, folder: Path) -> None:
    backbone, prepare = content.backbone, content.only_preprocessing
    content.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template(content.template, content.tokenizer), encoding="utf-8")
    height, width = prepare.size
    edge = round(min(height, width) / prepare.crop_pct)
    squash = prepare.mode == "squash"
    described = {
        "image_processor_type": "LlavaImageProcessor" if prepare.mode == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_pad": prepare.mode == "pad",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": edge},
        "resample": _RESAMPLE[prepare.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prepare.mean),
        "image_std": list(prepare.std),
    }
    write_json(folder / "preprocessor_config.json", described)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TAG,
        "num_additional_image_tokens": backbone.num_prefix_tokens,
        "patch_size": backbone.patch_size[0],
        "vision_feature_select_strategy": "default" if backbone.num_prefix_tokens else "full",
    }
    write_json(folder / "processor_config.json", processor)
