"""A guide that never draws a value is not believed where the model would draw it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import latentlab as ll
from latentlab.inference.check import prepare
from latentlab.inference.unseen import unseen_values

X = 4 + torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kinds(x=None, size=None):
    k = pyro.sample("k", dist.Categorical(torch.ones(6)))
    with ll.rows(x, size):
        pyro.sample("x", dist.Normal(k * 1.0, 1.0), obs=x)


def always(kind):
    def guide(x=None, size=None):
        logits = torch.full((6,), -40.0).index_fill(0, torch.tensor(kind), 0.0)
        pyro.sample("k", dist.Categorical(logits=logits))

    return guide


def exact_log_odds(kind):
    """Of the best other kind, by Bayes' rule."""
    scores = torch.stack([dist.Normal(k, 1.0).log_prob(X).sum() for k in range(6)])
    others = [k for k in range(6) if k != kind]
    return float(scores[others].max() - scores[kind])


@pytest.mark.parametrize("kind", [0, 4])
def test_the_odds_of_other_kinds_are_bayes_rule(kind):
    pair, _ = prepare(kinds, X, always(kind))
    with pair.entered(seed=0):
        found = unseen_values(pair)
    assert found == {"k": pytest.approx(exact_log_odds(kind), rel=1e-5)}


@pytest.mark.parametrize(("kind", "level"), [(0, "do not use"), (4, "use")])
def test_a_guide_on_the_wrong_kind_is_not_to_be_used(kind, level):
    verdict = ll.fit(kinds, X, always(kind), progress=False).check()
    assert verdict.level == level
    assert ("never draws" in str(verdict)) == (kind == 0)


def test_counts_are_compared_with_those_beside():
    def counted(x):
        n = pyro.sample("n", dist.Poisson(2.0))
        with ll.rows(x):
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    def nothing(x):
        pyro.sample("n", dist.Poisson(1e-9))

    verdict = ll.fit(counted, X, nothing, progress=False).check()
    assert verdict.level == "do not use"
    one = math.log(2.0) + float(
        (dist.Normal(1.0, 1.0).log_prob(X) - dist.Normal(0.0, 1.0).log_prob(X)).sum()
    )
    assert f"log odds {one:.1f}" in str(verdict)


def test_a_guide_that_draws_all_kinds_leaves_none_out():
    def even(x=None, size=None):
        pyro.sample("k", dist.Categorical(torch.ones(6)))

    pair, _ = prepare(kinds, X, even)
    with pair.entered(seed=0):
        assert unseen_values(pair) == {}
