"""Looking into layers: similarity, linear probes, feature-map pictures."""

from __future__ import annotations

from layerfuse.analysis.pictures import REDUCTIONS, colorize, fusion_maps, png_bytes, reduce_map
from layerfuse.analysis.probes import LinearProbe, fit_probe, probe_layers
from layerfuse.analysis.similarity import layer_similarity, linear_cka

__all__ = [
    "REDUCTIONS",
    "LinearProbe",
    "colorize",
    "fit_probe",
    "fusion_maps",
    "layer_similarity",
    "linear_cka",
    "png_bytes",
    "probe_layers",
    "reduce_map",
]
