"""The transformers keep scikit-learn's conventions, and what they say is the model's."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from latentlab.distributions import Categorical
from latentlab.sklearn import PPCA, VAE


def plane(num=150, D=4, seed=0):
    rng = np.random.default_rng(seed)
    return (
        3 + rng.normal(size=(num, 2)) @ rng.normal(size=(2, D)) + 0.3 * rng.normal(size=(num, D))
    )


def quick(kind, **arguments):
    own = {"hidden_layer_sizes": (8,)} if kind is VAE else {}
    return kind(**{"n_components": 2, "random_state": 0, "max_iter": 300, **own, **arguments})


@pytest.fixture(scope="module", params=[PPCA, VAE], ids=["PPCA", "VAE"])
def fitted(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return quick(request.param).fit(plane())


@pytest.mark.parametrize("kind", [PPCA, VAE])
def test_scikit_learns_own_checks_find_no_fault(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"n_components": 1, "max_iter": 5}
        found = check_estimator(quick(kind, **how), on_fail=None, on_skip=None)
    assert [r["check_name"] for r in found if r["status"] == "failed"] == []


def test_latents_have_a_column_each_and_names(fitted):
    z = fitted.transform(plane())
    assert z.shape == (150, 2)
    assert z.dtype == np.float64
    name = type(fitted).__name__.lower()
    assert fitted.get_feature_names_out().tolist() == [f"{name}0", f"{name}1"]
    assert np.array_equal(fitted.transform(plane()), z)


def test_there_and_back_is_the_reconstruction(fitted):
    x, model = plane(), fitted.posterior_.model
    model = getattr(model, "__self__", model)
    back = fitted.inverse_transform(fitted.transform(x))
    assert back.shape == x.shape
    if isinstance(fitted, PPCA):
        row = np.linalg.norm(back - x, axis=1)
        assert np.sqrt((row**2).mean() / 4) < 1.5 * 0.3
    else:
        assert np.allclose(back, model.reconstruct(torch.tensor(x)).numpy(), atol=1e-6)


def test_scores_are_those_of_the_model(fitted):
    x, model = plane(seed=1), fitted.posterior_.model
    scores = fitted.score_samples(x)
    assert fitted.score(x) == pytest.approx(scores.mean())
    if isinstance(fitted, PPCA):
        exact = model.log_prob(x, fitted.posterior_.sample(200)).numpy()
        assert np.allclose(scores, exact, atol=1e-10)
    else:
        other = getattr(model, "__self__", model).log_prob(torch.tensor(x), 2000)
        assert abs(scores.mean() - float(other.log_prob.mean())) < 0.3


def test_missing_cells_are_imputed_and_others_stay(fitted):
    x = plane(20, seed=2)
    x[::2, 1] = np.nan
    full = fitted.impute(x)
    assert np.isfinite(full).all()
    assert np.array_equal(full[1::2], x[1::2])
    assert np.isfinite(fitted.transform(x)).all()
    assert np.isfinite(fitted.score_samples(x)).all()


def test_a_missing_code_is_a_code():
    x = np.random.default_rng(0).integers(3, size=(40, 3)).astype(float)
    x[:9, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        vae = VAE(1, likelihood=Categorical(3), hidden_layer_sizes=(8,), max_iter=30).fit(x)
    assert set(vae.impute(x)[:9, 1]) <= {0.0, 1.0, 2.0}


def test_samples_have_a_seed(fitted):
    assert fitted.sample(300).shape == (300, 4)
    assert np.array_equal(fitted.sample(5), fitted.sample(5))
    assert not np.array_equal(fitted.sample(5), fitted.sample(5, random_state=1))


def test_samples_look_like_the_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ppca = quick(PPCA, max_iter=500).fit(plane(600))
    new, x = ppca.sample(4000), plane(600)
    sd = x.std(0)
    assert (np.abs(new.mean(0) - x.mean(0)) < 6 * sd / np.sqrt(600)).all()
    assert np.allclose(np.cov(new.T), np.cov(x.T), atol=6 * sd.max() ** 2 / np.sqrt(600))


@pytest.mark.slow
def test_principal_components_agree_with_scikit_learn_up_to_sign_and_error():
    x = plane(600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ppca = quick(PPCA, max_iter=700).fit(x)
    pca = PCA(2).fit(x)
    noise = pca.noise_variance_
    theirs = pca.components_ * np.sqrt(pca.explained_variance_ - noise)[:, None]
    theirs *= np.sign((theirs * ppca.components_).sum(1, keepdims=True))
    assert (np.abs(theirs - ppca.components_) < 4 * ppca.components_sd_).all()
    assert ppca.noise_variance_ == pytest.approx(noise, rel=0.2)
    assert ppca.score(x) == pytest.approx(pca.score(x), abs=0.05)
    assert ppca.verdict_.level in ("use", "use with care", "do not use")


def test_it_goes_into_a_pipeline_and_a_frame_comes_out():
    pipeline = make_pipeline(StandardScaler(), quick(PPCA, max_iter=5))
    pipeline.set_output(transform="pandas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        frame = pipeline.fit_transform(plane())
    assert list(frame.columns) == ["ppca0", "ppca1"]


@pytest.mark.parametrize("kind", [PPCA, VAE])
def test_float32_is_fitted_too(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        z = quick(kind, max_iter=5).fit_transform(plane().astype(np.float32))
    assert np.isfinite(z).all()


@pytest.mark.parametrize("kind", [PPCA, VAE])
def test_a_failed_fit_changes_nothing(kind):
    estimator = quick(kind)
    before = dict(estimator.__dict__)
    with pytest.raises(ValueError, match="inf"):
        estimator.fit(np.full((5, 3), np.inf))
    assert estimator.__dict__ == before
    with pytest.raises(NotFittedError):
        estimator.transform(plane())


@pytest.mark.parametrize("kind", [PPCA, VAE])
def test_too_few_steps_are_told(kind):
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        estimator = quick(kind, max_iter=5).fit(plane())
    assert not estimator.converged_
    assert estimator.n_iter_ == 5


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (PPCA, {"n_components": 4}, "n_components: expected fewer"),
        (PPCA, {"n_components": 0}, "n_components must be an int >= 1"),
        (PPCA, {"max_iter": 2.5}, "max_iter"),
        (PPCA, {"tol": 0}, "tol"),
        (VAE, {"n_components": "3"}, "n_components must be an int >= 1"),
        (VAE, {"likelihood": "laplace"}, "likelihood"),
        (VAE, {"likelihood": "bernoulli"}, r"expected \[0, 1\]"),
        (VAE, {"beta": -1}, "beta"),
        (VAE, {"validation_fraction": 1.0}, "validation_fraction"),
        (VAE, {"batch_size": 0}, "batch_size"),
        (VAE, {"random_state": -1}, "random_state"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, says):
    with pytest.raises(ValueError, match=says):
        quick(kind, **arguments).fit(plane())


def test_latents_of_another_width_are_refused(fitted):
    with pytest.raises(ValueError, match=r"expected shape \(N, 2\)"):
        fitted.inverse_transform(np.zeros((3, 5)))
