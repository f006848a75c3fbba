"""The benchmarks still run; what they measure, they say when they are called by name."""

import math

import pytest
from benchmarks import Table, Timing, converge, flows, svi, take_turns, vae

CASES = svi.cases()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].of_pyro is not None])
def test_both_sides_of_a_step_run(name):
    svi.our_steps(CASES[name])(2)
    svi.pyro_steps(CASES[name], validates=True)(2)


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].peer])
def test_a_step_of_numpyro_runs(name):
    pytest.importorskip("numpyro")
    svi.our_steps(CASES[name], "xla")(2)
    svi.their_steps(CASES[name])(2)


@pytest.mark.parametrize("kind", ["iaf", "nsf"])
@pytest.mark.parametrize("steps_of", [flows.ours, flows.zukos, flows.pyros])
def test_a_step_of_every_flow_guide_runs(kind, steps_of):
    steps_of(kind)(2)


@pytest.mark.parametrize("steps_of", [vae.our_steps, vae.plain_steps])
def test_a_step_of_an_autoencoder_runs(steps_of):
    steps_of(vae.data()[:256])(2)


def test_a_fit_to_convergence_is_timed_and_compared():
    seconds, _, found, verdict = converge.ours("eight schools", "mean_field", 0)
    assert 0 < seconds < 60
    assert verdict.endswith("(MeanField, saa)")
    assert converge.errors(found, found, True) == (0, 0, 0, 0)
    wider = {site: (mean, [2 * sd for sd in sds]) for site, (mean, sds) in found.items()}
    assert converge.errors(wider, found, False) == (0, 0, math.log(2), math.log(2))
    assert {"tau", "log tau"} <= {*found}
    others = {k: v for k, v in found.items() if k in ("tau", "log tau")}
    shifted = others | {"log tau": ([others["log tau"][0][0] + 1], others["log tau"][1])}
    assert converge.errors(shifted, others, False)[1] == 0
    assert converge.errors(shifted, others, True)[1] > 0.1


def test_turns_are_taken_by_all_and_give_the_work_its_time():
    def work(weight):
        return lambda calls: [sum(range(weight)) for _ in range(calls)]

    found = take_turns({"one": work(2000), "four": work(8000)}, turns=5, seconds=0.01)
    assert [len(timing.seconds) for timing in found.values()] == [5, 5]
    assert 2 < found["four"].times(found["one"]).median < 8


def test_ratios_are_taken_turn_by_turn():
    ratio = Timing([2.0, 6.0, 9.0]).times(Timing([1.0, 2.0, 9.0]))
    assert ratio.seconds == [2, 3, 1]
    assert svi.spread(ratio) == "2.00 (1.00 to 3.00)"
    assert math.isclose(ratio.median, 2)


def test_a_table_is_markdown():
    table = Table("Title", ["a note"], ["case", "us"], [["short", "1"], ["a longer one", "20"]])
    assert str(table).splitlines() == [
        "# Title",
        "",
        "- a note",
        "",
        "| case         | us |",
        "|--------------|----|",
        "| short        | 1  |",
        "| a longer one | 20 |",
    ]
