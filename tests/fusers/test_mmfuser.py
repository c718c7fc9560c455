"""MMFuser: identity at the start, published size, any query, any grids, published names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import MMFuser, create_fuser, fuser_from_config
from layerfuse.fusers.mmfuser import from_published_state_dict, to_published_state_dict
from layerfuse.testing import random_features, randomise_parameters


@given(
    grids=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=5),
    query=st.integers(-5, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_new_mmfuser_is_the_identity_on_its_query(grids: list[Grid], query: int, dtype: torch.dtype) -> None:
    query = query % len(grids)
    fuser = MMFuser(16, len(grids), num_heads=4, query_index=query).to(dtype)
    features = random_features(16, grids=grids, dtype=dtype)
    assert torch.equal(fuser(features), features.maps[query])
    assert fuser.out_grid(features.grids) == grids[query]


def test_mmfuser_has_the_published_size() -> None:
    with torch.device("meta"):
        fuser = create_fuser("mmfuser", in_channels=1024, num_layers=5)
    cost = fuser.cost([(24, 24)] * 5)
    assert (cost.parameters, cost.out_channels, cost.num_tokens) == (5_190_592, 1024, 576)
    assert sum(parameter.numel() for parameter in fuser.cross_attn.parameters()) == 2_886_400
    assert sum(parameter.numel() for parameter in fuser.self_attn.parameters()) == 2_296_000


def test_the_query_is_not_among_the_values() -> None:
    fuser = randomise_parameters(MMFuser(16, 3, num_heads=4, query_index=1)).double()
    features = random_features(16, num_layers=3, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    fuser.feat_norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    fuser(features)
    torch.testing.assert_close(seen[0], torch.cat((features.maps[0], features.maps[2]), dim=1))


def test_moving_the_query_to_another_place_changes_nothing_else() -> None:
    last, first = MMFuser(16, 3, num_heads=4), MMFuser(16, 3, num_heads=4, query_index=0)
    randomise_parameters(last)
    first.load_state_dict(last.state_dict())
    features = random_features(16, grids=[(2, 3), (4, 4), (3, 5)])
    turned = FeatureMaps(
        maps=(features.maps[2], *features.maps[:2]), layers=(3, 1, 2), grids=(features.grids[2], *features.grids[:2])
    )
    torch.testing.assert_close(first(turned), last(features))


def test_mmfuser_follows_its_formula() -> None:
    fuser = randomise_parameters(MMFuser(16, 3, num_heads=4))
    features = random_features(16, num_layers=3, grids=(3, 2))
    query, grid = features.maps[2], (3, 2)
    values = fuser.feat_norm(torch.cat(features.maps[:2], dim=1))
    attended = fuser.cross_attn(fuser.query_norm(query), grid, values, [grid, grid])
    inner = fuser.norm1(attended)
    refined = attended + fuser.self_scale.scale * fuser.self_attn(inner, grid, inner, [grid])
    torch.testing.assert_close(fuser(features), query + fuser.output_scale.scale * refined)


@pytest.mark.parametrize("shift", [(2, 0), (-2, 4), (4, -2)])
def test_translation_by_whole_patches_translates_the_output_away_from_borders(shift: tuple[int, int]) -> None:
    fuser = randomise_parameters(MMFuser(8, 3, num_heads=2), std=0.1).double()
    # One value map has half the cells of the others each way, so that two of theirs are one of its own.
    grids = [(24, 28), (12, 14), (24, 28)]
    features = random_features(8, grids=grids, dtype=torch.float64)
    moved = dataclasses.replace(
        features,
        maps=tuple(
            tokens.unflatten(1, grid).roll([step * grid[0] // 24 for step in shift], dims=(1, 2)).flatten(1, 2)
            for tokens, grid in zip(features, grids, strict=True)
        ),
    )
    there = fuser(moved).unflatten(1, grids[-1])
    carried = fuser(features).unflatten(1, grids[-1]).roll(shift, dims=(1, 2))
    # No point read is farther than 8 cells off, through both attentions.
    inner = slice(8 + 4, -8 - 4)
    torch.testing.assert_close(there[:, inner, inner], carried[:, inner, inner])
    assert not torch.allclose(there, carried), "at the borders it sees other cells"


def test_mmfuser_trains_away_from_the_identity() -> None:
    fuser = MMFuser(16, 3, num_heads=4)
    features = random_features(16, num_layers=3)
    optimizer = torch.optim.Adam(fuser.parameters(), lr=0.03)
    target = features.maps[0]
    losses = []
    for _ in range(20):
        loss = (fuser(features) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_one_map_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers=1; it needs at least 2, .* use 'select'"):
        MMFuser(16, 1)


@pytest.mark.parametrize("index", [3, -4])
def test_a_query_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"query_index {index} is outside the 3 maps; allowed: -3..2"):
        MMFuser(16, 3, query_index=index)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="20 channels cannot be split evenly over 16 heads; .* 1, 2, 4, 5, 10, 20"):
        MMFuser(20, 3)


def _published(fuser: MMFuser) -> dict[str, torch.Tensor]:
    names = {"output_scale.scale": "gamma1", "self_scale.scale": "gamma2"}
    return {names.get(name, name): tensor for name, tensor in fuser.state_dict().items()}


def test_published_names_cover_every_parameter() -> None:
    fuser = randomise_parameters(MMFuser(16, 3, num_heads=4))
    ours = from_published_state_dict(_published(fuser))
    assert set(ours) == set(fuser.state_dict())
    for name, tensor in fuser.state_dict().items():
        assert ours[name] is tensor or torch.equal(ours[name], tensor)


@pytest.mark.parametrize("name", ["gamma1", "gamma2"])
def test_published_weights_without_scales_are_refused(name: str) -> None:
    weights = _published(MMFuser(16, 3, num_heads=4))
    del weights[name]
    with pytest.raises(ValueError, match=f"the published weights lack {name}; without them .* the identity"):
        from_published_state_dict(weights)


def test_published_weights_with_other_names_are_refused() -> None:
    weights = _published(MMFuser(16, 3, num_heads=4))
    weights["norm2.weight"] = weights.pop("norm1.weight")
    with pytest.raises(ValueError, match="missing norm1.weight; unknown norm2.weight"):
        from_published_state_dict(weights)


def test_published_weights_whose_scales_were_renamed_are_refused() -> None:
    weights = _published(MMFuser(16, 3, num_heads=4))
    weights["weight1"] = weights.pop("gamma1")
    with pytest.raises(ValueError, match="lack gamma1 \\(found instead: weight1\\); .* Old versions of transformers"):
        from_published_state_dict(weights)


def test_published_names_are_given_back() -> None:
    ours = randomise_parameters(MMFuser(16, 3, num_heads=4)).state_dict()
    published = to_published_state_dict(ours)
    assert {"gamma1", "gamma2"} <= set(published)
    assert from_published_state_dict(published).keys() == ours.keys()
    assert all(from_published_state_dict(published)[name] is tensor for name, tensor in ours.items())


def test_weights_of_something_else_get_no_published_names() -> None:
    ours = MMFuser(16, 3, num_heads=4).state_dict()
    ours["norm2.weight"] = ours.pop("norm1.weight")
    with pytest.raises(ValueError, match="not the weights of one MMFuser: missing norm1.weight; unknown norm2.weight"):
        to_published_state_dict(ours)


def test_a_config_of_layerfuse_0_1_still_loads() -> None:
    settings = {"num_heads": 4, "num_points": 4, "query_index": -1, "norm_eps": 1e-06}
    described = {"name": "mmfuser", "in_channels": 16, "num_layers": 3, **settings}
    fuser = fuser_from_config({**described, "implementation": "reference"})
    assert isinstance(fuser, MMFuser) and fuser.cross_attn.implementation == "reference"
    assert list(fuser.config.items()) == list(described.items())
