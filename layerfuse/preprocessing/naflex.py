"""Pictures as padded sequences of patches, each on a grid of its own shape: what NaFlex models take.

SigLIP 2 (arXiv:2502.14786), after NaViT (arXiv:2307.06304): a picture keeps its aspect ratio and is scaled until a
number of patches holds it; what is short of that number is padded, and masked inside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import Grid, as_grid
from layerfuse.preprocessing.pixels import Images, image_size
from layerfuse.preprocessing.preprocessing import Preprocessing

__all__ = ["PatchBatch", "PatchLayout", "holds_patches", "patch_batch", "size_for_patches"]

# Of the values in one patch: channels last, as SigLIP 2 and timm's loaders have them, or first.
PatchLayout = Literal["height width channels", "channels height width"]
_SIGLIP2 = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_TIMM = ("patches", "patch_coord", "patch_valid")


@dataclass(frozen=True)
class PatchBatch:
    """Patches of B pictures, each on its own grid, padded behind to one length; a pytree of torch.

    Grids are numbers of the host: whoever runs the batch needs them there to take the results apart.

    Args:
        patches: (B, N, values of a patch), N at least the largest H_i * W_i, row-major over each grid.
        grids: B pairs (H_i, W_i), in patches.

    Raises:
        ValueError: if these disagree.
    """

    patches: torch.Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.patches.shape)
        if len(shape) != 3 or 0 in shape or not self.patches.is_floating_point():
            raise InputError(
                f"patches are {self.patches.dtype} of shape {shape}; give (B, N, values of a patch) of a floating "
                "dtype, with at least one picture and one patch."
            )
        grids = tuple([as_grid(grid, f"the grid of picture {index}") for index, grid in enumerate(self.grids)])
        object.__setattr__(self, "grids", grids)
        if len(grids) != shape[0]:
            raise InputError(
                f"patches are of {shape[0]} pictures, and {len(grids)} grids were given; give each its own."
            )
        for index, (rows, columns) in enumerate(grids):
            if rows * columns > shape[1]:
                raise InputError(
                    f"picture {index} has a grid of {rows}x{columns} patches, more than the {shape[1]} that are there: "
                    "it was cut off. Prepare it with a smaller grid, or pad the batch to more patches."
                )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> PatchBatch:
        """Return the batch that a processor or a loader made: mask and shapes are checked against one another.

        These are of a few numbers for each picture. If they lie on a GPU, the host waits for it once.

        Args:
            mapping: of transformers' SigLIP 2 processor, ``pixel_values`` (B, N, values), ``pixel_attention_mask`` (B,
                N) and ``spatial_shapes`` (B, 2), rows and columns; or of timm's NaFlex loader, ``patches``,
                ``patch_coord`` (B, N, 2) and ``patch_valid`` (B, N). Other entries, such as those of texts, are left
                alone.

        Raises:
            ValueError: if an entry is missing, or mask and shapes do not fit one another.
            TypeError: if an entry is no tensor.
        """
        keys = _TIMM if any(key in mapping for key in _TIMM) else _SIGLIP2
        if missing := [key for key in keys if key not in mapping]:
            raise InputError(
                f"a batch of patches holds {', '.join(map(repr, mapping))} and lacks {', '.join(map(repr, missing))}; "
                "give the whole output of SigLIP 2's processor or of timm's NaFlex loader; of images the pixel values."
            )
        if mapping.get("attn_mask") is not None:
            raise InputError("a batch of patches has its own 'attn_mask'; patches are masked by 'patch_valid' alone.")
        patches, first, second = (mapping[key] for key in keys)
        for key, value in zip(keys, (patches, first, second), strict=True):
            if not isinstance(value, torch.Tensor):
                raise InvalidTypeError(
                    f"{key!r} of a batch of patches is a {type(value).__name__}; give tensors: processor(images, "
                    'return_tensors="pt").'
                )
        mask, where = (second, first) if keys is _TIMM else (first, second)
        if patches.ndim == 5:  # timm's, for several sizes of patches
            patches = patches.flatten(2)
        expected = {keys[1]: (*patches.shape[:2], 2), keys[2]: tuple(patches.shape[:2])}
        if keys is _SIGLIP2:
            expected = {keys[1]: tuple(patches.shape[:2]), keys[2]: (patches.shape[0], 2)}
        for key, shape in expected.items():
            if patches.ndim != 3 or tuple(mapping[key].shape) != shape:
                raise InputError(
                    f"{keys[0]!r} of a batch of patches has shape {tuple(patches.shape)} and {key!r} "
                    f"{tuple(mapping[key].shape)}; expected (B, N, values of a patch) and {shape}."
                )
        return cls(patches, _grids(mask, where, coordinates=keys is _TIMM))

    def __len__(self) -> int:
        """B, in pictures."""
        return len(self.grids)

    @property
    def mask(self) -> torch.Tensor:
        """(B, N) bool, on the patches' device: True where there is a patch, False where there is padding."""
        positions = torch.arange(self.patches.shape[1], device=self.patches.device)
        return positions < self.spatial_shapes.prod(dim=1, keepdim=True)

    @property
    def spatial_shapes(self) -> torch.Tensor:
        """(B, 2) int64, on the patches' device: rows and columns of each grid."""
        # The host goes on while they are copied.
        return torch.tensor(self.grids).to(self.patches.device, non_blocking=True)

    @property
    def coordinates(self) -> torch.Tensor:
        """(B, N, 2) int64, on the patches' device: row and column of each patch, zeros for padding."""
        columns = self.spatial_shapes[:, 1:]
        positions = torch.arange(self.patches.shape[1], device=self.patches.device).expand(len(self), -1)
        places = torch.stack([positions // columns, positions % columns], dim=-1)
        return places * self.mask[..., None]

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> PatchBatch:
        """Return the batch with patches of another device, dtype or both, as `torch.Tensor.to`."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return replace(self, patches=self.patches.to(device, dtype))

    def pin_memory(self) -> PatchBatch:
        """Return the batch in page-locked memory; DataLoaders call this."""
        return replace(self, patches=self.patches.pin_memory())


def holds_patches(images: object) -> bool:
    """Tell whether this is a `PatchBatch`, or a mapping with an entry that only patches have."""
    names = {*_SIGLIP2[1:], *_TIMM}
    return isinstance(images, PatchBatch) or (isinstance(images, Mapping) and any(name in images for name in names))


def patch_batch(
    preprocessing: Preprocessing,
    images: Images,
    *,
    patch_size: tuple[int, int],
    layout: PatchLayout,
    max_num_patches: int,
) -> PatchBatch:
    """Return pictures, each scaled to the largest grid of its own aspect ratio that holds few enough patches.

    Args:
        preprocessing: whose statistics and filter are taken; nothing is cropped or extended.
        images: as `Preprocessing.batch` takes them.
        patch_size: (height, width) of a patch, in pixels.
        layout: of the values in a patch.
        max_num_patches: N.

    Raises:
        TypeError: if one is no picture.
        ValueError: if there is none, one has values that cannot be, or ``max_num_patches`` is below 1.
    """
    sequences, grids = [], []
    for picture in preprocessing.pictures(images):
        if isinstance(picture, Image.Image):
            own = image_size(picture, upright=preprocessing.upright)
        else:
            own = (picture.shape[0], picture.shape[1])
        size = size_for_patches(own, patch_size, max_num_patches)
        fitted = replace(preprocessing, size=size, mode="squash", crop_pct=1.0)(picture)
        height, width = patch_size
        grids.append((size[0] // height, size[1] // width))
        sequences.append(
            rearrange(
                fitted, f"channels (row height) (column width) -> (row column) ({layout})", height=height, width=width
            )
        )
    if not sequences:
        raise InputError("a batch of patches was asked for of no pictures; give at least one.")
    # The longest that can be, as the libraries pad, whatever these pictures are.
    sequences[0] = F.pad(sequences[0], (0, 0, 0, max_num_patches - len(sequences[0])))
    return PatchBatch(pad_sequence(sequences, batch_first=True), tuple(grids))


def size_for_patches(size: tuple[int, int], patch_size: tuple[int, int], max_num_patches: int) -> tuple[int, int]:
    """Return the size that a picture is scaled to, so that at most so many patches hold it; (height, width) in pixels.

    A multiple of the patch size, and as near to the picture's aspect ratio as SigLIP 2's processor and timm come.

    Raises:
        ValueError: if ``max_num_patches`` is no whole number from 1 on.
    """
    from timm.data.naflex_transforms import get_image_size_for_seq

    if type(max_num_patches) is not int or max_num_patches < 1:
        raise InputError(f"max_num_patches={max_num_patches!r} holds no picture; give 1 or more, such as 256.")
    found: tuple[int, int] = get_image_size_for_seq(size, patch_size, max_num_patches)[1]
    return found


def _grids(mask: torch.Tensor, where: torch.Tensor, *, coordinates: bool) -> tuple[Grid, ...]:
    """Return the grids that a mask (B, N) and shapes (B, 2), or coordinates (B, N, 2), agree on."""
    valid, where = mask.to(torch.bool), where.to(mask.device)
    shapes, row_by_row = where, torch.ones_like(valid[:, 0])
    if coordinates:
        shapes = ((where + 1) * valid[..., None]).amax(dim=1)
        columns = shapes[:, 1:].clamp(min=1)
        positions = torch.arange(valid.shape[1], device=mask.device)
        expected = torch.stack([positions // columns, positions % columns], dim=-1)
        row_by_row = ((where == expected) | ~valid[..., None]).flatten(1).all(dim=1)
    counts, in_front = valid.sum(dim=1), valid.long().cumprod(dim=1).sum(dim=1)
    # One copy to the host, whatever device they are on.
    facts = torch.stack([*shapes.unbind(1), counts, in_front, row_by_row], dim=1).tolist()
    for index, (rows, columns, count, front, ordered) in enumerate(facts):
        grid = f"picture {index} has a grid of {rows}x{columns} patches"
        if rows < 1 or columns < 1 or rows * columns != count:
            raise InputError(
                f"{grid}, and the mask lets {count} of {valid.shape[1]} through; they have to be as many. Was the "
                "picture cut off, or are mask and shapes of different batches?"
            )
        if front != count or not ordered:
            raise InputError(f"{grid}, which are not in place: they stand in front, row by row, the padding behind.")
    return tuple((rows, columns) for rows, columns, *_ in facts)


def _flatten(batch: PatchBatch) -> tuple[list[Any], tuple[Grid, ...]]:
    return [batch.patches], batch.grids


def _flatten_with_keys(batch: PatchBatch) -> tuple[list[tuple[Any, Any]], tuple[Grid, ...]]:
    return [(pytree.GetAttrKey("patches"), batch.patches)], batch.grids


def _unflatten(children: Iterable[Any], grids: tuple[Grid, ...]) -> PatchBatch:
    """Return a batch without the checks, as `layerfuse.features` does for maps."""
    batch = object.__new__(PatchBatch)
    for name, value in zip(("patches", "grids"), (*children, grids), strict=True):
        object.__setattr__(batch, name, value)
    return batch


def _as_grids(lists: Sequence[Any]) -> tuple[Grid, ...]:
    return tuple((rows, columns) for rows, columns in lists)


pytree.register_pytree_node(
    PatchBatch,
    _flatten,
    _unflatten,
    serialized_type_name="layerfuse.PatchBatch",
    to_dumpable_context=list,
    from_dumpable_context=_as_grids,
    flatten_with_keys_fn=_flatten_with_keys,
)
