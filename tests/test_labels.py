"""Alignment undoes what label switching did, and changes nothing else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentlab.diagnostics import align

SEEDS = st.integers(0, 2**32 - 1)
AXES = {"weights": -1, "locs": -2, "covariances": -3}


def mixture(r, num_samples, num_components):
    """Draws of components so far apart that their numbering is beyond doubt."""
    S, K = num_samples, num_components
    k = np.arange(K)
    locs = 8.0 * k[:, None] * np.array([1.0, -1.0])
    covariances = (k[:, None, None] + 1) * np.array([[1.0, 0.5], [0.5, 2.0]])
    return {
        "weights": torch.from_numpy(r.dirichlet(100.0 * (k + 1), S)),
        "locs": torch.from_numpy(locs + 0.5 * r.normal(size=(S, K, 2))),
        "covariances": torch.from_numpy(covariances + 0.1 * r.normal(size=(S, K, 2, 2))),
    }


def permuted(draws, permutations):
    S = len(permutations)
    rows = torch.arange(S)[:, None]
    return {site: value[rows, torch.from_numpy(permutations)] for site, value in draws.items()}


def shuffles(r, num_samples, num_components):
    return r.permuted(np.tile(np.arange(num_components), (num_samples, 1)), axis=1)


# ---- switching undone -------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 6), st.integers(2, 60))
def test_any_switching_is_undone_up_to_one_numbering(seed, num_components, num_samples):
    r = np.random.default_rng(seed)
    draws = mixture(r, num_samples, num_components)
    aligned = align(permuted(draws, shuffles(r, num_samples, num_components)), AXES)
    first = aligned.draws["locs"][0]
    kept = [int((draws["locs"][0] == row).all(1).nonzero()) for row in first]
    for site, value in draws.items():
        assert torch.equal(aligned.draws[site], value[:, kept])


@given(SEEDS, st.integers(1, 6), st.integers(1, 60))
def test_a_reference_gives_its_own_numbering(seed, num_components, num_samples):
    r = np.random.default_rng(seed)
    draws = mixture(r, num_samples, num_components)
    shuffle = shuffles(r, num_samples, num_components)
    reference = {site: value[0] for site, value in mixture(r, 1, num_components).items()}
    aligned = align(permuted(draws, shuffle), AXES, reference)
    for site, value in draws.items():
        assert torch.equal(aligned.draws[site], value)
    assert torch.equal(aligned.permutations, torch.from_numpy(shuffle).argsort(1))


@given(SEEDS, st.integers(2, 7))
def test_on_a_line_the_nearest_numbering_is_the_order(seed, num_components):
    """Squared distance on a line is least in order (rearrangement), however much they overlap."""
    r = np.random.default_rng(seed)
    locs = torch.from_numpy(r.normal(size=(50, num_components)))
    reference = torch.from_numpy(np.sort(r.normal(size=num_components)))
    aligned = align({"locs": locs}, {"locs": -1}, {"locs": reference})
    assert torch.equal(aligned.draws["locs"], locs.sort(1).values)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_do_not_matter(unit):
    r = np.random.default_rng(0)
    draws = mixture(r, 200, 3)
    draws["noise"] = unit * torch.from_numpy(r.normal(size=(200, 3)))
    aligned = align(permuted(draws, shuffles(r, 200, 3)), AXES | {"noise": -1})
    spread = aligned.draws["locs"].std(0)
    assert (spread < 1).all()  # 6 or more if components were mixed


def test_what_tells_components_apart_outweighs_what_does_not():
    """Within its component the telling number varies little; against all draws it does not."""
    r = np.random.default_rng(0)
    telling = torch.arange(2.0) + 0.05 * torch.from_numpy(r.normal(size=(500, 2)))
    noise = torch.from_numpy(r.normal(size=(500, 2, 10)))
    draws = {"telling": telling, "noise": noise}
    aligned = align(permuted(draws, shuffles(r, 500, 2)), {"telling": -1, "noise": -2})
    assert (aligned.draws["telling"].std(0) < 0.1).all()


# ---- what is reported ---------------------------------------------------------------------------


def test_the_most_common_numbering_is_kept_even_if_the_first_draw_has_another():
    r = np.random.default_rng(0)
    draws = mixture(r, 100, 3)
    shuffle = np.tile([0, 1, 2], (100, 1))
    shuffle[:10] = [2, 0, 1]
    aligned = align(permuted(draws, shuffle), AXES)
    assert torch.equal(aligned.draws["locs"], draws["locs"])
    assert (aligned.permutations[10:] == torch.arange(3)).all()
    assert aligned.permutations[0].tolist() == [1, 2, 0]
    assert aligned.switched.value == pytest.approx(0.1)
    assert aligned.switched.se == pytest.approx(math.sqrt(0.1 * 0.9 / 100))
    assert str(aligned) == "labels switched, and put back, in a share 0.10 ± 0.03 of 100 draws"


def test_nothing_switched():
    draws = mixture(np.random.default_rng(0), 100, 3)
    aligned = align(draws, AXES)
    assert aligned.switched.value == 0
    assert "a share 0 of 100" in str(aligned)
    assert all(torch.equal(aligned.draws[site], value) for site, value in draws.items())


def test_permutations_say_how_labels_of_rows_follow():
    r = np.random.default_rng(0)
    draws = mixture(r, 50, 4)
    switched = permuted(draws, shuffles(r, 50, 4))
    z = torch.from_numpy(r.integers(0, 4, size=(50, 7)))
    aligned = align(switched, AXES)
    moved = aligned.permutations.argsort(1).gather(1, z)
    rows = torch.arange(50)[:, None]
    assert torch.equal(aligned.draws["locs"][rows, moved], switched["locs"][rows, z])


def test_other_sites_dtypes_and_arguments_are_left_alone():
    locs = torch.tensor([[0.0, 5.0], [5.1, 0.1], [0.2, 5.0]], requires_grad=True)
    before, other = locs.detach().clone(), torch.arange(3)
    aligned = align({"locs": locs, "other": other}, {"locs": -1})
    assert aligned.draws["other"] is other
    assert aligned.draws["locs"].dtype == torch.float32
    assert torch.equal(locs, before)
    assert aligned.permutations.dtype == torch.long
    assert list(aligned.draws) == ["locs", "other"]


def test_equal_components_and_constant_numbers_are_no_fault():
    aligned = align({"locs": torch.ones(5, 3)}, {"locs": -1})
    assert aligned.switched.value == 0


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "axes", "message"),
    [
        ({"a": torch.zeros(5, 2)}, {}, "at least one site"),
        ({"a": torch.zeros(5, 2)}, {"b": -1}, r"expected site 'b' as in axes, got \['a'\]"),
        ({"a": torch.zeros(5, 2)}, {"a": 1}, "axis of 'a' from the right, -1 to -1, got 1"),
        ({"a": torch.zeros(5, 2)}, {"a": -2}, "axis of 'a' from the right"),
        ({"a": torch.full((5, 2), math.nan)}, {"a": -1}, "'a' has values that are not finite"),
        ({"a": torch.zeros(0, 2)}, {"a": -1}, "'a' is empty"),
        ({"a": torch.zeros(5, 2), "b": torch.zeros(5, 3)}, {"a": -1, "b": -1}, "one size"),
    ],
)
def test_faults_are_named(draws, axes, message):
    with pytest.raises(ValueError, match=message):
        align(draws, axes)


@pytest.mark.parametrize("reference", [{}, {"a": torch.zeros(3)}])
def test_a_reference_that_does_not_fit_is_named(reference):
    with pytest.raises(ValueError, match="reference: expected"):
        align({"a": torch.randn(5, 2)}, {"a": -1}, reference)


@pytest.mark.parametrize("unit", [1e-300, 1e-200, 1e200])
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_unit_does_not_matter(unit, with_reference):
    g = torch.Generator().manual_seed(0)
    locs = torch.tensor([0.0, 5.0, 9.0]) + torch.randn(50, 3, generator=g).double()
    swapped = torch.stack([row[torch.randperm(3, generator=g)] for row in locs])
    given = {"reference": {"locs": locs[0]}} if with_reference else {}
    moved = {"reference": {"locs": locs[0] * unit}} if with_reference else {}
    plain = align({"locs": swapped}, {"locs": -1}, **given)
    tiny = align({"locs": swapped * unit}, {"locs": -1}, **moved)
    assert torch.equal(plain.permutations, tiny.permutations)
    assert plain.switched == tiny.switched
