"""Settings of the test run, before anything else is imported."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small problems; threads would wait on each other
os.environ.setdefault("MPLBACKEND", "Agg")  # no window opens, with a screen or without

# The same examples in every run; a deadline would fail on a busy machine, not on a fault.
settings.register_profile("latentlab", deadline=None, derandomize=True)
settings.load_profile("latentlab")


@pytest.fixture(autouse=True)
def _no_parameters_left():
    """A model that is called by itself leaves parameters in Pyro's store, for the next test."""
    yield
    import pyro  # after the settings above

    pyro.clear_param_store()
