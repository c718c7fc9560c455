"""Looking into layers: similarity, linear probes, feature-map pictures."""

from __future__ import annotations

from layerfuse.analysis.pages import heat_map, html_page, new_figure, png_of_figure
from layerfuse.analysis.pictures import REDUCTIONS, colorize, fusion_maps, png_bytes, reduce_map
from layerfuse.analysis.probes import LinearProbe, fit_probe, probe_layers
from layerfuse.analysis.similarity import SIMILARITIES, layer_similarity, linear_cka, mean_cosine

__all__ = [
    "REDUCTIONS",
    "SIMILARITIES",
    "LinearProbe",
    "colorize",
    "fit_probe",
    "fusion_maps",
    "heat_map",
    "html_page",
    "layer_similarity",
    "linear_cka",
    "mean_cosine",
    "new_figure",
    "png_bytes",
    "png_of_figure",
    "probe_layers",
    "reduce_map",
]
