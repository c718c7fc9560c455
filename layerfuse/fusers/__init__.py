"""Fusers: feature maps of several layers in, one set of visual tokens out. One file each, one import line each."""

from __future__ import annotations

from layerfuse.fusers.attention_pool import AttentionPool
from layerfuse.fusers.average import Average
from layerfuse.fusers.base import FUSERS, ExtraTokens, Fuser, FuserCost
from layerfuse.fusers.concat import Concat
from layerfuse.fusers.creation import create_fuser, fuser_from_config, list_fusers, source_layers
from layerfuse.fusers.cross_attention import CrossAttention
from layerfuse.fusers.dense_connector import DenseConnector
from layerfuse.fusers.depth_attention import DepthAttention
from layerfuse.fusers.mmfuser import MMFuser
from layerfuse.fusers.scalar_mix import ScalarMix
from layerfuse.fusers.select import Select
from layerfuse.fusers.spatial_aggregator import SpatialAggregator
from layerfuse.fusers.text_gated import TextGated
from layerfuse.fusers.token_concat import TokenConcat

__all__ = [
    "FUSERS",
    "AttentionPool",
    "Average",
    "Concat",
    "CrossAttention",
    "DenseConnector",
    "DepthAttention",
    "ExtraTokens",
    "Fuser",
    "FuserCost",
    "MMFuser",
    "ScalarMix",
    "Select",
    "SpatialAggregator",
    "TextGated",
    "TokenConcat",
    "create_fuser",
    "fuser_from_config",
    "list_fusers",
    "source_layers",
]
