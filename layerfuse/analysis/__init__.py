"""Looking into layers: similarity, probes, which layers to tap, pictures of feature maps, and pages of these."""

from __future__ import annotations

from layerfuse.analysis.contributions import (
    LayerContributions,
    WeighsLayers,
    layer_contributions,
    mean_features,
)
from layerfuse.analysis.cross_validation import LayerProbes, LayerScores, bootstrap_means, cross_validate_layers
from layerfuse.analysis.edges import edge_labels, edge_strength
from layerfuse.analysis.label_images import IGNORED_CLASS, patch_labels
from layerfuse.analysis.legibility import Legibility, probe_letters
from layerfuse.analysis.lettering import LETTERS, Lettering, write_letters
from layerfuse.analysis.pages import contribution_plot, heat_map, html_page, new_figure, png_of_figure, score_plot
from layerfuse.analysis.pictures import REDUCTIONS, colorize, fusion_maps, png_bytes, reduce_map
from layerfuse.analysis.probes import LinearProbe, fit_probe, probe_layers
from layerfuse.analysis.sheets import map_sheet, point_sheet, rgb_map
from layerfuse.analysis.similarity import SIMILARITIES, layer_similarity, linear_cka, mean_cosine
from layerfuse.analysis.suggestion import LayerSuggestion, suggest_layers

__all__ = [
    "IGNORED_CLASS",
    "LETTERS",
    "REDUCTIONS",
    "SIMILARITIES",
    "LayerContributions",
    "LayerProbes",
    "LayerScores",
    "LayerSuggestion",
    "Legibility",
    "Lettering",
    "LinearProbe",
    "WeighsLayers",
    "bootstrap_means",
    "colorize",
    "contribution_plot",
    "cross_validate_layers",
    "edge_labels",
    "edge_strength",
    "fit_probe",
    "fusion_maps",
    "heat_map",
    "html_page",
    "layer_contributions",
    "layer_similarity",
    "linear_cka",
    "map_sheet",
    "mean_cosine",
    "mean_features",
    "new_figure",
    "patch_labels",
    "png_bytes",
    "png_of_figure",
    "point_sheet",
    "probe_layers",
    "probe_letters",
    "reduce_map",
    "rgb_map",
    "score_plot",
    "suggest_layers",
    "write_letters",
]
