"""The frozen result of a fit, and everything a person does next.

Letters: S draws, N rows, P particles, L latent numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro.poutine as poutine
import torch
from pyro.infer import infer_discrete
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import Alignment, Estimate, align
from latentlab.guides import Draws
from latentlab.inference import objectives
from latentlab.inference.arguments import as_arguments
from latentlab.inference.pair import Arguments, Pair
from latentlab.inference.sandbox import stream
from latentlab.inference.stages import chunks, particle_chunk
from latentlab.protocols import DrawsFit, Exchangeable, NamesDims

if TYPE_CHECKING:
    import arviz
    import pandas as pd

    from latentlab.inference.verdict import Verdict

__all__ = ["Posterior", "Restarts"]


@dataclass(frozen=True)
class Restarts:
    """How far the starts of a fit agree.

    Arguments:
        elbos: the ELBO that each start reached after its warm-up, in nats.
    """

    elbos: tuple[Estimate, ...]

    def _behind(self) -> list[float]:
        best = max(e.value for e in self.elbos)
        return sorted(best - e.value for e in self.elbos)

    @property
    def num_agreeing(self) -> int:
        """Starts within one nat, or three standard errors, of the best."""
        best = max(self.elbos, key=lambda e: e.value)
        return sum(
            best.value - e.value <= 1.0 + 3 * (best.se**2 + e.se**2) ** 0.5 for e in self.elbos
        )

    def __str__(self) -> str:
        if len(self.elbos) < 2:
            return "one start: agreement of starts is not known"
        head = f"best optimum in {self.num_agreeing} of {len(self.elbos)} starts"
        others = self._behind()[self.num_agreeing :]
        return head + (f", runner-up {others[0]:.1f} nats worse" if others else "")


@dataclass(frozen=True, repr=False)
class Posterior:
    """What a fit returns: its own copy of the pair, how the fit went, and what to do next.

    Arguments:
        pair: the model, the guide, the data and the parameters.
        seed: of the fit; the default of every ``seed=None`` below.
        elbo: evidence lower bound in nats per data set, larger is better.
        losses: negative ELBO of every step of the climb that won, shape (steps,).
        stage_starts: the steps at which its stages began.
        stage_elbos: the ELBO at the end of each stage.
        converged: whether two stages agreed.
        stop_reason: why the climb ended, in words.
        restarts: how far the starts agree.
        notes: what the check of the pair noted.
        seconds: wall-clock time of the fit.
        method: how it was climbed.
        backend: what ran the pair.
        fitted_to: sha256 of the data.
        recorded: the verdict that was stored with a loaded posterior.
        has_data: whether the data are at hand; a file does not hold them.
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
    fitted_to: str = ""
    recorded: Mapping[str, Any] | None = None
    has_data: bool = True

    def __repr__(self) -> str:
        sites = ", ".join(z.name for z in self.pair.latents)
        state = "converged" if self.converged else "not converged"
        return f"Posterior({sites}; ELBO {self.elbo} nats; {state}; {len(self.losses)} steps)"

    @property
    def model(self) -> Callable:
        """The fit's own copy of the model."""
        return self.pair.model

    @property
    def guide(self) -> Callable:
        """The fit's own copy of the guide."""
        return self.pair.guide

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the data's columns, where they have names."""
        return self.pair.data.names

    @property
    def params(self) -> dict[str, Tensor]:
        """Optimised parameters by name, as the optimiser sees them (unconstrained), detached."""
        return {k: v.detach().clone() for k, v in self.pair.parameters().items()}

    def sample(self, num_samples: int = 1000, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of all latents, discrete ones included.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's: the same call gives the same draws.

        Returns:
            Site -> tensor (S, ...).
        """
        num_samples = as_count(num_samples, "num_samples")
        with torch.no_grad(), self._entered("sample", seed):
            values = objectives.draw(self.pair, num_samples).values
            draws = {
                z.name: values[z.name].reshape(num_samples, *z.shape) for z in self.pair.latents
            }
            if self.pair.summed_out:
                self._need_data("discrete latents")
                draws |= self._sample_discrete(values, num_samples)
        return draws

    def log_weights(self, num_samples: int = 1000, seed: int | None = None) -> Tensor:
        """Log importance weights log p(x, z) - log q(z) in nats, shape (S,).

        Under an exact posterior each of them is the log evidence itself.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's.
        """
        return self._weighted(num_samples, seed)[1]

    def predict(self, num_samples: int = 1000, *data: Any, seed: int | None = None) -> Any:  # noqa: ANN401
        """New draws of the observed sites from the posterior predictive; never the data.

        Arguments:
            num_samples: number of draws S.
            data: what the model is called with (its shape and covariates count, its observed
                values do not); by default the fit's own data.
            seed: by default the fit's.

        Returns:
            Site -> tensor (S, ...).
        """
        arguments = self._arguments(data)
        num_samples = as_count(num_samples, "num_samples")
        with torch.no_grad(), self._entered("predict", seed):
            draws = self._known(objectives.draw(self.pair, num_samples), arguments)
            chunk = particle_chunk(self.pair, num_samples) if self.pair.vectorised else 1
            parts = [
                self._forward(draws[start : start + chunk], arguments)
                for start in range(0, num_samples, chunk)
            ]
        return {name: torch.cat([part[name] for part in parts]) for name in self.pair.observed}

    def log_prob(
        self, *data: Any, num_samples: int = 1000, seed: int | None = None  # noqa: ANN401
    ) -> Estimate:
        r"""Log predictive density of held-out data with its Monte Carlo error.

        .. math:: \sum_n \log \frac{1}{S} \sum_s p(x_n \mid z_s), \quad z_s \sim q

        Latents that are local to the rows are drawn anew from the model for each row.

        Arguments:
            data: held-out data, in the form that ``fit`` was given.
            num_samples: number of draws S.
            seed: by default the fit's.

        Returns:
            Nats for all rows together, and the standard error over draws.
        """
        arguments = self._arguments(data)
        num_samples = as_count(num_samples, "num_samples", minimum=2)
        with torch.no_grad(), self._entered("log_prob", seed):
            draws = objectives.draw(self.pair, num_samples)
            kept = {k: v for k, v in draws.values.items() if not self.pair.is_local(k)}
            parts = [
                self._log_likelihood(part, arguments)
                for part in chunks(self.pair, replace(draws, values=kept))
            ]
        return _log_mean_density(torch.cat(parts))

    def summary(self, num_samples: int = 4000, seed: int | None = None) -> pd.DataFrame:
        """Mean, sd and quantiles of every latent number, in the units of the data.

        Components that may swap labels are aligned first. ``mcse`` is the Monte Carlo standard
        error of the mean.

        Arguments:
            num_samples: number of draws S behind the figures.
            seed: by default the fit's.

        Returns:
            A frame with columns site, index, mean, sd, q05, q50, q95, mcse.
        """
        import pandas as pd

        rows = []
        for site, draws in self._aligned(num_samples, seed).draws.items():
            flat = draws.reshape(len(draws), -1).double()
            quantiles = flat.quantile(torch.tensor([0.05, 0.5, 0.95]).to(flat), dim=0)
            sd = flat.std(0)
            for i, label in enumerate(self._labels(site, tuple(draws.shape[1:]))):
                row = [flat[:, i].mean(), sd[i], *quantiles[:, i], sd[i] / len(flat) ** 0.5]
                rows.append([site, label, *map(float, row)])
        return pd.DataFrame(rows, columns=["site", "index", "mean", "sd", "q05", "q50", "q95", "mcse"])

    def check(self, num_samples: int | None = None, seed: int | None = None) -> Verdict:
        """The verdict: whether to use this posterior, why, and what to try next.

        Arguments:
            num_samples: draws S behind each k-hat; by default 10,000, fewer for large data.
            seed: by default the fit's.

        Returns:
            A :class:`Verdict`; a posterior loaded without its data returns the stored one.
        """
        from latentlab.inference.verdict import Verdict, judge

        if not self.has_data and self.recorded is not None:
            return Verdict.from_spec(self.recorded)
        return judge(self, num_samples, seed)

    def to_arviz(self, num_samples: int = 1000, seed: int | None = None) -> arviz.InferenceData:
        """An ArviZ object with posterior, predictive and observed groups, columns named.

        Arguments:
            num_samples: number of draws S.
            seed: by default the fit's.
        """
        from latentlab.inference.exchange import to_arviz

        return to_arviz(self, num_samples, seed)

    def plot(self, kind: str = "fit") -> Any:  # noqa: ANN401
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
            path: a file, or a folder that gets ``report.html``.

        Returns:
            The file written.
        """
        from latentlab.inference.pictures import write_report

        return write_report(self, path)

    def save(self, path: str | Path) -> Path:
        """Store the posterior without its data, in ``model.safetensors`` (no pickle).

        Arguments:
            path: a folder (made if missing) or a file in it; written atomically.

        Returns:
            The file written; :func:`latentlab.load` takes it or its folder.
        """
        from latentlab.inference.checkpoint import save

        return save(self, path)

    # ------------------------------------------------------------------------------------------

    def _observed(self) -> dict[str, Tensor]:
        """Values of the observed sites in the data."""
        with torch.no_grad(), self._entered("observed", None):
            trace = poutine.trace(self.pair.model).get_trace(
                *self.pair.data.args, **self.pair.data.kwargs
            )
        return {name: trace.nodes[name]["value"] for name in self.pair.observed}

    def _weighted(
        self, num_samples: int, seed: int | None, keep: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the continuous latents, site -> (S, ...), if kept; their log weights (S,)."""
        self._need_data("log_weights")
        num_samples = as_count(num_samples, "num_samples")
        chunk = particle_chunk(self.pair, num_samples)
        values: dict[str, list[Tensor]] = {z.name: [] for z in self.pair.latents if keep}
        weights = []
        with torch.no_grad(), self._entered("log_weights", seed):
            for start in range(0, num_samples, chunk):
                draws = objectives.draw(self.pair, min(chunk, num_samples - start))
                weights.append(objectives.log_joint(self.pair, draws) - draws.log_q)
                for name, kept in values.items():
                    kept.append(draws.values[name])
        shapes = {z.name: z.shape for z in self.pair.latents}
        kept = {k: torch.cat(v).reshape(num_samples, *shapes[k]) for k, v in values.items()}
        return kept, torch.cat(weights)

    def _need_data(self, what: str) -> None:
        if not self.has_data:
            raise ValueError(
                f"{what}: this posterior was loaded without its data; "
                "give it back with latentlab.load(path, data=...)"
            )

    def _entered(self, purpose: str, seed: int | None) -> Any:  # noqa: ANN401
        chosen = self.seed if seed is None else as_seed(seed)
        return self.pair.entered(stream(chosen, purpose))

    def _arguments(self, data: tuple) -> Arguments:
        if not data:
            self._need_data("data")
            return self.pair.data
        value = data[0] if len(data) == 1 else data
        arguments = as_arguments(value, self.pair.model)
        names = self.pair.data.names
        if names and len(data) == 1 and not isinstance(value, Mapping):
            from latentlab.data.checks import match_columns

            table = match_columns(value, names)
            arguments = as_arguments(table, self.pair.model)
        return arguments.map(lambda t: t.to(self.pair.dtype) if t.is_floating_point() else t)

    def _known(self, draws: Draws, arguments: Arguments) -> Draws:
        """Draws of the latents that fit the shape of new data; others are drawn by the model."""
        if arguments is self.pair.data:
            return draws
        with objectives.Substitute({}) as record, poutine.uncondition():
            arguments.call(self.pair.model)
        fitting = {
            name: value
            for name, value in draws.values.items()
            if name in record.values and tuple(record.values[name].shape) == self.pair.shapes[name]
        }
        return replace(draws, values=fitting)

    def _forward(self, draws: Draws, arguments: Arguments) -> dict[str, Tensor]:
        """Observed sites drawn anew, given draws of the latents."""
        pair, values, num_samples = self.pair, draws.values, len(draws)
        if not pair.vectorised:
            single = {k: v[0].reshape(pair.shapes[k]) for k, v in values.items()}
            with objectives.Substitute(single) as record, poutine.uncondition():
                arguments.call(pair.model)
            return {name: record.values[name][None] for name in pair.observed}
        with objectives.particles(num_samples, pair), objectives.Substitute(values) as record:
            with poutine.uncondition():
                arguments.call(pair.model)
        drawn = {}
        for name in pair.observed:
            value = record.values[name]
            lead = value.dim() - len(pair.shapes[name])
            value = value.reshape(num_samples, *value.shape[lead:]) if lead > 0 else value
            drawn[name] = value
        return drawn

    def _log_likelihood(self, draws: Draws, arguments: Arguments) -> Tensor:
        """Log-density of the observed sites, (S, N), or (S, 1) where they have no rows."""
        if self.pair.vectorised:  # latents drawn anew need a draw for every particle
            with objectives.particles(len(draws), self.pair):
                found = objectives.site_log_probs(self.pair, draws, arguments)
        else:
            found = objectives.site_log_probs(self.pair, draws, arguments)
        num_samples, nesting, parts = len(draws), self.pair.nesting, []
        for name in self.pair.observed:
            value = found[name]
            if value.dim() <= nesting:
                value = value.expand(num_samples, *(1,) * (nesting - value.dim()), *value.shape)
            parts.append(value.expand(num_samples, *value.shape[1:]).flatten(1))
        if len({part.shape[1] for part in parts}) == 1:
            return torch.stack(parts).sum(0)
        return torch.cat([part.sum(1, keepdim=True) for part in parts], 1).sum(1, keepdim=True)

    def _sample_discrete(self, values: dict[str, Tensor], num_samples: int) -> dict[str, Tensor]:
        """Labels from their exact conditional distribution, given the continuous latents."""
        pair = self.pair

        def labelled() -> None:
            with objectives.Substitute(values, pair.summed_out):
                pair.data.call(pair.model)

        sampled = infer_discrete(labelled, first_available_dim=-2 - pair.nesting, temperature=1)
        with objectives.particles(num_samples, pair):
            trace = poutine.trace(sampled).get_trace()
        return {
            name: trace.nodes[name]["value"].expand(
                num_samples, *trace.nodes[name]["value"].shape[1:]
            ).reshape(num_samples, *pair.shapes[name])
            for name in pair.summed_out
        }

    @cached_property
    def _axes(self) -> Mapping[str, int]:
        """Axes over exchangeable components; empty for a model that does not say."""
        owner = getattr(self.pair.model, "__self__", self.pair.model)
        return owner.exchangeable if isinstance(owner, Exchangeable) else {}

    def _aligned(self, num_samples: int, seed: int | None = None) -> Alignment:
        draws = self.sample(num_samples, seed)
        if not self._axes:
            return Alignment(draws, torch.zeros(num_samples, 0, dtype=torch.long), Estimate(0.0, 0.0))
        aligned = align({k: draws[k] for k in self._axes}, self._axes)
        return Alignment(draws | dict(aligned.draws), aligned.permutations, aligned.switched)

    def _dims(self, site: str, num_axes: int) -> tuple[str, ...]:
        owner = getattr(self.pair.model, "__self__", self.pair.model)
        if isinstance(owner, NamesDims) and len(owner.dims.get(site, ())) == num_axes:
            return tuple(owner.dims[site])
        return tuple(f"{site}_dim_{i}" for i in range(num_axes))

    def _coords(self, site: str, shape: tuple[int, ...]) -> list[list[str]]:
        """Labels along each axis of a site; a feature has the name of its column."""
        coords = []
        for dim, size in zip(self._dims(site, len(shape)), shape, strict=True):
            named = dim == "feature" and self.names is not None and len(self.names) == size
            coords.append(list(self.names) if named else [str(i) for i in range(size)])
        return coords

    def _labels(self, site: str, shape: tuple[int, ...]) -> list[str]:
        return [", ".join(parts) for parts in itertools.product(*self._coords(site, shape))]

    def _draw_fit(self) -> Any:  # noqa: ANN401
        owner = getattr(self.pair.model, "__self__", self.pair.model)
        if not isinstance(owner, DrawsFit) or not self.pair.data.args:
            raise ValueError('kind: this model draws no "fit"; try "predictive" or "intervals"')
        x = self.pair.data.args[0]
        names = self.names or tuple(f"x{i}" for i in range(x.shape[-1]))
        return owner.plot_fit(x, self._aligned(500).draws, names)


def _log_mean_density(log_prob: Tensor) -> Estimate:
    """Sum over rows of the log of the mean over draws (S, N), error by the delta method."""
    num_samples = len(log_prob)
    total = log_prob.double().logsumexp(0) - torch.tensor(num_samples).double().log()
    share = (log_prob.double() - total).exp().sum(1)  # (S,), mean N
    return Estimate(float(total.sum()), float(share.std() / num_samples**0.5))
