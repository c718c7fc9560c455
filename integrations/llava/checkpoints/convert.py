"""Convert a checkpoint of any layout to any other that has a place for it; files tell the layout, not their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from integrations.llava.image_layout import FixedLayout
from layerfuse.errors import ExistingFileError, InputError
from layerfuse.files import atomic_folder, check_disk_space, holds_first_save_half_way
from layerfuse.registry import unknown_name_message

from .content import Options
from .key_maps import CONCAT_NORM, connector_to_published, our_connector
from .layouts.layerfuse import OWN, write_own
from .layouts.llava import PUBLISHED, write_published
from .layouts.llava_config import check_fuser
from .layouts.llava_hf import LLAVA_HF, write_llava_hf
from .layouts.vip_llava import VIP_LLAVA, write_vip_llava
from .lora import merged_tensors
from .reading import LAYOUTS, layout_of, read_checkpoint, read_config
from .tensors import CONFIG_FILE, holds_model, stored_model, stored_tensors

__all__ = ["convert", "convert_connector"]

# What a connector's file is called: ours, as a stage of training leaves it; the published one, as their stage 1 does.
_OUR_CONNECTOR, _PUBLISHED_CONNECTOR = "adapter.safetensors", "mm_projector.bin"
_CONNECTORS = (_OUR_CONNECTOR, "mm_projector.safetensors", _PUBLISHED_CONNECTOR)


def convert(
    source: str | Path,
    target: str | Path,
    layout: str = OWN,
    *,
    options: Options | None = None,
    lora: str | Path | None = None,
) -> Path:
    """Convert a checkpoint.

    Weights are read and written one shard at a time and keep their numbers and types.

    Args:
        source: folder of a checkpoint of any layout.
        target: folder that does not hold anything yet; it is filled when all is written, or not at all.
        layout: of the target, one of `LAYOUTS`.
        options: what the source's files do not say.
        lora: folder of `save_lora` or PEFT whose adapters are merged on the way.

    Returns:
        The target.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the target holds something, the source cannot be read as what it says it is, or the layout has no
            place for the model.
        OSError: if the disk has not enough room.
    """
    source, target, options = Path(source), Path(target), options or Options()
    _check_layout(layout)
    _refuse_file(target)
    # Hidden files do not count, nor do others of a conversion that was killed while it moved them here.
    present = sorted(path.name for path in target.glob("*") if not path.name.startswith("."))
    if present and not holds_first_save_half_way(target):
        raise InputError(f"{target} already holds {', '.join(present[:3])}; give a new or empty folder.")
    content = read_checkpoint(source, options)
    images = content.model.config.layout
    if layout != OWN and not isinstance(images, FixedLayout):
        raise InputError(
            f"the tokens of an image depend on its size here (image layout {images.name!r}); the layout {layout!r} has "
            f"one number for all images. Keep {OWN!r}, which holds this model as it is."
        )
    if lora is not None:
        content = replace(content, tensors=merged_tensors(content.tensors, lora))
    needed = sum(tensor.num_bytes for tensor in (*content.tensors.values(), *content.tail.values()))
    check_disk_space(target, needed, "the converted checkpoint")
    with atomic_folder(target) as scratch:
        if layout == OWN:
            write_own(content, scratch)
        elif layout == LLAVA_HF:
            write_llava_hf(content, scratch, options)
        elif layout == VIP_LLAVA:
            write_vip_llava(content, scratch, options)
        else:
            write_published(content, scratch, options, fused=layout == PUBLISHED[0])
    return target


def convert_connector(source: str | Path, target: str | Path, layout: str = OWN) -> Path:
    """Convert fuser and projector alone.

    Args:
        source: a connector's file of any layout, a folder with one, or a whole checkpoint.
        target: folder for `adapter.safetensors` (ours) or `mm_projector.bin` (published).
        layout: of the target, one of `LAYOUTS`.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: if there is no connector.
        FileExistsError: if the target has such a file already.
        ValueError: if the source holds no fuser and projector, or the layout has no place for them.
        OSError: if the disk has not enough room.
    """
    source, target = Path(source), Path(target)
    _check_layout(layout)
    written = target / (_OUR_CONNECTOR if layout == OWN else _PUBLISHED_CONNECTOR)
    if written.exists():
        raise ExistingFileError(f"{written} exists already; give another folder, or move it away.")
    _refuse_file(target)
    if layout in (LLAVA_HF, VIP_LLAVA):
        raise InputError(f"the layout {layout} has no files of connectors; give one of {', '.join((OWN, *PUBLISHED))}.")
    # A whole model counts more than a connector beside it, which may be of an earlier stage.
    beside = [] if holds_model(source) else [source / name for name in _CONNECTORS if (source / name).is_file()]
    file = source if source.is_file() else next(iter(beside), None)
    connector = our_connector(stored_model(source) if file is None else stored_tensors(file))
    if not connector:
        raise InputError(f"{source} holds neither a fuser nor a projector under a name of any layout.")
    if layout in PUBLISHED:
        if any(name.startswith(CONCAT_NORM) for name in connector):
            raise InputError(
                f"{source} has the fuser 'concat' of ViP-LLaVA; connectors of the layouts {' and '.join(PUBLISHED)} "
                f"have no place for it. Give {OWN!r}, or convert the whole checkpoint to {VIP_LLAVA!r}."
            )
        fused = any(name.startswith("model.fuser.") for name in connector)
        fitting = PUBLISHED[0] if fused else PUBLISHED[1]
        if layout != fitting:
            had = "a" if fused else "no"
            raise InputError(f"{source} has {had} fuser, so its connector has the layout {fitting!r}.")
        if (source / CONFIG_FILE).is_file() and layout_of(source) == OWN:
            check_fuser(read_config(source)["fuser"], fused=fused)
        connector = connector_to_published(connector)
    tensors = {name: tensor.read().contiguous() for name, tensor in connector.items()}
    check_disk_space(target, sum(tensor.nbytes for tensor in tensors.values()), "the converted connector")
    with atomic_folder(target) as scratch:
        if layout == OWN:
            save_file(tensors, scratch / written.name, metadata={"format": "pt", "parts": "fuser,projector"})
        else:
            torch.save(tensors, scratch / written.name)
    return written


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(unknown_name_message("layout", layout, LAYOUTS))


def _refuse_file(target: Path) -> None:
    place = next(place for place in (target, *target.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ExistingFileError(f"{place} is a file, so {target} cannot be a folder; give another place.")
