"""dense_connector against the published formulas, written out, for CLIP-L's 24 blocks and SigLIP-so400m's 27."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerfuse.encoder import FusedEncoder, create_encoder
from layerfuse.features import FeatureMaps
from layerfuse.fusers import DenseConnector, Select
from layerfuse.testing import random_features


def _states(depth: int) -> FeatureMaps:
    """All hidden states of a backbone: layer numbers are positions."""
    states = random_features(8, num_layers=depth + 1, grids=(5, 7))
    return FeatureMaps(states.maps, layers=tuple(range(depth + 1)), grids=states.grids)


def _tapped(states: FeatureMaps, layers: tuple[int, ...]) -> FeatureMaps:
    return FeatureMaps(tuple(states[layer] for layer in layers), layers=layers, grids=((5, 7),) * len(layers))


def _fused(mode: str, depth: int, **options: Any) -> tuple[FeatureMaps, torch.Tensor]:
    states = _states(depth)
    layers = DenseConnector.default_layers(depth, mode=mode)
    assert layers is not None
    return states, DenseConnector(8, len(layers), mode=mode, **options)(_tapped(states, layers))


@pytest.mark.parametrize(("depth", "selected"), [(24, 23), (27, 26)])
def test_parity_with_sparse_token_integration(depth: int, selected: int) -> None:
    states, fused = _fused("sti", depth)
    pool = nn.AvgPool1d(kernel_size=8, stride=8)
    pooled = [pool(states[layer].transpose(1, 2)).transpose(1, 2) for layer in (7, 15)]
    expected = torch.cat([states[selected], *pooled], dim=1)
    assert expected.shape[1] == 35 + 4 + 4  # three of 35 cells fill no pool
    torch.testing.assert_close(fused, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("depth", "selected"), [(24, 23), (27, 26)])
def test_parity_with_sparse_channel_integration(depth: int, selected: int) -> None:
    states, fused = _fused("sci", depth)
    assert torch.equal(fused, torch.cat([states[selected], states[7], states[15]], dim=-1))


@pytest.mark.parametrize(
    ("depth", "selected", "cut"), [(24, 23, [(0, 12), (12, 24)]), (27, 26, [(0, 13), (13, 26)])], ids=["clip", "siglip"]
)
def test_parity_with_dense_channel_integration(depth: int, selected: int, cut: list[tuple[int, int]]) -> None:
    states, fused = _fused("dci", depth)
    means = [torch.stack(states.maps[start:end]).sum(0) / (end - start) for start, end in cut]
    torch.testing.assert_close(fused, torch.cat([states[selected], *means], dim=-1), atol=1e-6, rtol=1e-6)


def test_either_cut_is_reached_at_any_depth() -> None:
    states = _states(12)
    inside, outside = (_fused("dci", 12, query_in_groups=value)[1] for value in (True, False))
    halves = [torch.stack(states.maps[:6]).mean(0), torch.stack(states.maps[6:12]).mean(0)]
    torch.testing.assert_close(inside, torch.cat([states[11], *halves], dim=-1))
    # Eleven maps in two runs: five and six.
    uneven = [torch.stack(states.maps[:5]).mean(0), torch.stack(states.maps[5:11]).mean(0)]
    torch.testing.assert_close(outside, torch.cat([states[11], *uneven], dim=-1))


@pytest.mark.parametrize("num_layers", range(1, 25))
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_runs_follow_one_another_and_differ_by_one_at_most(num_layers: int, groups: int) -> None:
    if num_layers < groups:
        message = f"got num_layers={num_layers}, which leaves .* groups={groups}; each needs one. .* use 'select'"
        with pytest.raises(ValueError, match=message):
            DenseConnector(8, num_layers, groups=groups)
        return
    fuser = DenseConnector(8, num_layers, groups=groups)
    runs = fuser._runs(range(num_layers))
    assert [layer for run in runs for layer in run] == list(
        range(num_layers if fuser.query_in_groups else num_layers - 1)
    )
    assert max(map(len, runs)) - min(map(len, runs)) <= 1 and len(runs) == groups
    assert fuser.query_in_groups == (num_layers % groups == 0)
    assert fuser(random_features(8, num_layers=num_layers, grids=(2, 3))).shape == (2, 6, 8 * (1 + groups))


def test_pools_of_two_dimensions_are_windows() -> None:
    features = random_features(8, grids=[(5, 7), (3, 4), (5, 7)])
    fuser = DenseConnector(8, 3, mode="sti", pool=(2, 3))
    pool = nn.AvgPool2d((2, 3))
    expected = [features[2], *(pool(features.nchw(index)).flatten(2).transpose(1, 2) for index in (0, 1))]
    torch.testing.assert_close(fuser(features), torch.cat(expected, dim=1), atol=1e-6, rtol=1e-6)
    assert fuser.extra_tokens(features.grids) == (0, 2 * 2 + 1) and fuser.out_grid(features.grids) == (5, 7)


def test_a_pool_of_one_cell_leaves_the_tokens_as_they_are() -> None:
    features = random_features(8, num_layers=3, grids=(2, 3))
    fuser, expected = DenseConnector(8, 3, mode="sti", pool=1), torch.cat([features[2], *features.maps[:2]], dim=1)
    assert torch.equal(fuser(features), expected)


@pytest.mark.parametrize("pool", [8, (2, 2)])
def test_a_map_smaller_than_a_pool_gives_no_token(pool: Any) -> None:
    features = random_features(8, grids=[(1, 1), (1, 5), (2, 3)])
    fuser = DenseConnector(8, 3, mode="sti", pool=pool)
    assert torch.equal(fuser(features), features[2])
    assert fuser.num_tokens(features.grids) == 6 and fuser.flops(features.grids) == 0


@pytest.mark.parametrize("mode", ["sti", "sci"])
def test_one_map_alone_is_select(mode: str) -> None:
    features = random_features(8, num_layers=1, grids=(1, 1))
    assert torch.equal(DenseConnector(8, 1, mode=mode)(features), Select(8, 1)(features))


def test_the_query_stands_first_wherever_it_was() -> None:
    features = random_features(8, num_layers=4, grids=(2, 3))
    for index in range(4):
        others = [features[other] for other in range(4) if other != index]
        sparse, dense = (DenseConnector(8, 4, mode=mode, query_index=index)(features) for mode in ("sci", "dci"))
        assert torch.equal(sparse, torch.cat([features[index], *others], dim=-1))
        assert torch.equal(dense[..., :8], features[index])


def test_published_layers_follow_the_mode() -> None:
    assert DenseConnector.default_layers(24) == tuple(range(24))
    assert DenseConnector.default_layers(24, mode="sti") == (7, 15, 23)
    assert DenseConnector.default_layers(27, mode="sci") == (7, 15, 26)
    assert DenseConnector.default_layers(12, mode="sci") is None


def test_an_encoder_taps_the_published_layers_of_the_mode() -> None:
    def encoder(depth: int, **choice: Any) -> FusedEncoder:
        options = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}
        described = {**options, "arguments": {"depth": depth}}
        return create_encoder("module:tiny-vit", backbone_options=described, pretrained=False, **choice)

    dense = encoder(4, fuser="dense_connector")
    assert dense.backbone.layers == (0, 1, 2, 3) and dense.out_channels == 3 * dense.backbone.embed_dim
    sparse = encoder(24, fuser="dense_connector", fuser_options={"mode": "sti"})
    assert sparse.backbone.layers == (7, 15, 23)
    built = DenseConnector(dense.backbone.embed_dim, 3, mode="sci")
    assert encoder(24, fuser=built).backbone.layers == (7, 15, 23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "mode 'dense' of fuser 'dense_connector' is unknown. Known: dci, sci, sti"),
        ({"groups": 0}, "groups of fuser 'dense_connector' is 0; expected at least 1"),
        ({"groups": 4}, "got num_layers=3, which leaves 2 maps for groups=4; each needs one"),
        ({"mode": "sti", "pool": 0}, r"pool of fuser 'dense_connector' is 0; give a number .* \(rows, columns\)"),
        ({"mode": "sti", "pool": [2, 2, 2]}, r"pool of fuser 'dense_connector' is \[2, 2, 2\]; give a number"),
        ({"query_index": -4}, "query_index -4 is outside the 3 maps; allowed: -3..2"),
    ],
    ids=str,
)
def test_dense_connector_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseConnector(8, 3, **options)
