"""What holds for every fuser in the registry, and for one that a user writes in a file of their own."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import FUSERS, Fuser, create_fuser, fuser_from_config
from layerfuse.ops import set_implementation
from layerfuse.registry import Registry
from layerfuse.testing import random_features, randomise_parameters
from tests.fusers.contract_support import ALL_FORMS, IDS, ONE_WIDTH, Gated, inputs_of, uncounted_flops


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    FUSERS.register("test_gated")(Gated)
    yield
    del FUSERS._entries["test_gated"]


every_form = pytest.mark.parametrize(("name", "options"), ALL_FORMS, ids=IDS)
_names = [name for name, _ in ALL_FORMS]
# What takes long is tried with the first form of each fuser, and with the others in slow runs.
first_forms = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*form, marks=[pytest.mark.slow] if form[0] in _names[:place] else [])
        for place, form in enumerate(ALL_FORMS)
    ],
    ids=IDS,
)

grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
# Widths that 1, 2 and 4 heads divide.
widths = st.sampled_from([4, 8, 12, 20])


def _build(name: str, options: dict[str, Any], *, in_channels: int = 8, num_layers: int = 3) -> Fuser:
    fuser = create_fuser(name, in_channels=in_channels, num_layers=num_layers, options=options)
    randomise_parameters(fuser)
    return fuser


def test_the_registry_holds_the_fusers_of_this_package() -> None:
    plain = {"average", "concat", "dense_connector", "scalar_mix", "select", "token_concat"}
    attending = {"attention_pool", "cross_attention", "depth_attention", "mmfuser", "spatial_aggregator", "text_gated"}
    assert plain | attending <= set(FUSERS.names())
    assert isinstance(FUSERS, Registry) and FUSERS.group == "layerfuse.fusers"


@every_form
@settings(max_examples=12)
@given(
    grid=grids,
    batch_size=st.integers(1, 3),
    in_channels=widths,
    num_layers=st.integers(2, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_output_has_the_promised_shape_and_dtype_and_reaches_every_parameter(
    name: str,
    options: dict[str, Any],
    grid: Grid,
    batch_size: int,
    in_channels: int,
    num_layers: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    fuser = _build(name, options, in_channels=in_channels, num_layers=num_layers).to(dtype)
    features = random_features(
        in_channels,
        num_layers=num_layers,
        grids=grid,
        batch_size=batch_size,
        dtype=dtype,
        requires_grad=True,
        seed=seed,
    )
    output = fuser(*inputs_of(fuser, features))
    assert output.shape == (batch_size, fuser.num_tokens(features.grids), fuser.out_channels)
    cells = math.prod(fuser.out_grid(features.grids) or (0,))
    assert cells + sum(fuser.extra_tokens(features.grids)) == output.shape[1]
    assert output.dtype == dtype
    assert output.isfinite().all()
    output.float().square().sum().backward()
    for parameter_name, parameter in fuser.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert any(feature_map.grad is not None for feature_map in features.maps)


@every_form
def test_gradient_of_every_parameter_is_not_zero(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options)
    features = random_features(8, num_layers=3, grids=(4, 5), requires_grad=True)
    fuser(*inputs_of(fuser, features)).square().sum().backward()
    for parameter_name, parameter in fuser.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@every_form
@settings(max_examples=6)
@given(grid=grids, batch_size=st.integers(2, 4), seed=st.integers(0, 100))
def test_samples_of_a_batch_do_not_see_one_another(
    name: str, options: dict[str, Any], grid: Grid, batch_size: int, seed: int
) -> None:
    fuser = _build(name, options).double()
    features = random_features(
        8, num_layers=3, grids=grid, batch_size=batch_size, dtype=torch.float64, requires_grad=True, seed=seed
    )
    output = fuser(*inputs_of(fuser, features))
    for sample in range(batch_size):
        alone = dataclasses.replace(features, maps=tuple(x[sample : sample + 1] for x in features))
        torch.testing.assert_close(fuser(*inputs_of(fuser, alone)), output[sample : sample + 1])
    gradients = torch.autograd.grad(output[0].sum(), features.maps, allow_unused=True)
    assert all(gradient is None or not gradient[1:].any() for gradient in gradients)


@first_forms
def test_compiles_without_graph_breaks_on_changing_shapes(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    fuser = _build(name, options)
    compiled = torch.compile(fuser, fullgraph=True, backend="eager")
    for grid, batch_size in (((3, 4), 2), ((5, 2), 1), ((1, 1), 3)):
        features = random_features(8, num_layers=3, grids=grid, batch_size=batch_size)
        inputs = inputs_of(fuser, features)
        torch.testing.assert_close(compiled(*inputs), fuser(*inputs))


@every_form
def test_exports_with_the_geometry_that_it_was_given(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options).eval()
    features = random_features(8, num_layers=3, grids=(3, 4))
    exported = torch.export.export(fuser, inputs_of(fuser, features)).module()
    other = inputs_of(fuser, random_features(8, num_layers=3, grids=(3, 4), seed=1))
    torch.testing.assert_close(exported(*other), fuser(*other))


@every_form
@settings(max_examples=6)
@given(grid=grids, order=st.permutations(range(4)), seed=st.integers(0, 100))
def test_permuting_the_batch_permutes_the_output(
    name: str, options: dict[str, Any], grid: Grid, order: list[int], seed: int
) -> None:
    fuser = _build(name, options).double()
    features = random_features(8, num_layers=3, grids=grid, batch_size=4, dtype=torch.float64, seed=seed)
    permuted = features.map(lambda tokens: tokens[order])
    torch.testing.assert_close(fuser(*inputs_of(fuser, permuted)), fuser(*inputs_of(fuser, features))[order])


@pytest.mark.slow
def test_learned_fusers_give_the_same_output_and_gradients_under_inductor() -> None:
    torch._dynamo.reset()
    forms = [("scalar_mix", {}), ("concat", {"norm": "layer", "out_channels": 6}), ("mmfuser", {"num_heads": 2})]
    forms += [(name, {"num_heads": 2}) for name in ("attention_pool", "cross_attention", "depth_attention")]
    fusers = nn.ModuleList(_build(name, options) for name, options in forms)
    features = random_features(8, num_layers=3, grids=(3, 4))

    def run_all(maps: FeatureMaps) -> list[torch.Tensor]:
        return [fuser(maps) for fuser in fusers]

    def with_gradients(run: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        outputs = run(features)
        loss = torch.stack([output.square().mean() for output in outputs]).sum()
        return outputs, list(torch.autograd.grad(loss, list(fusers.parameters())))

    expected = with_gradients(run_all)
    actual = with_gradients(torch.compile(run_all, fullgraph=True))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@every_form
def test_state_dict_round_trip_restores_the_output(name: str, options: dict[str, Any]) -> None:
    fuser, other = _build(name, options), create_fuser(name, in_channels=8, num_layers=3, options=options)
    other.load_state_dict(copy.deepcopy(fuser.state_dict()))
    inputs = inputs_of(fuser, random_features(8, num_layers=3, grids=(2, 5)))
    assert torch.equal(other(*inputs), fuser(*inputs))


@every_form
def test_config_survives_json_and_rebuilds_the_same_fuser(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options)
    config = json.loads(json.dumps(fuser.config))
    rebuilt = fuser_from_config(config)
    assert type(rebuilt) is type(fuser)
    assert rebuilt.config == fuser.config
    rebuilt.load_state_dict(fuser.state_dict())
    set_implementation(fuser, "auto")  # which path an operator takes is not saved
    inputs = inputs_of(fuser, random_features(8, num_layers=3, grids=(3, 2)))
    assert torch.equal(rebuilt(*inputs), fuser(*inputs))


@every_form
@settings(max_examples=6)
@given(grid=grids, in_channels=widths, num_layers=st.integers(2, 5))
def test_cost_told_in_advance_is_what_is_paid(
    name: str, options: dict[str, Any], grid: Grid, in_channels: int, num_layers: int
) -> None:
    with torch.device("meta"):
        planned = create_fuser(name, in_channels=in_channels, num_layers=num_layers, options=options)
        assert all(parameter.is_meta for parameter in planned.parameters())
    cost = planned.cost([grid] * num_layers)
    fuser = create_fuser(name, in_channels=in_channels, num_layers=num_layers, options=options)
    features = random_features(in_channels, num_layers=num_layers, grids=grid, batch_size=1)
    # A CPU's fused attention is counted as no operations; the plain one's products are seen.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = fuser(*inputs_of(fuser, features))
    assert cost.parameters == sum(parameter.numel() for parameter in fuser.parameters())
    assert (1, cost.num_tokens, cost.out_channels) == output.shape
    uncounted = uncounted_flops(name, options, num_layers=num_layers, grid=grid, in_channels=in_channels)
    assert cost.flops == counter.get_total_flops() + uncounted


@every_form
def test_a_fuser_built_on_meta_can_be_materialised(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        fuser = create_fuser(name, in_channels=8, num_layers=3, options=options)
    fuser.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(3)
    fuser.reset_parameters()
    torch.manual_seed(3)
    fresh = create_fuser(name, in_channels=8, num_layers=3, options=options)
    assert all(parameter.isfinite().all() for parameter in fuser.parameters())
    for ours, theirs in zip(fuser.parameters(), fresh.parameters(), strict=True):
        # Equal for constants and rings; random ones share their spread.
        torch.testing.assert_close(ours.std(correction=0), theirs.std(correction=0), rtol=0.5, atol=0)


@every_form
@pytest.mark.parametrize(
    ("maps", "parameters"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_maps_of_another_precision_are_fused_in_the_fusers_own(
    name: str, options: dict[str, Any], maps: torch.dtype, parameters: torch.dtype
) -> None:
    fuser = _build(name, options).to(parameters)
    features = random_features(8, num_layers=3, grids=(2, 5), dtype=maps)
    inputs = inputs_of(fuser, features)
    output = fuser(*inputs)
    assert output.dtype == maps
    # Without parameters there is no precision but the maps'.
    own = parameters if any(True for _ in fuser.parameters()) else maps
    converted = dataclasses.replace(features, maps=tuple(feature_map.to(own) for feature_map in features))
    condition = [given.to(own) for given in inputs[1:]]
    torch.testing.assert_close(output, fuser(converted, *condition).to(maps), rtol=0, atol=0)


@every_form
def test_autocast_chooses_the_precision_where_it_is_on(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options)
    features = random_features(8, num_layers=3, grids=(2, 5), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, *condition = inputs_of(fuser, features)
        given = {"condition": condition[0]} if condition else {}
        assert torch.equal(fuser(features, **given), fuser.fuse(features, **given))


@every_form
def test_parameters_suit_sharding_and_loading_by_other_libraries(name: str, options: dict[str, Any]) -> None:
    for parameter_name, parameter in _build(name, options).named_parameters():
        # transformers renames these while loading; FSDP2 refuses scalars.
        assert "gamma" not in parameter_name and "beta" not in parameter_name
        assert parameter.ndim > 0, parameter_name


@every_form
@given(num_layers=st.integers(2, 5), given_layers=st.integers(1, 6))
@settings(max_examples=6)
def test_a_wrong_number_of_maps_is_refused(
    name: str, options: dict[str, Any], num_layers: int, given_layers: int
) -> None:
    assume(num_layers != given_layers)
    fuser = create_fuser(name, in_channels=8, num_layers=num_layers, options=options)
    features = random_features(8, num_layers=given_layers)
    message = f"'{name}' got {given_layers} maps; it was built for num_layers={num_layers}. .*num_layers={given_layers}"
    with pytest.raises(ValueError, match=message):
        fuser(features)
    with pytest.raises(ValueError, match=message):
        fuser.cost(features.grids)


@every_form
def test_wrong_widths_are_refused(name: str, options: dict[str, Any]) -> None:
    fuser = create_fuser(name, in_channels=8, num_layers=3, options=options)
    with pytest.raises(ValueError, match="got maps of widths 12, 12, 12; it was built for 8, 8, 8. Build it with"):
        fuser(random_features(12, num_layers=3))


@every_form
def test_a_condition_is_refused_by_fusers_that_take_none_and_asked_for_by_others(
    name: str, options: dict[str, Any]
) -> None:
    fuser = _build(name, options)
    if fuser.condition_channels is not None:
        with pytest.raises(ValueError, match=f"fuser '{name}' needs a condition"):
            fuser(random_features(8, num_layers=3))
        return
    with pytest.raises(ValueError, match=f"fuser '{name}' takes no condition; call it with the feature maps alone"):
        fuser(random_features(8, num_layers=3), torch.zeros(2, 8))


@every_form
def test_cost_draws_no_random_numbers(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options)
    before = torch.get_rng_state()
    fuser.cost([(2, 3)] * 3)
    assert torch.equal(torch.get_rng_state(), before)


@every_form
def test_differing_grids_are_fused_or_refused(name: str, options: dict[str, Any]) -> None:
    fuser = _build(name, options)
    features = random_features(8, grids=[(2, 3), (1, 1), (4, 2)])
    if fuser.equal_grids:
        with pytest.raises(ValueError, match="got maps of grids 2x3, 1x1, 4x2; it needs one grid for all maps"):
            fuser(features)
        with pytest.raises(ValueError, match="it needs one grid for all maps"):
            fuser.cost(features.grids)
    else:
        assert fuser(*inputs_of(fuser, features)).shape == (2, fuser.num_tokens(features.grids), fuser.out_channels)


@every_form
def test_differing_widths_are_fused_or_refused(name: str, options: dict[str, Any]) -> None:
    one_width = any(name == fuser and options.get(option) == value for fuser, option, value in ONE_WIDTH)
    if one_width or FUSERS.get(name).equal_channels:
        with pytest.raises(ValueError, match=f"'{name}' .*got maps of widths 8, 8, 4; it needs one width"):
            create_fuser(name, in_channels=[8, 8, 4], num_layers=3, options=options)
    else:
        fuser = create_fuser(name, in_channels=[8, 8, 4], num_layers=3, options=options)
        features = random_features([8, 8, 4])
        assert fuser(*inputs_of(fuser, features)).shape == (2, fuser.num_tokens(features.grids), fuser.out_channels)
        assert fuser_from_config(fuser.config).in_channels == (8, 8, 4)
