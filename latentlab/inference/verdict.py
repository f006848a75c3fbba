r"""The rules of the verdict, in one readable place.

A posterior is judged by evidence, each piece with its error:

=================  ================================================================================
evidence           reading
=================  ================================================================================
stop               a climb that did not converge asks for care
k-hat              of the importance weights, per block: above 0.7 the guide misses parts of the
                   posterior (do not use), above 0.5 it is strained (care)
means and sds      of the guide, against those that its weights give: off by more than 0.1 sd or a
                   factor 1.18 (care), by more than 0.3 sd or a factor 2 (do not use)
held-out rows      lower than fitted rows by more than their errors and 0.1 sd of the rows (care),
                   or 1 sd (do not use); none were kept aside and there are no latents (care)
ELBO               measured again: far from what the fit recorded, parameters or data were changed
starts             the best optimum found once only, or another as good elsewhere (care)
KL to the prior    of each site: near zero, the data say nothing about it (care)
label switching    draws that mix labels blur every figure about single components (care)
never drawn        values of discrete latents that the guide leaves out: with odds above 0.05
                   (care), above 1 (do not use)
=================  ================================================================================

The level is the worst that any piece asks for. What it cannot see: a mode that no start found, and
a model that is wrong in a way its own posterior does not show.

References:
    | Yes, but did it work?: evaluating variational inference (Yao et al., 2018)
    | Pareto smoothed importance sampling (Vehtari et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentlab.diagnostics import Estimate
from latentlab.inference.evidence import Block, Evidence

__all__ = ["LEVELS", "Verdict", "decide"]

LEVELS = ("use", "use with care", "do not use")

_FEW_BAD = 0.05  # share of data whose k-hat may be above 0.7 by noise and a few outliers
_SHIFTS = 0.1, 0.3  # errors of a mean in standard deviations: care, and not to be used
_GAPS = 0.1, 1.0  # of the log-densities of rows kept aside, in their sd from row to row
_FACTORS = 1.18, 2.0  # errors of a standard deviation, up or down
_UNUSED_NATS = 0.01  # KL to the prior below which a site has learnt nothing
_SWITCHED = 0.01  # share of draws with swapped labels
_LEFT_OUT = 0.05  # odds of a value that no draw has


@dataclass(frozen=True)
class Finding:
    """What one rule found: how bad, why, and what to try."""

    level: str
    reason: str
    next_step: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether to believe a fit.

    Arguments:
        level: ``"use"``, ``"use with care"`` or ``"do not use"``.
        reasons: why, each sentence with its figure.
        next_steps: what to try.
        evidence: the figures behind it, as text, by name.
    """

    level: str
    reasons: tuple[str, ...]
    next_steps: tuple[str, ...]
    evidence: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.level]
        lines += [f"  why: {reason}" for reason in self.reasons]
        lines += [f"  try: {step}" for step in self.next_steps]
        width = max((len(name) for name in self.evidence), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in self.evidence.items()]
        return "\n".join(lines)

    def spec(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "level": self.level,
            "reasons": list(self.reasons),
            "next_steps": list(self.next_steps),
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Verdict:
        """The verdict that :meth:`spec` described."""
        steps, reasons = tuple(spec["next_steps"]), tuple(spec["reasons"])
        return cls(spec["level"], reasons, steps, dict(spec["evidence"]))


def decide(evidence: Evidence) -> Verdict:
    """Apply the rules to evidence.

    Arguments:
        evidence: what was measured.
    """
    findings = [f for rule in _RULES for f in rule(evidence)]
    level = max((f.level for f in findings), key=LEVELS.index, default="use")
    asked = [f for f in findings if f.level != "use"]
    reasons = [f.reason for f in (asked or findings)]
    steps = dict.fromkeys(f.next_step for f in asked if f.next_step)
    return Verdict(level, tuple(reasons), tuple(steps), evidence.as_text())


def _stop(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.converged:
        yield Finding(
            "use with care",
            f"the climb did not converge ({evidence.stop_reason})",
            'look at plot("losses"), then at the model, or fit with a larger max_steps',
        )


def _khat(evidence: Evidence) -> Iterator[Finding]:
    if evidence.is_point and evidence.has_latents:
        yield Finding(
            "use with care",
            "the guide is a point: an estimate without uncertainty",
            'fit with guide="full_rank" or guide="mean_field"',
        )
    for block in evidence.blocks:
        yield _block(block, _richer(evidence))


def _held_out(evidence: Evidence) -> Iterator[Finding]:
    """Rows kept aside, by which a fit without uncertainty of its own is judged."""
    found = evidence.held_out
    if found is None:
        if not evidence.has_latents:
            yield Finding(
                "use with care",
                "the model has no latents: its parameters are one estimate without uncertainty, "
                "and no rows were kept aside to try it on",
                "fit with held_out=0.1",
            )
        return
    size = (found.gap.value - 2 * found.gap.se) / max(found.spread, 1e-300)
    reason = (
        f"rows kept aside have {found.value} nats per datum, fitted rows {found.training}: "
        f"a gap of {found.gap}"
    )
    if not math.isfinite(size):
        yield Finding("do not use", reason, "look at the data and at the model")
    elif size > _GAPS[0]:
        level = "do not use" if size > _GAPS[1] else "use with care"
        yield Finding(level, f"{reason}; the fit follows its rows too closely", _SMALLER)
    else:
        yield Finding("use", reason)


_SMALLER = "fewer parameters, more data, or a stronger prior"


def _richer(evidence: Evidence) -> str:
    if evidence.is_amortised:
        return "a richer guide (a wider encoder, a flow behind it); the model itself may be good"
    if evidence.is_flow:
        return "another parametrisation (non-centred, on another scale), or a simpler model"
    if evidence.is_full_rank:
        return 'guide="flow", or another parametrisation (non-centred, on another scale)'
    return 'guide="full_rank", or another parametrisation'


def _block(block: Block, wider: str) -> Finding:
    reason = f"{block.name}: {block.result}"
    if block.share_bad is None:
        khat = block.khat
        if not math.isfinite(khat) and khat > 0 or khat > 0.7:
            return Finding("do not use", reason, wider)
        return Finding("use with care", reason, wider) if khat > 0.5 else Finding("use", reason)
    if block.share_bad > _FEW_BAD:
        return Finding("do not use", reason, wider)
    if block.is_surely_bad:
        return Finding("use with care", reason, "look at those data, they may be outliers")
    return Finding("use", reason)


def _moments(evidence: Evidence) -> Iterator[Finding]:
    if evidence.moments is None:
        return
    step = _richer(evidence)
    site, shift = evidence.moments.shift
    size = _beyond_noise(abs(shift.value), shift.se)
    if size > _SHIFTS[0]:
        level = "do not use" if size > _SHIFTS[1] else "use with care"
        yield Finding(level, f"the mean of {site} is off by {shift} sd, by its weights", step)
    site, ratio = evidence.moments.ratio
    factor = math.exp(_beyond_noise(abs(math.log(ratio.value)), ratio.se / ratio.value))
    if factor > _FACTORS[0]:
        level = "do not use" if factor > _FACTORS[1] else "use with care"
        yield Finding(
            level, f"the sd of {site} is {ratio} of what it should be, by its weights", step
        )


def _beyond_noise(size: float, se: float) -> float:
    """A size less what noise may add to it: all of it below 1.4 errors, 8 % of it at five."""
    return max(0.0, size - 2 * se**2 / size) if size else 0.0


def _elbo(evidence: Evidence) -> Iterator[Finding]:
    now, then = evidence.elbo, evidence.recorded_elbo
    if not math.isfinite(now.value):
        yield Finding("do not use", f"the ELBO is {now.value}", "look at the data and the priors")
    elif not _same(now, then):
        yield Finding(
            "do not use",
            f"the ELBO is {now}, but the fit recorded {then}: parameters or data were changed",
            "fit again on these data",
        )
    if evidence.other_data:
        yield Finding(
            "do not use", "these are not the data that were fitted", "fit again on these data"
        )


def _same(now: Estimate, then: Estimate) -> bool:
    return abs(now.value - then.value) <= 0.5 + 5 * math.hypot(now.se, then.se)


def _starts(evidence: Evidence) -> Iterator[Finding]:
    restarts = evidence.restarts
    if restarts.num_elsewhere:
        yield Finding(
            "use with care",
            f"the posterior has several modes, or the model a symmetry, and the guide covers one: "
            f"{restarts}",
            "fix the symmetry in the model (an order, a sign), or read only what the modes share",
        )
    elif len(restarts.elbos) > 1 and restarts.num_agreeing == 1:
        yield Finding(
            "use with care",
            f"{restarts}: there may be a better one",
            f"fit with num_restarts={4 * (len(restarts.elbos) + restarts.given_up)}",
        )


def _unused(evidence: Evidence) -> Iterator[Finding]:
    for site, kl in evidence.kl.items():
        if kl.value < _UNUSED_NATS + 2 * kl.se and kl.se < 0.05:
            yield Finding(
                "use with care",
                f"site {site!r} has learnt nothing: KL to its prior {kl} nats",
                f"leave {site!r} out of the model, or look whether it should matter",
            )


def _labels(evidence: Evidence) -> Iterator[Finding]:
    if evidence.switched is not None and evidence.switched.value > _SWITCHED:
        yield Finding(
            "use with care",
            f"labels switch in a share of {evidence.switched} of the draws: components overlap",
            "read totals and predictions, not single components; try fewer components",
        )


def _never_drawn(evidence: Evidence) -> Iterator[Finding]:
    """Weights tell nothing of values that no draw has."""
    for site, odds in evidence.unseen.items():
        if odds > math.log(_LEFT_OUT):
            level = "do not use" if odds > 0 else "use with care"
            what = (
                "more probable than" if odds > 0 else f"{math.exp(odds):.2g} times as probable as"
            )
            yield Finding(
                level,
                f"site {site!r} has a value that the guide never draws, {what} those that it does "
                f"(log odds {odds:.1f})",
                f"sum {site!r} out (infer={{'enumerate': 'parallel'}}, and leave it out of the "
                "guide), or begin from other values",
            )


def _remarks(evidence: Evidence) -> Iterator[Finding]:
    for remark in evidence.remarks:
        yield Finding("use with care", remark)


_RULES = (
    *(_stop, _khat, _held_out, _moments, _elbo, _starts, _unused, _labels, _never_drawn, _remarks),
)
