"""Pyro and torch are found again as they were left, whoever ran in between."""

import math
import subprocess
import sys
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from latentlab.inference.sandbox import manual_seed, sandbox, stream


def empty():
    return {"params": {}, "constraints": {}}


@pytest.fixture(autouse=True)
def own_store():
    with pyro.get_param_store().scope():
        yield


def state_of_the_process():
    return {
        "dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "settings": pyro.settings.get(),
        "parameters": {name: value.tolist() for name, value in pyro.get_param_store().items()},
    }


def disturb():
    torch.set_default_dtype(torch.float16)
    torch.randn(3)
    torch.manual_seed(17)
    pyro.enable_validation(not pyro.settings.get("validate_poutine"))
    pyro.clear_param_store()
    pyro.param("intruder", torch.zeros(2))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_put_back_also_after_an_error(fails, validates, dtype):
    pyro.param("mine", torch.ones(2), constraint=constraints.positive)
    before_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pyro.validation_enabled(validates):
            before = state_of_the_process()
            try:
                with sandbox(empty(), seed=0, dtype=torch.float32):
                    disturb()
                    if fails:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
            after = state_of_the_process()
    finally:
        torch.set_default_dtype(before_dtype)
    assert after == before


def test_flags_that_differ_are_each_put_back():
    """As after an import of zuko, which turns off the checks of torch and not those of Pyro."""
    with pyro.settings.context(validate_distributions_torch=False, validate_infer=False):
        before = pyro.settings.get()
        with sandbox(empty(), seed=0, dtype=torch.float32, validate=True):
            with pytest.raises(ValueError, match="scale"):
                dist.Normal(0.0, -1.0)
        assert pyro.settings.get() == before


def test_arguments_of_distributions_are_checked_on_request_only():
    with sandbox(empty(), seed=0, dtype=torch.float32):
        dist.Normal(0.0, -1.0)


def test_parameters_of_the_outside_keep_their_way_back():
    """A constrained value knows the unconstrained tensor behind it; Pyro forgets it on the way."""
    value = pyro.param("mine", torch.ones(2))
    with sandbox(empty(), seed=0, dtype=torch.float32):
        pyro.param("mine", torch.zeros(3))
    assert value.unconstrained() is value
    assert pyro.get_param_store()["mine"].tolist() == [1, 1]


def test_parameters_of_the_inside_are_kept_and_come_back():
    store = empty()
    with sandbox(store, seed=0, dtype=torch.float32):
        first = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        with torch.no_grad():
            first.unconstrained().add_(1.0)
    assert "rate" not in pyro.get_param_store()
    with sandbox(store, seed=0, dtype=torch.float32):
        again = pyro.param("rate", torch.tensor(5.0), constraint=constraints.positive)
    assert again.item() == pytest.approx(2 * math.e)


def test_parameters_made_before_an_error_are_kept():
    def fail():
        pyro.param("rate", torch.tensor(2.0))
        raise RuntimeError

    store = empty()
    with pytest.raises(RuntimeError), sandbox(store, seed=0, dtype=torch.float32):
        fail()
    assert list(store["params"]) == ["rate"]


def test_two_stores_do_not_meet():
    stores = empty(), empty()
    for value in range(3):
        for i, store in enumerate(stores):
            with sandbox(store, seed=0, dtype=torch.float32):
                parameter = pyro.param("loc", torch.tensor(10.0 * i))
                assert parameter.item() == 10 * i + value
                with torch.no_grad():
                    parameter += 1


def test_a_sandbox_in_a_sandbox_is_one_of_its_own():
    outer, inner = empty(), empty()
    with sandbox(outer, seed=0, dtype=torch.float64):
        pyro.param("outer", torch.zeros(1))
        first = torch.randn(3)
        with sandbox(inner, seed=5, dtype=torch.float32):
            assert "outer" not in pyro.get_param_store()
            pyro.param("inner", nn.Parameter(torch.zeros(1)))
            torch.randn(100)
        assert torch.get_default_dtype() == torch.float64
        assert list(pyro.get_param_store()) == ["outer"]
        second = torch.randn(3)
    with sandbox(empty(), seed=0, dtype=torch.float64):
        assert torch.equal(torch.randn(3), first)
        assert torch.equal(torch.randn(3), second)


def test_two_threads_draw_what_each_would_draw_alone():
    def work(seed, found, pause):
        store, dtype = empty(), (torch.float32, torch.float64)[seed]
        for step in range(5):
            with sandbox(store, seed=stream(seed, step), dtype=dtype):
                loc = pyro.param("loc", torch.zeros(2))
                time.sleep(pause)  # the other thread has its chance to interfere
                draw = pyro.sample("z", dist.Normal(loc, 1.0))
                with torch.no_grad():
                    loc += draw.to(loc)
        found[seed] = store["params"]["loc"].tolist()

    alone, together = {}, {}
    for seed in (0, 1):
        work(seed, alone, 0)
    threads = [threading.Thread(target=work, args=(s, together, 0.002)) for s in (0, 1)]
    before = state_of_the_process()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert state_of_the_process() == before


# ---- streams of noise -------------------------------------------------------------------------


def test_a_stream_is_the_same_in_every_process():
    """Python's own hash is not: it is salted anew in each."""
    labels = "0, 'step', 17, 'a', 2.5"
    code = f"from latentlab.inference.sandbox import stream; print(stream({labels}))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) == stream(0, "step", 17, "a", 2.5) == 4343171894287939234


def test_streams_of_different_purposes_do_not_meet():
    seeds = {stream(seed, what, t) for seed in range(5) for what in "ab" for t in range(1000)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_of_neighbouring_steps_are_unrelated():
    """Uniform draws, one a step: their correlation from step to step has sd 1 / sqrt(4000)."""
    draws = torch.empty(4001, dtype=torch.float64)
    with sandbox(empty(), seed=0, dtype=torch.float64):
        for step in range(4001):
            manual_seed(stream(0, "step", step))
            draws[step] = torch.rand(())
    pairs = torch.stack([draws[:-1], draws[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / 4000**0.5
    assert abs(float(draws.mean()) - 0.5) < 4 * (1 / 12) ** 0.5 / 4001**0.5
