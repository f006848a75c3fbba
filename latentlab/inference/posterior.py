"""The frozen result of a fit, and everything a person does next.

Letters: S draws, N rows, P particles, L latent numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import Alignment, Estimate, align
from latentlab.guides import Guide
from latentlab.inference import predictive
from latentlab.inference.axes import labels_of
from latentlab.inference.given import density, given, sampled, weighted
from latentlab.inference.pair import Arguments, Pair, copy_pair
from latentlab.inference.restarts import Restarts
from latentlab.inference.sandbox import stream
from latentlab.protocols import Exchangeable, owner_of

if TYPE_CHECKING:
    import arviz
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from latentlab.diagnostics import (
        DrawComparison,
        ElboParts,
        Loo,
        Ppc,
        Sandwich,
        Sensitivity,
    )
    from latentlab.inference.chains import Chains
    from latentlab.inference.evidence import Evidence
    from latentlab.inference.held_out import HeldOut
    from latentlab.inference.ladder import Rung
    from latentlab.inference.verdict import Verdict

__all__ = ["Posterior"]

_DRAWN_ELEMENTS = 2**27  # numbers that a summary draws, unless it is told to


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """What a fit returns: its own copy of the pair, how the fit went, and what to do next.

    Arguments:
        pair: the model, the guide, the data and the parameters.
        seed: of the fit; the default of every ``seed=None`` below.
        elbo: evidence lower bound in nats per data set, larger is better.
        losses: negative ELBO of every step of the climb that won, shape (steps,).
        stage_starts: the steps at which its stages began.
        stage_elbos: the ELBO at the end of each stage.
        converged: whether two stages agreed, or fixed draws and fresh ones.
        stop_reason: why the climb ended, in words.
        restarts: how far the starts agree.
        notes: what the check of the pair noted.
        seconds: wall-clock time of the fit.
        method: how it was climbed.
        backend: what took the steps, ``"xla"`` or ``"eager"``, and why.
        ladder: the guides that were tried, in that order, and what was decided at each; empty for
            a single guide.
        fitted_to: sha256 of the data.
        recorded: the verdict that was stored with a loaded posterior.
        has_data: whether the data are at hand; a file does not hold them.
        reads_data: whether the guide reads them and they are not at hand, so that the latents of
            the rows that were fitted are not known.
        held_out_rows: how rows that were kept aside compare with those that were fitted.
    """

    pair: Pair = field(repr=False)
    seed: int
    elbo: Estimate
    losses: Tensor
    stage_starts: tuple[int, ...]
    stage_elbos: tuple[Estimate, ...]
    converged: bool
    stop_reason: str
    restarts: Restarts
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    method: str = "stages"
    backend: str = "eager"
    ladder: tuple[Rung, ...] = ()
    fitted_to: str = ""
    recorded: Mapping[str, Any] | None = None
    has_data: bool = True
    reads_data: bool = False
    held_out_rows: HeldOut | None = None

    def __repr__(self) -> str:
        sites = ", ".join(z.name for z in self.pair.latents)
        state = "converged" if self.converged else "not converged"
        return f"Posterior({sites}; ELBO {self.elbo} nats; {state}; {len(self.losses)} steps)"

    def __getstate__(self) -> dict[str, Any]:
        # Copying or pickling a guide of Pyro takes its model away from it: hand out a copy.
        model, guide = copy_pair(self.model, self.guide)
        state = {**self.__dict__, "pair": replace(self.pair, model=model, guide=guide)}
        state.pop("_measured", None)  # of the original's model and guide
        return state

    @property
    def model(self) -> Callable:
        """The fit's own copy of the model."""
        return self.pair.model

    @property
    def guide(self) -> Callable:
        """The fit's own copy of the guide."""
        return self.pair.guide

    @property
    def held_out(self) -> Estimate | None:
        """Log-density of the rows that were kept aside, in nats per datum; ``None`` if none were.

        Where the guide computes a row's latents from the row, it is importance weighted.
        """
        return None if self.held_out_rows is None else self.held_out_rows.value

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the data's columns, where they have names."""
        return self.pair.data.names

    @property
    def params(self) -> dict[str, Tensor]:
        """Optimised parameters by name, as the pair sees them: a scale is positive.

        Those of a guide of latentlab count from its frame; :meth:`summary` says what they mean.
        """
        with self.pair.entered(seed=0):
            found = dict(pyro.get_param_store().items())
        if isinstance(self.guide, Guide):
            found |= {f"guide.{name}": value for name, value in self.guide.named_parameters()}
        return {name: value.detach().clone() for name, value in found.items()}

    def sample(self, num_samples: int = 1000, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of all latents, discrete ones included.

        Discrete latents that the guide does not cover are drawn from their exact conditional
        distribution, given the continuous ones and the data.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's: the same call gives the same draws.

        Returns:
            Site -> tensor (S, ...).
        """
        return sampled(self, num_samples, seed)

    def log_weights(self, num_samples: int = 1000, seed: int | None = None) -> Tensor:
        """Log importance weights log p(x, z) - log q(z) in nats, shape (S,).

        Under an exact posterior each of them is the log evidence itself.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's.
        """
        return weighted(self, num_samples, seed)[1]

    def predict(
        self,
        num_samples: int = 1000,
        *data: Any,  # noqa: ANN401
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """New draws of the observed sites from the posterior predictive; never the data.

        Without data these are replicates of the rows that were fitted, given all latents. Other
        data are new rows: latents in the plate of the rows are drawn anew from the model, as are
        those whose shape is another one there.

        Arguments:
            num_samples: number of draws S.
            data: what the model is called with (its shape and covariates count, its observed
                values do not), as ``fit`` was given it; ``{"size": 5}`` for five new rows of a
                ``model(x=None, size=None)``. By default the fit's own data.
            seed: by default the fit's.

        Returns:
            Site -> tensor (S, ...).
        """
        num_samples = as_count(num_samples, "num_samples")
        arguments = self._arguments(data, "predict")
        if not self.pair.observed:
            raise ValueError("predict: the model observes nothing; draw its latents with sample()")
        with torch.no_grad(), self._entered("predict", seed):
            pair, draws = given(self, num_samples, arguments)
            return predictive.replicate(pair, draws)

    def log_prob(
        self,
        *data: Any,  # noqa: ANN401
        num_samples: int = 1000,
        seed: int | None = None,
    ) -> Estimate:
        r"""Log predictive density of held-out data with its Monte Carlo error.

        .. math:: \sum_n w_n \log \frac{1}{S} \sum_s p(x_n \mid z_s), \quad z_s \sim q

        A datum n is a row: an element of the plate over the first axis of the data; without a
        plate, all data are one datum. It counts w times where the model says so, else once.
        Latents in that plate are drawn anew: from a guide that computes them from the row, with
        importance weights, else from the model. Where these weights vary much it is too low.

        Arguments:
            data: held-out data, in the form that ``fit`` was given.
            num_samples: number of draws S.
            seed: by default the fit's.

        Returns:
            Nats for all data together, and the standard error over draws.
        """
        num_samples = as_count(num_samples, "num_samples", minimum=2)
        arguments = self._arguments(data, "log_prob")
        with torch.no_grad(), self._entered("log_prob", seed):
            return predictive.mean_density(*density(self, arguments, num_samples))

    def summary(self, num_samples: int | None = None, seed: int | None = None) -> pd.DataFrame:
        """Mean, sd and quantiles of every latent of the guide, in the units of the data.

        Components that may swap labels are aligned first. ``mcse`` is the Monte Carlo standard
        error of the mean. A discrete latent that the guide draws has a line for each of its kinds,
        whose mean is how often it is that kind. Those that are summed out have no such figures:
        count their draws in ``sample``.

        Arguments:
            num_samples: draws S behind the figures; by default 4000, fewer for very many latents.
            seed: by default the fit's.

        Returns:
            A frame with columns site, index, mean, sd, q05, q50, q95, mcse.
        """
        import pandas as pd

        from latentlab.inference.figures import frame_of

        num_latents = sum(math.prod(z.shape) for z in self.pair.latents)
        if num_samples is None:
            num_samples = min(4000, max(200, _DRAWN_ELEMENTS // max(num_latents, 1)))
        num_samples = as_count(num_samples, "num_samples", minimum=2)
        frames, supports = [], {z.name: z.support for z in self.pair.latents}
        for site, draws in self._aligned(num_samples, seed).draws.items():
            labels = labels_of(self.pair, site, tuple(draws.shape[1:]))
            frames.append(frame_of(site, labels, draws, supports[site]))
        if not frames:
            return frame_of("", [""], torch.zeros(2, 1), None).head(0)
        return pd.concat(frames, ignore_index=True)

    def compare_draws(
        self, reference: Chains | Mapping[str, Any], num_samples: int = 4000
    ) -> DrawComparison:
        """Compare this posterior with draws of a reference, such as those of ``nuts``.

        Arguments:
            reference: what :func:`latentlab.nuts` returned, or site -> independent draws (S, ...),
                in the same units; sites that it lacks are left out.
            num_samples: draws of this posterior.

        Returns:
            Errors of means and standard deviations with their Monte Carlo errors, and distances
            of all together; see :func:`latentlab.diagnostics.compare_draws` for how to read them.
        """
        from latentlab.inference import appraise

        return appraise.compare_draws(self, reference, as_count(num_samples, "num_samples", 20))

    def loo(self, num_samples: int | None = None, seed: int | None = None) -> Loo:
        """Score each row as if it had been left out, by importance weights of the draws.

        Arguments:
            num_samples: draws S; by default 2,000, fewer for very many rows.
            seed: by default the fit's.

        Returns:
            Scores with errors, and k-hat of each row; see :func:`latentlab.diagnostics.loo`.
        """
        from latentlab.inference import appraise

        return appraise.loo(self, num_samples, seed)

    def ppc(
        self,
        statistics: Mapping[str, Callable] | None = None,
        site: str | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
    ) -> Ppc:
        """Compare statistics of the data with those of data that the posterior predicts.

        Arguments:
            statistics: name -> a function of data, and of R replicates at once; by default mean,
                sd, least and largest, see :func:`latentlab.diagnostics.ppc`.
            site: which observed site, where there are several.
            num_samples: replicates R, 400 by default.
            seed: by default the fit's.
        """
        from latentlab.inference import appraise

        return appraise.ppc(self, statistics, site, num_samples, seed)

    def sandwich(self, num_samples: int = 10_000, seed: int | None = None) -> Sandwich:
        """The log evidence between its lower and upper bounds, from S draws.

        See :func:`latentlab.diagnostics.sandwich` for how to read it. A point is refused.
        """
        from latentlab.inference import appraise

        return appraise.sandwich(self, as_count(num_samples, "num_samples", 100), seed)

    def sensitivity(self, num_samples: int = 4000, seed: int | None = None) -> Sensitivity:
        """How much the latents shared by all rows hang on their prior and on the data.

        See :func:`latentlab.diagnostics.sensitivity` for how to read it. A point is refused.
        """
        from latentlab.inference import appraise

        return appraise.sensitivity(self, as_count(num_samples, "num_samples", 100), seed)

    def elbo_parts(self, num_samples: int = 1000, seed: int | None = None) -> ElboParts:
        """The ELBO by site: what each observed site adds, and what each latent costs.

        See :func:`latentlab.diagnostics.elbo_parts` for how to read it. The KL of a latent is that
        given the latents before it; of a guide that cannot tell them apart, that of all together.
        A point is refused.
        """
        from latentlab.inference import appraise

        return appraise.elbo_parts(self, as_count(num_samples, "num_samples", 2), seed)

    def check(self, num_samples: int | None = None, seed: int | None = None) -> Verdict:
        """The verdict: whether to use this posterior, why, and what to try next.

        Arguments:
            num_samples: draws S behind each k-hat; by default 10,000, fewer for large data.
            seed: by default the fit's.

        Returns:
            A :class:`Verdict`; a posterior loaded without its data returns the stored one.
        """
        from latentlab.inference.verdict import Verdict, decide

        if not self.has_data and self.recorded is not None:
            return Verdict.from_spec(self.recorded)
        return decide(self._evidence(num_samples, seed))

    def to_arviz(self, num_samples: int = 1000, seed: int | None = None) -> arviz.InferenceData:
        """An ArviZ object with posterior, predictive and observed groups, columns named.

        A posterior loaded without its data has the group of its continuous latents only.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's.
        """
        from latentlab.inference.exchange import to_arviz

        return to_arviz(self, num_samples, seed)

    def plot(self, kind: str = "fit") -> Axes | Figure:
        """A picture of the posterior.

        Arguments:
            kind: ``"fit"`` (the model drawn on its data), ``"losses"``, ``"intervals"``,
                ``"khat"`` or ``"predictive"``.

        Returns:
            A matplotlib axes or, for several panels, a figure.

        Raises:
            ValueError: for another kind, or one that this model does not offer.
        """
        from latentlab.inference.pictures import draw_picture

        return draw_picture(self, kind)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page: the verdict first, then what it rests on.

        Arguments:
            path: a ``.html`` file, or a folder (made if missing) that gets ``report.html``.

        Returns:
            The file written.

        Raises:
            OSError: if it cannot be written to; the message names it.
        """
        from latentlab.inference.pictures import write_report

        return write_report(self, path)

    def save(self, path: str | Path) -> Path:
        """Store the posterior without its data, in ``model.safetensors`` (no pickle).

        Arguments:
            path: a folder (made if missing) or a file in it; written atomically.

        Returns:
            The file written; :func:`latentlab.load` takes it or its folder.

        Raises:
            OSError: if it cannot be written to; the message names it.
        """
        from latentlab.inference.checkpoint import save

        return save(self, path)

    # ------------------------------------------------------------------------------------------

    def _observed(self) -> dict[str, Tensor]:
        """Values of the observed sites in the data."""
        data = self.pair.data
        with torch.no_grad(), self._entered("observed", None):
            nodes = poutine.trace(self.model).get_trace(*data.args, **data.kwargs).nodes
        return {name: torch.as_tensor(nodes[name]["value"]) for name in self.pair.observed}

    def _need_data(self, what: str) -> None:
        if not self.has_data:
            raise ValueError(
                f"{what}: this posterior was loaded without its data; "
                "give it back with latentlab.load(path, data=...)"
            )

    def _entered(self, purpose: str, seed: int | None) -> AbstractContextManager[None]:
        chosen = self.seed if seed is None else as_seed(seed)
        return self.pair.entered(stream(chosen, purpose))

    def _arguments(self, data: tuple, what: str) -> Arguments:
        if not data:
            self._need_data(what)
            return self.pair.data
        check = what == "log_prob"  # of data to predict the observed values do not count
        return predictive.as_fitted(data[0] if len(data) == 1 else data, self.pair, check=check)

    def _evidence(self, num_samples: int | None = None, seed: int | None = None) -> Evidence:
        """What the verdict rests on: measured once, and anew when a number has changed."""
        from latentlab.inference.checkpoint import digest_of
        from latentlab.inference.evidence import gather
        from latentlab.inference.networks import is_judged_by_row
        from latentlab.inference.row_evidence import gather_by_row

        self._need_data("check")
        key = (num_samples, seed, id(self.model), id(self.guide), digest_of(self.pair))
        if key not in self._measured:
            how = gather_by_row if is_judged_by_row(self.pair) else gather
            self._measured[key] = how(self, num_samples, seed)
        return self._measured[key]

    @cached_property
    def _measured(self) -> dict[tuple, Evidence]:
        return {}

    @cached_property
    def _plate(self) -> str | None:
        return predictive.datum_plate(self.pair)

    @cached_property
    def _axes(self) -> Mapping[str, int | tuple[int, ...]]:
        """Axes over exchangeable components; empty for a model that does not say."""
        owner = owner_of(self.pair.model)
        return owner.exchangeable if isinstance(owner, Exchangeable) else {}

    def _aligned(
        self, num_samples: int, seed: int | None = None, discrete: bool = False
    ) -> Alignment:
        """Draws with component j the same in each of them."""
        draws = sampled(self, num_samples, seed, discrete)
        if not self._axes:
            same = torch.zeros(num_samples, 0, dtype=torch.long)
            return Alignment(draws, same, Estimate(0.0, 0.0))
        aligned = align({k: draws[k] for k in self._axes}, self._axes)
        return Alignment(draws | dict(aligned.draws), aligned.permutations, aligned.switched)
