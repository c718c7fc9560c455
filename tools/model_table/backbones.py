"""The backbones of the model table: named architectures, and how the wide ones are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BACKBONE_ROWS", "BackboneRow"]


@dataclass(frozen=True)
class BackboneRow:
    """One architecture.

    Args:
        group: heading under which it stands.
        family: of layerfuse's backbones.
        name: as the family takes it without weights.
        title: what is written, if not the name.
        options: that make the whole architecture of the name.
        scaled: options that scale a width above 1,024, in the words of the library; none if it is tried at full width.
        cut: options that leave four blocks.
        tapped: layers that are tapped. Layer 0, one in the middle, and one before the last, so that a block is cut off;
            of hierarchical models ends of stages, since the library gives no others.
    """

    group: str
    family: str
    name: str
    title: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    scaled: Mapping[str, Any] = field(default_factory=dict)
    cut: Mapping[str, Any] = field(default_factory=dict)
    tapped: tuple[int, ...] = (0, 2, 3)

    @property
    def is_staged(self) -> bool:
        """Whether blocks may lie in stages, of several grids and widths."""
        return self.group == _STAGED

    @property
    def key(self) -> str:
        """The row's name in the data and on the command line."""
        return f"{self.family}:{self.title or self.name}"


def _timm(group: str, name: str, *, width: int = 0, heads: int = 0) -> BackboneRow:
    scaled = {"embed_dim": width, "num_heads": heads} if width else {}
    return BackboneRow(group, "timm", name, scaled=scaled, cut={"depth": 4})


def _staged(name: str, **cut: Any) -> BackboneRow:
    return BackboneRow(_STAGED, "timm", name, cut=cut, tapped=(1, 2, 3))


def _open_clip(group: str, name: str, **scaled: Any) -> BackboneRow:
    return BackboneRow(group, "open_clip", name, scaled=scaled, cut={"layers": 4})


def _transformers(
    group: str, kind: str, title: str, sizes: tuple[int, int, int, int], *, width: int = 0, **others: Any
) -> BackboneRow:
    """A row of transformers: ``sizes`` are width, width of the MLP, heads and blocks; ``width`` is the scaled one."""
    channels, hidden, heads, blocks = sizes
    options = {"hidden_size": channels, "num_attention_heads": heads, "num_hidden_layers": blocks, **others}
    scaled: dict[str, int] = {}
    if width:
        scaled = {"hidden_size": width, "num_attention_heads": heads * width // channels}
    if hidden:
        options["intermediate_size"] = hidden
        if width:
            scaled["intermediate_size"] = hidden * width // channels
    cut = {"num_hidden_layers": 4}
    return BackboneRow(group, "transformers", kind, title=title, options=options, scaled=scaled, cut=cut)


_CLIP, _SIGLIP, _EVA, _DINO, _MIM = "CLIP", "SigLIP", "EVA", "DINO", "Supervised and masked pretraining"
_STAGED = "Windowed and hierarchical"
_OTHER = "Encoders for language models, agglomerated and other"

BACKBONE_ROWS: tuple[BackboneRow, ...] = (
    _timm(_CLIP, "vit_base_patch32_clip_224"),
    _timm(_CLIP, "vit_base_patch16_clip_quickgelu_224"),
    _timm(_CLIP, "vit_large_patch14_clip_quickgelu_336"),
    _timm(_CLIP, "vit_huge_patch14_clip_224", width=640, heads=8),
    _timm(_CLIP, "vit_gigantic_patch14_clip_224", width=832, heads=8),
    _open_clip(_CLIP, "ViT-B-32-quickgelu"),
    _open_clip(_CLIP, "ViT-L-14-336-quickgelu"),
    _open_clip(_CLIP, "ViT-L-14-CLIPA"),
    _open_clip(_CLIP, "ViT-H-14", width=640),
    _open_clip(_CLIP, "coca_ViT-L-14"),
    _transformers(_CLIP, "clip_vision_model", "clip-vit-base-patch16", (768, 3072, 12, 12), patch_size=16),
    _transformers(
        _CLIP, "clip_vision_model", "clip-vit-large-patch14-336", (1024, 4096, 16, 24), patch_size=14, image_size=336
    ),
    _transformers(
        _CLIP,
        "mlcd_vision_model",
        "mlcd-vit-bigG-patch14-336",
        (1664, 8192, 16, 48),
        width=832,
        patch_size=14,
        image_size=336,
    ),
    _timm(_SIGLIP, "vit_base_patch16_siglip_224"),
    _timm(_SIGLIP, "vit_large_patch16_siglip_384"),
    _timm(_SIGLIP, "vit_so400m_patch14_siglip_384", width=576, heads=8),
    _timm(_SIGLIP, "vit_giantopt_patch16_siglip_384", width=768, heads=8),
    _timm(_SIGLIP, "naflexvit_base_patch16_siglip"),
    _timm(_SIGLIP, "naflexvit_so400m_patch16_siglip", width=576, heads=8),
    _open_clip(_SIGLIP, "ViT-B-16-SigLIP2"),
    _open_clip(_SIGLIP, "ViT-L-16-SigLIP2-384"),
    _transformers(
        _SIGLIP,
        "siglip_vision_model",
        "siglip-so400m-patch14-384",
        (1152, 4304, 16, 27),
        width=576,
        patch_size=14,
        image_size=384,
    ),
    _transformers(_SIGLIP, "siglip2_vision_model", "siglip2-base-patch16-naflex", (768, 3072, 12, 12), patch_size=16),
    _timm(_EVA, "eva02_base_patch16_clip_224"),
    _timm(_EVA, "eva02_large_patch14_clip_336"),
    _timm(_EVA, "eva02_enormous_patch14_clip_224", width=896, heads=8),
    _timm(_EVA, "eva02_large_patch14_448"),
    _timm(_EVA, "eva_giant_patch14_224", width=704, heads=8),
    _open_clip(_EVA, "EVA02-L-14-336"),
    _timm(_DINO, "vit_small_patch14_dinov2"),
    _timm(_DINO, "vit_base_patch14_dinov2"),
    _timm(_DINO, "vit_large_patch14_reg4_dinov2"),
    _timm(_DINO, "vit_giant_patch14_reg4_dinov2", width=768, heads=12),
    _timm(_DINO, "vit_small_patch16_dinov3"),
    _timm(_DINO, "vit_large_patch16_dinov3"),
    _timm(_DINO, "vit_7b_patch16_dinov3", width=512, heads=4),
    _transformers(_DINO, "dinov2", "dinov2-large", (1024, 0, 16, 24), patch_size=14, image_size=518),
    _transformers(
        _DINO, "dinov2_with_registers", "dinov2-with-registers-base", (768, 0, 12, 12), patch_size=14, image_size=518
    ),
    _transformers(_DINO, "dinov3_vit", "dinov3-vitl16", (1024, 4096, 16, 24), patch_size=16, num_register_tokens=4),
    _timm(_MIM, "vit_tiny_patch16_224"),
    _timm(_MIM, "vit_base_patch16_224"),
    _timm(_MIM, "vit_large_patch16_224"),
    _timm(_MIM, "vit_so150m2_patch16_reg1_gap_256"),
    _timm(_MIM, "flexivit_base"),
    _timm(_MIM, "deit_base_distilled_patch16_224"),
    _timm(_MIM, "deit3_large_patch16_224"),
    _timm(_MIM, "beit_large_patch16_224"),
    _timm(_MIM, "beitv2_base_patch16_224"),
    _timm(_MIM, "beit3_base_patch16_224"),
    _transformers(_MIM, "vit", "vit-base-patch16-224", (768, 3072, 12, 12), patch_size=16),
    _transformers(_MIM, "ijepa", "ijepa_vith14_1k", (1280, 5120, 16, 32), width=640, patch_size=14),
    _timm(_OTHER, "aimv2_large_patch14_336"),
    _timm(_OTHER, "aimv2_huge_patch14_448", width=768, heads=6),
    _timm(_OTHER, "vit_pe_core_large_patch14_336"),
    _timm(_OTHER, "vit_pe_lang_large_patch14_448"),
    _timm(_OTHER, "vit_pe_spatial_base_patch16_512"),
    _timm(_OTHER, "vit_intern300m_patch14_448"),
    _timm(_OTHER, "vit_base_patch16_radio_v3"),
    _timm(_OTHER, "vit_so400m_patch16_radio_v4", width=576, heads=8),
    _timm(_OTHER, "vit_base_patch14_reg1_tipsv2"),
    _timm(_OTHER, "vit_base_patch16_rope_mixed_224"),
    _open_clip(_OTHER, "PE-Core-L-14-336"),
    _transformers(
        _OTHER, "aimv2_vision_model", "aimv2-large-patch14-224", (1024, 2816, 8, 24), patch_size=14, image_size=224
    ),
    _transformers(
        _OTHER,
        "internvl_vision",
        "InternViT-300M-448px",
        (1024, 4096, 16, 24),
        patch_size=[14, 14],
        image_size=[448, 448],
        attention_bias=True,
    ),
    _staged("swin_base_patch4_window7_224", depths=(1, 1, 1, 1)),
    _staged("swinv2_base_window8_256", depths=(1, 1, 1, 1)),
    _staged("hiera_base_224", stages=(1, 1, 1, 1)),
    _staged("sam2_hiera_base_plus", stages=(1, 1, 1, 1), global_att_blocks=()),
    _staged("samvit_base_patch16", depth=4, global_attn_indexes=(1,)),
    _staged("pvt_v2_b2", depths=(1, 1, 1, 1)),
)
