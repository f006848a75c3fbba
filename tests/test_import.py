"""``import latentlab`` is cheap, loads nothing optional, and changes nothing."""

import json
import subprocess
import sys

import pytest

import latentlab

OPTIONAL = {
    "arviz",
    "blackjax",
    "jax",
    "matplotlib",
    "numpyro",
    "pandas",
    "polars",
    "pyarrow",
    "rich",
    "safetensors",
    "sklearn",
    "typer",
    "zuko",
}


def fresh(code):
    """What a new interpreter prints as JSON at the end of some code."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


LOADED = "import json, sys; print(json.dumps(list(sys.modules)))"


def optional(modules):
    return OPTIONAL & {name.split(".")[0] for name in modules}


def test_import_loads_nothing_until_it_is_asked_for():
    loaded = fresh(f"import latentlab; {LOADED}")
    assert not optional(loaded)
    assert [name for name in loaded if name.startswith("latentlab")] == ["latentlab"]


def test_public_names_load_none_of_the_heavy_packages():
    """Frames, pictures and flows are loaded by the function that makes one."""
    code = f"import latentlab; [getattr(latentlab, name) for name in latentlab.__all__]; {LOADED}"
    assert optional(fresh(code)) == {"safetensors"}


def test_a_fit_loads_none_of_the_heavy_packages():
    code = f"""
import latentlab as ll
x = ll.data.simulate.eruptions(num_rows=20)
posterior = ll.fit(ll.GaussianMixture(2, 1), x, num_restarts=1, max_steps=1, progress=False)
posterior.check(), posterior.sample(3), posterior.predict(3)
{LOADED}"""
    assert optional(fresh(code)) == {"safetensors"}


@pytest.mark.parametrize("name", latentlab.__all__)
def test_every_public_name_is_there(name):
    value = getattr(latentlab, name)
    assert value.__doc__
    assert name in dir(latentlab)


def test_public_names_are_in_order_and_others_are_not_there():
    assert list(latentlab.__all__) == sorted(set(latentlab.__all__))
    assert set(latentlab._HOMES) | set(latentlab._MODULES) == set(latentlab.__all__)
    with pytest.raises(AttributeError, match="module 'latentlab' has no attribute 'Oracle'"):
        _ = latentlab.Oracle


STATE = """
import json, random, sys
import numpy as np, pyro, torch
from torch.distributions import Distribution

def state():
    return [
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        Distribution._validate_args, str(Distribution.arg_constraints), pyro.settings.get(),
        len(pyro.get_param_store()),
    ]

before = state()
import latentlab
names = [getattr(latentlab, name) for name in latentlab.__all__]
PROBE
print(json.dumps([str(a) for a, b in zip(before, state()) if a != b]))
"""


def test_import_changes_no_state_of_torch_and_pyro():
    """Among it argument validation, which ``import zuko`` turns off for the whole process."""
    assert fresh(STATE.replace("PROBE", "")) == []
    assert fresh(STATE.replace("PROBE", "import zuko")) != []


def test_import_costs_what_pyro_costs():
    code = """
import json, time
import pyro
begin = time.process_time()
import latentlab
one = time.process_time() - begin
latentlab.fit, latentlab.GaussianMixture, latentlab.load
print(json.dumps([one, time.process_time() - begin]))
"""
    costs = (fresh(code) for _ in range(3))  # the best of three, on a busy machine
    assert any(package < 0.05 and names < 0.5 for package, names in costs)
