r"""A ladder of guides, each rung begun where the one below ended.

.. math:: \text{mean-field} \to \text{full-rank (or low-rank)} \to \text{flow}

The next rung is tried while the k-hat of the importance weights is above 0.5, and kept where its
ELBO is higher by more than the error of the difference, or no lower with a k-hat that is not above
0.5; else the fit goes back down. To go from
mean-field to full-rank costs little, so that there it is also asked whether anything is to be
gained: by the weights, the ELBO is below the evidence by

.. math:: \mathrm{KL}(q \| p) \approx \frac{1}{S} \sum_s (w_s - 1 - \log w_s),
          \qquad \textstyle \sum_s w_s = S .

A mean-field guide that is not enough after its warm-up is left there and then. A flow that was
asked for is laid over a Gaussian guide, whatever that one's k-hat. Many latents get a low-rank
guide in the place of a full-rank one, and no flow; where they belong to rows that are many, or
that are seen in batches, a structured one, which follows them.

Letters: L latent numbers, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from latentlab.diagnostics import Estimate
from latentlab.guides import Flow, FullRank, Guide, LowRank, MeanField, Structured
from latentlab.inference import objectives
from latentlab.inference.check import bind
from latentlab.inference.evaluation import particle_chunk
from latentlab.inference.evidence import tail_khat
from latentlab.inference.journal import Part
from latentlab.inference.modes import standing
from latentlab.inference.natural import NaturalClimb
from latentlab.inference.networks import NetworkClimb, has_networks
from latentlab.inference.pair import Pair
from latentlab.inference.ranks import ALONE
from latentlab.inference.restarts import Restarts
from latentlab.inference.saa import SaaClimb
from latentlab.inference.sandbox import manual_seed, stream
from latentlab.inference.stages import INTERRUPTED, Climb, FitDivergedError, State
from latentlab.inference.starts import Starts
from latentlab.protocols import OffersGuide, owner_of

__all__ = ["Ladder", "Rung", "ladder_for"]

AnyClimb = Climb | SaaClimb | NetworkClimb | NaturalClimb

_ASKS = 0.5  # k-hat above which a richer guide is tried
_BEYOND = 3.0  # standard errors of a gain that is more than its error
_NOTHING = 0.02  # nats that are not worth a richer guide
_FULL_RANK_UP_TO = 200  # latent numbers
_DRAWS, _FEW_DRAWS = 4000, 500  # behind a k-hat; the fewer where they go one by one
_ELEMENTS = 2**25  # numbers through the model for one k-hat


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder, as it was found.

    Arguments:
        guide: the name of its class.
        elbo: the ELBO reached, in nats.
        khat: k-hat of its importance weights, over all latents at once.
        why: what was decided there.
    """

    guide: str
    elbo: Estimate
    khat: Estimate
    why: str

    def __str__(self) -> str:
        weights = "weights exact" if self.khat.value == -math.inf else f"k-hat {self.khat}"
        return f"{self.guide}: ELBO {self.elbo}, {weights}; {self.why}"

    def spec(self) -> dict[str, Any]:
        """The rung as JSON values."""
        return {
            "guide": self.guide,
            "elbo": [self.elbo.value, self.elbo.se],
            "khat": [self.khat.value, self.khat.se],
            "why": self.why,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Rung:
        """The rung that :meth:`spec` described."""
        return cls(spec["guide"], Estimate(*spec["elbo"]), Estimate(*spec["khat"]), spec["why"])


@dataclass(frozen=True)
class _Stand:
    """Where the fit stands: on which guide, how it got there, how good it is."""

    guide: Guide
    climb: AnyClimb
    state: State
    elbo: Estimate
    khat: Estimate
    to_gain: Estimate
    settled: bool

    def rung(self, why: str) -> Rung:
        return Rung(type(self.guide).__name__, self.elbo, self.khat, why)


@dataclass(frozen=True)
class Ladder:
    """The rungs above the guide that a pair has.

    Arguments:
        above: guides to try one after the other, not yet bound.
        is_asked_for: whether they are climbed whatever k-hat says.
    """

    above: tuple[Guide, ...] = ()
    is_asked_for: bool = False

    def ascend(
        self,
        pair: Pair,
        seed: int,
        first: Callable[[Callable[[], bool]], tuple[AnyClimb, Restarts]],
        further: Callable[[int], Climb | SaaClimb],
    ) -> tuple[AnyClimb, Restarts, tuple[Rung, ...]]:
        """Climb from rung to rung as far as it is asked for; the pair ends on the best of them.

        Arguments:
            pair: the pair, entered; its guide is the lowest rung.
            seed: of the fit.
            first: climbs the lowest rung from several starts, and asks after its warm-up whether
                to leave at once.
            further: rung -> a climb of the pair as it is then.

        Returns:
            The climb of the rung that was kept, how far the starts agree, and the rungs.
        """
        if not self.above:
            climb, restarts = first(lambda: False)
            return climb, restarts, ()
        left: list[bool] = []

        def leave() -> bool:
            _, khat, to_gain = _measure(pair, seed, 0)
            left.append(not self.is_asked_for and bool(_asks(khat, to_gain, self.above[0])))
            return left[-1]

        climb, restarts = first(leave)
        try:
            here = _stand(pair, climb, seed, 0, settled=not any(left))
        except KeyboardInterrupt:
            _stop(climb)
            return climb, restarts, ()
        here, tried = self._up(pair, here, seed, further)
        settled = here
        if not here.settled and here.climb.stop_reason != INTERRUPTED:
            settled = _settle(pair, here, seed)
        end = self._end(settled)
        rungs = ((settled, end) if stand is here else (stand, note) for stand, note in tried)
        return here.climb, restarts, tuple(stand.rung(why) for stand, why in rungs)

    def _up(
        self, pair: Pair, here: _Stand, seed: int, further: Callable[[int], Climb | SaaClimb]
    ) -> tuple[_Stand, list[tuple[_Stand, str]]]:
        """Try one rung after the other: the best of them, and all with what was decided there."""
        tried: list[tuple[_Stand, str]] = [(here, "")]
        for level, guide in enumerate(self.above, 1):
            why = self._asks(here, guide)
            if not why:
                break
            try:
                there = _try(pair, here, guide, further, seed, level)
            except KeyboardInterrupt:  # before it was known how good that one is
                _go_back(pair, here, is_interrupted=True)
                break
            gain = Estimate(
                there.elbo.value - here.elbo.value, math.hypot(here.elbo.se, there.elbo.se)
            )
            # As high, and its weights are good: what asked to go up was a fault of those below.
            is_sound = there.khat.value <= _ASKS and gain.value >= -_BEYOND * gain.se
            if self.is_asked_for or is_sound or gain.value > _BEYOND * gain.se:
                tried = [(s, why if s is here else note) for s, note in tried]
                here = there
                tried.append((here, ""))
            else:
                tried.append((there, f"gains {gain}, not beyond its error: went back down"))
                _go_back(pair, here, is_interrupted=there.climb.stop_reason == INTERRUPTED)
        return here, tried

    def _asks(self, here: _Stand, guide: Guide) -> str:
        """Why to go on from here to a guide; empty where it is enough."""
        if here.climb.stop_reason == INTERRUPTED:
            return ""
        return (
            "a flow is asked for" if self.is_asked_for else _asks(here.khat, here.to_gain, guide)
        )

    def _end(self, here: _Stand) -> str:
        if here.climb.stop_reason == INTERRUPTED:
            return f"kept: {INTERRUPTED}"
        if self.is_asked_for:
            return "kept: asked for"
        above = not here.khat.value <= _ASKS
        return "kept: nothing better" if above else f"kept: k-hat not above {_ASKS}"


def ladder_for(pair: Pair, guide: Any, has_batches: bool) -> Ladder:  # noqa: ANN401
    """The rungs above the guide of a pair; a flow is put above a Gaussian guide, in place.

    Arguments:
        pair: a pair that was looked at, entered.
        guide: what ``fit`` was asked for.
        has_batches: whether a step sees some of the rows only.
    """
    if has_networks(pair):
        return Ladder()
    numbers, is_local = _numbers(pair), pair.local_plate() is not None
    few = numbers <= _FULL_RANK_UP_TO
    if isinstance(pair.guide, Flow):
        flow, pair.guide = pair.guide, FullRank()
        bind(pair, pair.guide)
        return Ladder((flow,), is_asked_for=True)
    is_auto = isinstance(guide, str) and guide == "auto"
    if not is_auto or isinstance(owner_of(pair.model), OffersGuide) or not numbers:
        return Ladder()
    if is_local and (has_batches or not few):
        return Ladder((Structured(),))
    if not few:
        return Ladder((LowRank(),))
    return Ladder((FullRank(), Flow()) if numbers > 1 else (Flow("nsf"),))


def _asks(khat: Estimate, to_gain: Estimate, guide: Guide) -> str:
    """Why figures ask for a guide; a flow, which is dear, is asked for by k-hat alone."""
    if not khat.value <= _ASKS:
        return f"k-hat above {_ASKS}: went up"
    if not isinstance(guide, Flow) and to_gain.value - 2 * to_gain.se > _NOTHING:
        return f"{to_gain} nats to gain, by its weights: went up"
    return ""


def _numbers(pair: Pair) -> int:
    """Latent numbers on the real line."""
    return sum(math.prod(latent.free_shape) for latent in pair.latents)


def _stand(pair: Pair, climb: AnyClimb, seed: int, level: int, settled: bool) -> _Stand:
    elbo, khat, to_gain = _measure(pair, seed, level)
    guide: Any = pair.guide
    return _Stand(guide, climb, climb.state(), elbo, khat, to_gain, settled)


def _try(
    pair: Pair,
    here: _Stand,
    guide: Guide,
    further: Callable[[int], Climb | SaaClimb],
    seed: int,
    level: int,
) -> _Stand:
    """Put the pair on the next guide and climb."""
    bind(pair, guide)
    pair.guide = guide
    climb = further(level)
    begin = climb.state()
    try:
        guide.start_from(here.guide)
        if not isinstance(guide, Flow):
            Starts(replace(pair, ranks=ALONE), seed).lay_over_mode(here.guide.free_mean().detach())
        pair.ranks.align(climb.moving())
        begin = climb.state()
        climb.until_converged()
    except FitDivergedError as error:
        climb.restore(begin)
        climb.stop_reason = str(error)
    except KeyboardInterrupt:
        climb.stop_reason = INTERRUPTED
    return _stand(pair, climb, seed, level, settled=True)


def _settle(pair: Pair, here: _Stand, seed: int) -> _Stand:
    """Climb on from where the fit was about to go up, and measure again."""
    try:
        here.climb.until_converged()
        return _stand(pair, here.climb, seed, 0, settled=True)
    except KeyboardInterrupt:
        _stop(here.climb)
        return here


def _go_back(pair: Pair, here: _Stand, is_interrupted: bool) -> None:
    """Put the pair back on a guide, and the model's own parameters with it."""
    pair.guide = here.guide
    here.climb.restore(here.state)
    if is_interrupted:
        _stop(here.climb)


def _stop(climb: AnyClimb) -> None:
    """Mark a climb as ended by Ctrl-C."""
    climb.stop_reason, climb.converged = INTERRUPTED, False


def _measure(pair: Pair, seed: int, level: int) -> tuple[Estimate, Estimate, Estimate]:
    """The ELBO, k-hat, and what a mean-field guide leaves to be gained, of the guide as it is."""

    def run() -> Part:
        return Part({}, {"figures": [[e.value, e.se] for e in _measured(pair, seed, level)]})

    what = (type(pair.guide).__name__, seed, level)
    name = pair.journal.name("rung", *what, standing(pair))
    elbo, khat, to_gain = pair.journal.remember(name, run).facts["figures"]
    return Estimate(*elbo), Estimate(*khat), Estimate(*to_gain)


def _measured(pair: Pair, seed: int, level: int) -> tuple[Estimate, Estimate, Estimate]:
    size = sum(t.numel() for t in pair.data.tensors()) + _numbers(pair)
    num_draws = max(_FEW_DRAWS, min(_DRAWS, _ELEMENTS // size)) if pair.vectorised else _FEW_DRAWS
    manual_seed(stream(seed, "rung", level))
    chunk = particle_chunk(pair, num_draws, summed=True)  # draws of many rows are many numbers
    with torch.no_grad():
        draws = (
            objectives.draw(pair, min(chunk, num_draws - start))
            for start in range(0, num_draws, chunk)
        )
        log_weights = torch.cat([objectives.log_joint_of_all(pair, d) - d.log_q for d in draws])
    elbo, none = Estimate.from_draws(log_weights), Estimate(0.0, 0.0)
    if not log_weights.isfinite().all():
        return elbo, Estimate(math.inf, 0.0), none
    found = tail_khat(log_weights)
    khat = Estimate(float(found.khat), float(found.se))
    if not isinstance(pair.guide, MeanField) or khat.value > _ASKS:
        return elbo, khat, none
    shares = log_weights - log_weights.logsumexp(0) + math.log(len(log_weights))
    return elbo, khat, Estimate.from_draws(shares.exp() - 1 - shares)
