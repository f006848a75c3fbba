"""The verdict against reference posteriors: a fit that is off never gets "use".

The data are not part of the project, so the tests skip where they are absent.
"""

import pytest

import latentlab as ll
from tests import posteriordb

pytestmark = pytest.mark.skipif(
    not posteriordb.FOLDER.is_dir(), reason="the reference posteriors of posteriordb are not here"
)


def judged(name, guide, seed):
    case = posteriordb.case(name)
    posterior = ll.fit(case.model, case.data, guide, seed=seed, progress=False)
    shift, low, high = posteriordb.errors(posterior.sample(20_000), case)
    return posterior.check(), shift, low, high


def assert_honest(found, shift, low, high):
    if shift > 0.1 or low < 0.85 or high > 1.18:
        assert found.level != "use", (shift, low, high, str(found))
    if shift <= 0.1 and low >= 0.85 and high <= 1.18:
        assert found.level != "do not use", (shift, low, high, str(found))


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("eight_schools-eight_schools_noncentered", "mean_field"),
        ("kidiq-kidscore_interaction", "auto"),
    ],
)
def test_the_verdict_is_honest(name, guide):
    assert_honest(*judged(name, guide, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guide", ["auto", "mean_field"])
@pytest.mark.parametrize("name", posteriordb.NAMES)
def test_the_verdict_is_honest_with_every_guide_and_seed(name, guide, seed):
    assert_honest(*judged(name, guide, seed))
