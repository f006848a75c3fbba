"""Mixtures in closed form: EM, and variational Bayes with a conjugate prior."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import latentlab as ll
from latentlab.distributions.correlations import correlation_tril
from latentlab.distributions.wishart import NormalWishart, WishartCorrelations
from latentlab.guides import Point
from latentlab.inference.check import prepare
from latentlab.models import gmm_em

COVARIANCES = ["full", "tied", "diag", "spherical"]
F64 = torch.float64


def rows(N=600, D=3, K=3, seed=0):
    rng = np.random.default_rng(seed)
    centres, mixing = 2 * rng.normal(size=(K, D)), 0.6 * rng.normal(size=(K, D, D)) + np.eye(D)
    labels = rng.integers(K, size=N)
    return centres[labels] + np.einsum("nij,nj->ni", mixing[labels], rng.normal(size=(N, D)))


def entered(model, x, guide="auto"):
    """The pair of a model, its updates, and the data."""
    pair, report = prepare(model, x, guide)
    assert report.ok, report
    return pair, pair.model.updates(pair.guide)


def fit(x, K, **settings):
    prior, others = settings.pop("prior", "conjugate"), {"progress": False}
    covariance = settings.pop("covariance", "full")
    model = ll.GaussianMixture(x.shape[1], K, covariance=covariance, prior=prior)
    return ll.fit(model, x, **others, **settings)


class TestExpectationMaximisation:
    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_eight_steps_are_those_of_scikit_learn(self, covariance):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        x, K = rows() * [1, 20, 0.1] + [0, 100, -3], 3
        if covariance == "spherical":  # one scale asks for one unit
            x = (x - x.mean(0)) / x.std(0)
        variance, D = x.var(0), 3
        precisions = {
            "full": np.stack([np.diag(1 / variance)] * K),
            "tied": np.diag(1 / variance),
            "diag": np.stack([1 / variance] * K),
            "spherical": np.full(K, 1 / variance.mean()),
        }[covariance]
        peer = GaussianMixture(
            K,
            covariance_type=covariance,
            weights_init=np.ones(K) / K,
            means_init=x[:K],
            precisions_init=precisions,
            reg_covar=0,
            max_iter=8,
            tol=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            peer.fit(x)
        model = ll.GaussianMixture(D, K, covariance=covariance, prior="flat")
        pair, updates = entered(model, torch.from_numpy(x), Point())
        spread = pair.model.spread if covariance != "spherical" else pair.model.unit.expand(D)
        scaled = (torch.from_numpy(variance) / spread**2).expand(K, D)
        tilted = covariance in ("full", "tied")
        start = gmm_em.Point(
            torch.full((K,), -math.log(K), dtype=F64),
            (torch.from_numpy(x[:K]) - pair.model.center) / spread,
            scaled.diag_embed() if tilted else scaled,
        )
        with pair.entered(seed=0), torch.no_grad():
            found = updates._moments(start, pair.data.args[0], None, None)
            statistics = {"number": found.number, "total": found.total, "squares": found.squares}
            heights = []
            for _ in range(8):
                updates.maximise(statistics)
                statistics, bound = updates.statistics(*pair.data.args)
                heights.append(float(bound) / len(x))
            expected = peer.score(x)
        assert heights[-2] == pytest.approx(peer.lower_bound_, abs=1e-10)
        assert heights[-1] == pytest.approx(expected, abs=1e-10)
        assert np.diff(heights).min() > 0

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_a_weight_of_two_is_a_row_twice(self, covariance):
        x = torch.from_numpy(rows(60))
        x[3, 1] = x[8, 0] = math.nan
        weights = torch.ones(60, dtype=F64)
        weights[:30] = 2
        twice = torch.cat([x[:30], x])
        model = ll.GaussianMixture(3, 2, covariance=covariance, prior="flat")
        found = []
        for data in ((x, weights), (twice,)):
            pair, updates = entered(model, data)
            with pair.entered(seed=0), torch.no_grad():
                start = gmm_em.Point(
                    torch.tensor([0.3, 0.7], dtype=F64).log(),
                    torch.tensor([[0.0, 1, 0], [0.5, -1, 0.2]], dtype=F64),
                    torch.ones(2, 3, dtype=F64).diag_embed()
                    if covariance in ("full", "tied")
                    else torch.ones(2, 3, dtype=F64),
                )
                moments = updates._moments(start, *pair.data.args, *(None,) * (3 - len(data)))
                found.append((*vars(moments).values(),))
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_a_fit_with_missing_cells_climbs_to_a_maximum(self, covariance):
        x = torch.from_numpy(rows(150))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = math.nan
        posterior = fit(x, 2, prior="flat", covariance=covariance, num_restarts=2)
        assert posterior.method == "natural"
        assert posterior.converged, posterior.stop_reason
        last = -posterior.losses[posterior.stage_starts[-1] :]
        assert (last.diff() > -1e-9).all()
        # The log-likelihood is flat there, along every number of the guide.
        pair = posterior.pair
        with pair.entered(seed=0):
            loc = pair.guide.loc.requires_grad_()
            value = pair.guide.draw(1).values
            sites = {z.name: value[z.name].reshape(z.shape) for z in pair.latents}
            log_lik = pair.model.likelihood(**sites).log_prob(pair.data.args[0]).sum()
            (slope,) = torch.autograd.grad(log_lik, loc)
        assert float(log_lik.detach()) == pytest.approx(float(last[-1]), abs=1e-3)
        assert float(slope.abs().max()) < 0.5  # nats a unit, of 150 rows

    def test_rows_in_a_plane_and_copies_of_one_row_stay_above_the_floor(self):
        x = torch.from_numpy(rows(80, D=2))
        x = torch.cat([x, x[:, :1] + x[:, 1:]], 1)  # three columns, of a plane
        x[:20] = x[0]
        posterior = fit(x, 3, prior="flat", num_restarts=2)
        assert posterior.elbo.value > -math.inf
        assert "fell" not in posterior.stop_reason

    def test_mini_batches_climb_as_high_as_all_rows(self):
        x = torch.from_numpy(rows(900))
        heights = [
            fit(x, 3, prior="flat", num_restarts=2, batch_size=batch_size).elbo.value
            for batch_size in (None, 128)
        ]
        assert heights[1] == pytest.approx(heights[0], abs=1e-2)

    def test_single_precision_is_climbed_too(self):
        x = torch.from_numpy(rows(400)).float()
        posterior = fit(x, 3, prior="flat", num_restarts=2)
        assert posterior.converged, posterior.stop_reason
        double = fit(x.double(), 3, prior="flat", num_restarts=2)
        assert posterior.elbo.value == pytest.approx(double.elbo.value, abs=0.02)


class TestVariationalBayes:
    def test_a_step_is_that_of_scikit_learn(self):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import BayesianGaussianMixture

        x = rows() * [1, 20, 0.1] + [0, 100, -3]
        settings = {
            "n_components": 3,
            "weight_concentration_prior_type": "dirichlet_distribution",
            "weight_concentration_prior": 0.7,
            "mean_precision_prior": 0.5,
            "degrees_of_freedom_prior": 6.0,
            "covariance_prior": np.diag(0.3 * x.var(0)),
            "reg_covar": 0.0,
            "tol": 0.0,
            "random_state": 0,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            before, after = (
                BayesianGaussianMixture(max_iter=k, **settings).fit(x) for k in (5, 6)
            )
        prior = ll.models.Conjugate(strength=0.5, dof=6.0, variance=0.3)
        model = ll.GaussianMixture(3, 3, covariance="full", prior=prior, concentration=0.7)
        pair, updates = entered(model, torch.from_numpy(x))
        with pair.entered(seed=0), torch.no_grad():
            pair.guide.put(as_family(before))
            bounds = []
            for step in range(25):
                statistics, bound = updates.statistics(*pair.data.args)
                updates.maximise(statistics)
                bounds.append(float(bound))
                if not step:
                    found = pair.guide.distribution
                    expected = as_family(after)
                    for part, value in vars(expected).items():
                        size = value.abs().max()
                        gap = (getattr(found, part) - value).abs().max() / size
                        assert gap < 1e-10, part
        assert np.diff(bounds).min() > -1e-9

    @pytest.mark.parametrize("covariance", COVARIANCES)
    @pytest.mark.parametrize("D", [1, 2, 3])
    def test_of_one_component_every_weight_is_the_evidence(self, covariance, D):
        x = torch.from_numpy(rows(40, D))
        x = x * torch.tensor([1.0, 5.0, 0.1][:D]) if covariance != "spherical" else x
        posterior = fit(x.double(), 1, covariance=covariance)
        weights = posterior.log_weights(100)
        assert float(weights.std()) < 1e-8
        assert float(weights.mean()) == pytest.approx(-float(posterior.losses[-1]), abs=1e-8)

    def test_the_evidence_of_one_column_is_that_of_the_book(self):
        """Student's marginal of normal-inverse-gamma (Murphy, 2007, eq. 171), D = 1."""
        x = torch.from_numpy(rows(25, 1))
        posterior = fit(x, 1, prior=ll.models.Conjugate(strength=0.5, dof=3.0, variance=0.4))
        n, mean = 25, float(x.mean())
        square, kappa, nu = float(x.var(correction=0)), 0.5, 3.0
        psi = 0.4 * square  # the prior mean is that of the rows, which adds nothing
        after = psi + n * square
        evidence = math.lgamma((nu + n) / 2) - math.lgamma(nu / 2)
        evidence += nu / 2 * math.log(psi) - (nu + n) / 2 * math.log(after)
        evidence += 0.5 * math.log(kappa / (kappa + n)) - n / 2 * math.log(math.pi)
        assert mean == pytest.approx(float(posterior.model.center), abs=1e-12)
        assert -float(posterior.losses[-1]) == pytest.approx(evidence, abs=1e-9)

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_the_elbo_with_labels_summed_out_is_above_the_bound(self, covariance):
        x = torch.from_numpy(rows(400))
        posterior = fit(x, 3, covariance=covariance)
        assert posterior.method == "natural"
        assert posterior.converged
        last = -posterior.losses[posterior.stage_starts[-1] :]
        assert (last.diff() > -1e-9).all()
        gap = posterior.elbo.value - float(last[-1])
        assert -4 * posterior.elbo.se < gap < 20

    def test_a_shorter_step_is_one_of_natural_parameters(self):
        """A step of length rho of stochastic variational inference, written by hand."""
        x = torch.from_numpy(rows(200))
        pair, updates = entered(ll.GaussianMixture(3, 2, covariance="full", prior="conjugate"), x)
        with pair.entered(seed=0), torch.no_grad():
            updates.place(0, x)
            first, batch, rho = natural(pair.guide.distribution, pair.model), x[:50], 0.3
            old = {k: v.clone() for k, v in updates.statistics(x)[0].items()}
            updates.maximise(old)
            first = natural(pair.guide.distribution, pair.model)
            new, _ = updates.statistics(batch, size=200)
            updates.maximise({k: torch.lerp(old[k], new[k], rho) for k in old})
            found = natural(pair.guide.distribution, pair.model)
            updates.maximise(new)
            aim = natural(pair.guide.distribution, pair.model)
        for a, b, c in zip(first, aim, found, strict=True):
            torch.testing.assert_close(c, (1 - rho) * a + rho * b, rtol=1e-9, atol=1e-9)

    def test_all_that_follows_a_fit_works(self, tmp_path):
        x = ll.data.simulate.eruptions(150)
        model = ll.GaussianMixture(2, 2, covariance="full", prior="conjugate")
        posterior = ll.fit(model, x, progress=False)
        verdict = posterior.check()
        assert verdict.level != "do not use", verdict
        frame = posterior.summary()
        assert set(frame["site"]) == {"weights", "locs", "scales", "correlations"}
        assert frame[["mean", "sd", "mcse"]].notna().to_numpy().all()
        again = ll.load(posterior.save(tmp_path), data=x)
        for site, draws in posterior.sample(20).items():
            assert (again.sample(20)[site] == draws).all()
        assert again.check().level == verdict.level
        assert posterior.log_prob(x.x[:5]).value > -math.inf
        assert posterior.predict(3)["x"].shape == (3, 150, 2)
        assert posterior.report(tmp_path / "report.html").exists()
        labels = posterior.model.responsibilities(x, posterior.sample(50))
        assert labels.shape == (150, 2)

    def test_it_is_refused_where_it_cannot_be(self):
        x = torch.from_numpy(rows(50))
        model = ll.GaussianMixture(3, 2, covariance="full", prior="conjugate")
        with pytest.raises(ValueError, match='set by conjugate updates alone, and method is "st'):
            ll.fit(model, x, method="stages", progress=False)
        with pytest.raises(ValueError, match="offers no conjugate updates of FullRank"):
            ll.fit(model, x, "full_rank", method="natural", progress=False)
        weak, guide = ll.GaussianMixture(3, 2), ll.guides.NormalWishart()
        with pytest.raises(ValueError, match="offers no conjugate updates of NormalWishart"):
            ll.fit(weak, x, guide, progress=False)
        prior = ll.models.Conjugate(dof=2.0)
        with pytest.raises(ValueError, match="dof: expected more than num_features - 1 = 2"):
            ll.GaussianMixture(3, 2, covariance="full", prior=prior)
        with pytest.raises(ValueError, match="strength: expected a number > 0, got -1"):
            ll.models.Conjugate(strength=-1)

    @pytest.mark.slow
    def test_a_gaussian_guide_of_the_conjugate_model_agrees(self):
        x = torch.from_numpy(rows(300, D=2, K=2))
        model = ll.GaussianMixture(2, 2, covariance="full", prior="conjugate")
        ours = ll.fit(model, x, progress=False)
        other = ll.fit(model, x, "full_rank", num_restarts=1, max_steps=3000, progress=False)
        assert abs(ours.elbo.value - other.elbo.value) < 3


def as_family(peer):
    """The posterior of scikit-learn's Bayesian mixture."""
    dof = torch.from_numpy(peer.degrees_of_freedom_)
    return NormalWishart(
        torch.from_numpy(peer.weight_concentration_),
        torch.from_numpy(peer.mean_precision_),
        torch.from_numpy(peer.means_),
        dof,
        torch.from_numpy(peer.covariances_) * dof[:, None, None],
    )


def natural(family, model):
    """Natural parameters, which are sums of those of the prior and of statistics."""
    outer = family.locs[:, :, None] * family.locs[:, None, :]
    return [
        family.concentration,
        family.strength,
        family.strength[:, None] * family.locs,
        family.dof,
        family.scale + family.strength[:, None, None] * outer,
    ]


class TestNormalWishart:
    def test_the_density_is_scipys_times_the_volume(self):
        rng = np.random.default_rng(4)
        scale = np.cov(rng.normal(size=(3, 30)))
        family = NormalWishart(
            torch.ones(1, dtype=F64),
            torch.tensor([2.0], dtype=F64),
            torch.tensor([[0.3, -1.0, 2.0]], dtype=F64),
            torch.tensor([5.5], dtype=F64),
            torch.from_numpy(scale)[None],
        )
        torch.manual_seed(0)
        draws = family.sample(3)
        for s in range(3):
            sites = {name: value[s] for name, value in draws.items()}
            scales, partial = sites["scales"][0], sites["correlations"][0]

            def covariance(numbers):
                tril = numbers[:3, None] * correlation_tril(numbers[3:], 3)
                i, j = torch.tril_indices(3, 3)
                return (tril @ tril.T)[i, j]

            numbers = torch.cat([scales, partial])
            volume = torch.autograd.functional.jacobian(covariance, numbers).det().abs().log()
            tril = scales[:, None] * correlation_tril(partial, 3)
            sigma = (tril @ tril.T).numpy()
            expected = stats.invwishart(5.5, scale).logpdf(sigma) + float(volume)
            expected += stats.multivariate_normal([0.3, -1.0, 2.0], sigma / 2).logpdf(
                sites["locs"][0].numpy()
            )
            assert float(family.log_prob(draws)[s]) == pytest.approx(expected, rel=1e-9)

    def test_draws_have_the_moments_of_theory(self):
        scale = torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=F64)
        family = NormalWishart(
            torch.tensor([1.0], dtype=F64),
            torch.tensor([4.0], dtype=F64),
            torch.zeros(1, 2, dtype=F64),
            torch.tensor([12.0], dtype=F64),
            scale,
        )
        torch.manual_seed(1)
        draws = family.sample(20_000)
        tril = draws["scales"][:, 0, :, None] * correlation_tril(draws["correlations"][:, 0], 2)
        mean = (tril @ tril.mT).mean(0)
        torch.testing.assert_close(mean, scale[0] / 9, rtol=0.03, atol=0.003)
        spread = torch.cov(draws["locs"][:, 0].T)
        torch.testing.assert_close(spread, scale[0] / 9 / 4, rtol=0.05, atol=0.003)

    def test_the_kl_is_that_of_draws(self):
        torch.manual_seed(2)
        like = {"dtype": F64}
        blocks = {"full": ((2,), 2), "tied": ((), 2), "diag": ((2, 2), 1), "spherical": ((2,), 1)}
        for shape, d in blocks.values():

            def family(seed, shape=shape, d=d):
                g = torch.Generator().manual_seed(seed)
                root = torch.rand(*shape, d, d, generator=g, **like).tril() + torch.eye(d, **like)
                return NormalWishart(
                    2 + torch.rand(2, generator=g, **like),
                    5 + torch.rand(2, generator=g, **like),
                    torch.rand(2, 2, generator=g, **like),
                    8 + torch.rand(shape, generator=g, **like),
                    5 * root @ root.mT,
                )

            q, p = family(0), family(1)
            draws = q.sample(20_000)
            ratio = q.log_prob(draws) - p.log_prob(draws)
            se = float(ratio.std()) / math.sqrt(len(ratio))
            assert float(q.kl(p)) == pytest.approx(float(ratio.mean()), abs=5 * se)
            assert float(q.kl(q)) == pytest.approx(0.0, abs=1e-10)

    def test_the_prior_of_correlations_is_the_marginal(self):
        """Of two columns it is that of the book; in three, draws and density agree."""
        grid = torch.linspace(-1, 1, 4001, dtype=F64)[1:-1, None]
        density = WishartCorrelations(2, torch.tensor(4.0, dtype=F64)).log_prob(grid).exp()
        assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=1e-4)
        prior = WishartCorrelations(3, torch.tensor(5.0, dtype=F64))
        torch.manual_seed(3)
        draws = prior.sample((20_000,))
        uniform = torch.rand(200_000, 3, dtype=F64) * 1.999 - 0.9995
        weights = prior.log_prob(uniform).exp()
        assert float(weights.mean() * 8) == pytest.approx(1.0, abs=0.05)
        squares = (weights[:, None] * uniform**2).sum(0) / weights.sum()
        torch.testing.assert_close(draws.square().mean(0), squares, rtol=0.06, atol=0.0)


def test_a_pair_that_was_looked_at_on_few_rows_is_that_of_all():
    x = torch.from_numpy(rows(6000))
    few, _ = entered(ll.GaussianMixture(3, 2, covariance="full", prior="flat"), x)
    whole, _ = entered(ll.GaussianMixture(3, 2, covariance="full", prior="flat"), x[:900])
    assert [z.spec() for z in few.latents] == [z.spec() for z in whole.latents]
    assert few.vectorised
    assert few.plates["x"][0][1] == 6000
    assert few.shapes["x"] == (6000, 3)
    assert len(few.data.args[0]) == 6000
    x[4321, 1] = math.inf
    with pytest.raises(ValueError, match="4321"):
        entered(ll.GaussianMixture(3, 2, covariance="full", prior="flat"), x)
