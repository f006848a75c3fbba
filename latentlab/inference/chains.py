r"""Draws of a sampler, and whether to believe them.

Letters: C chains, S draws of each, L latent numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentlab.data.checks import as_count, as_seed
from latentlab.diagnostics import align, ess, mcse, rhat
from latentlab.inference.axes import coords_of, dims_of, labels_of
from latentlab.inference.pair import Pair
from latentlab.inference.sandbox import stream
from latentlab.inference.verdict import LEVELS, Finding, Verdict
from latentlab.protocols import Exchangeable, owner_of

if TYPE_CHECKING:
    import arviz
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Chains"]

_MIXED = 1.01, 1.05  # R-hat: care, and not to be used
_FEWEST = 100.0  # effective draws a chain, below which quantiles and R-hat itself are rough
_DIVERGED = 0.01  # share of divergent draws that bends the whole answer
_ENERGY = 0.3  # E-BFMI below which the tails are hardly visited
_DEEPEST = 1023  # leapfrog steps at which a trajectory is cut off
_SHOWN = 12  # numbers in a picture


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    """What :func:`latentlab.nuts` returns: draws of the posterior, chain by chain.

    Arguments:
        pair: the sampler's own copy of the model, with its data.
        seed: of the chains.
        draws: site -> draws, shape (C, S, ...), components that may swap labels not yet aligned.
        told: how each draw came about, name -> (C, S): ``"diverging"``; and where the sampler
            tells them ``"n_steps"``, ``"acceptance_rate"`` and ``"energy"``.
        backend: ``"xla"`` or ``"pyro"``, and why.
        seconds: wall-clock time, compilation included.
    """

    pair: Pair = field(repr=False)
    seed: int
    draws: Mapping[str, Tensor]
    told: Mapping[str, Tensor]
    backend: str
    seconds: float

    def __repr__(self) -> str:
        sites = ", ".join(self.draws)
        return f"Chains({sites}; {self.num_chains} chains of {self.num_samples} draws)"

    def __str__(self) -> str:
        return f"{self!r}\n{self.check()}"

    @property
    def num_chains(self) -> int:
        """Number C of chains."""
        return len(self.told["diverging"])

    @property
    def num_samples(self) -> int:
        """Number S of draws that each chain kept."""
        return self.told["diverging"].shape[1]

    @property
    def num_divergent(self) -> int:
        """Draws whose trajectory left the posterior's surface: curvature that steps jump over."""
        return int(self.told["diverging"].sum())

    def sample(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of all chains together, in random order.

        Arguments:
            num_samples: how many, with replacement where there are fewer; by default each once.
            seed: of their choice, by default that of the chains.

        Returns:
            Site -> tensor (num_samples, ...).
        """
        total = self.num_chains * self.num_samples
        count = total if num_samples is None else as_count(num_samples, "num_samples")
        chosen = stream(self.seed if seed is None else as_seed(seed), "sample")
        generator = torch.Generator().manual_seed(chosen)
        rows = [torch.randperm(total, generator=generator) for _ in range(-(-count // total))]
        some = torch.cat(rows)[:count]
        return {site: value.flatten(0, 1)[some] for site, value in self._aligned.items()}

    def summary(self) -> pd.DataFrame:
        """Mean, sd and quantiles of every latent, with the errors of a chain's draws.

        ``mcse`` is the Monte Carlo standard error of the mean; read ``ess_bulk`` and ``ess_tail``
        from 100 a chain on, and ``rhat`` below 1.01. Components that may swap labels are aligned.

        Returns:
            A frame with columns site, index, mean, sd, q05, q50, q95, mcse, ess_bulk, ess_tail,
            rhat.
        """
        import pandas as pd

        frames = []
        for site, value in self._aligned.items():
            flat = value.flatten(2) if value.dim() > 2 else value[..., None]
            pooled = flat.flatten(0, 1).double()
            low, middle, high = pooled.quantile(torch.tensor([0.05, 0.5, 0.95]).double(), dim=0)
            shape = tuple(value.shape[2:])
            columns = {
                "site": site,
                "index": labels_of(self.pair, site, shape),
                "mean": pooled.mean(0),
                "sd": pooled.std(0),
                "q05": low,
                "q50": middle,
                "q95": high,
                "mcse": mcse(flat),
                "ess_bulk": ess(flat),
                "ess_tail": ess(flat, "tail"),
                "rhat": rhat(flat, rank=True),
            }
            frames.append(
                pd.DataFrame(
                    {k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
                )
            )
        return pd.concat(frames, ignore_index=True)

    def check(self) -> Verdict:
        """Whether to believe the draws, why, and what to try next.

        =================  ========================================================================
        evidence           reading
        =================  ========================================================================
        R-hat              rank-normalised, of the worst number: above 1.01 the chains have not
                           mixed (care), above 1.05 they have not found each other (do not use)
        effective draws    in the bulk and the tails, of the worst number: fewer than 100 a chain
                           leave quantiles and R-hat itself rough (care)
        divergences        any of them tells of curvature that steps jump over (care); one draw in
                           a hundred bends the answer (do not use)
        energy             E-BFMI below 0.3: tails are hardly visited (care)
        chains             a single chain cannot tell whether another one would agree (care)
        =================  ========================================================================

        References:
            | Rank-normalization, folding, and localization: an improved R-hat
              (Vehtari et al., 2021)
            | A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017)
        """
        frame = self.summary()
        findings = [f for rule in (_mixing, _effective) for f in rule(frame, self.num_chains)]
        findings += [*self._trajectories()]
        level = max((f.level for f in findings), key=LEVELS.index, default="use")
        asked = [f for f in findings if f.level != "use"]
        reasons = tuple(f.reason for f in (asked or findings))
        steps = dict.fromkeys(f.next_step for f in asked if f.next_step)
        return Verdict(level, reasons, tuple(steps), self._evidence(frame))

    def to_arviz(self) -> arviz.InferenceData:
        """An ArviZ object with the groups ``posterior`` and ``sample_stats``, chains apart."""
        from latentlab.inference.exchange import from_groups

        groups = {
            "posterior": {k: v.numpy(force=True) for k, v in self._aligned.items()},
            "sample_stats": {k: v.numpy(force=True) for k, v in self.told.items()},
        }
        shapes = {site: tuple(value.shape[2:]) for site, value in self.draws.items()}
        dims = {site: list(dims_of(self.pair, site, len(shape))) for site, shape in shapes.items()}
        coords: dict[str, list[str]] = {}
        for site, shape in shapes.items():
            coords |= dict(zip(dims[site], coords_of(self.pair, site, shape), strict=True))
        return from_groups(groups, coords, dims)

    def plot(self) -> Figure:
        """Ranks of the draws among those of all chains, a panel for each of the first numbers.

        Chains that have mixed have flat ranks; one that is elsewhere stands out.

        Reference:
            | Rank-normalization, folding, and localization: an improved R-hat
              (Vehtari et al., 2021)
        """
        from matplotlib.figure import Figure

        frame = self.summary()
        flat = torch.cat([v.reshape(*v.shape[:2], -1) for v in self._aligned.values()], -1)
        worst = frame["rhat"].to_numpy().argsort(kind="stable")[::-1][:_SHOWN]
        across = min(4, len(worst))
        down = math.ceil(len(worst) / across)
        figure = Figure(figsize=(3 * across, 2.2 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flat
        for panel, number in itertools.zip_longest(panels, worst):
            if number is None:
                panel.set_axis_off()
                continue
            ranks = flat[..., number].flatten().argsort().argsort().reshape(flat.shape[:2])
            for chain in ranks:
                panel.hist(chain.numpy(), bins=20, histtype="step")
            panel.axhline(self.num_samples / 20, color="0.5", linestyle="--")
            site, index = frame.loc[number, ["site", "index"]]
            panel.set(title=f"{site}[{index}]" if index else site, yticks=[])
        return figure

    # ------------------------------------------------------------------------------------------

    @property
    def _aligned(self) -> Mapping[str, Tensor]:
        """Draws with component j the same in each of them."""
        owner = owner_of(self.pair.model)
        axes = owner.exchangeable if isinstance(owner, Exchangeable) else {}
        own = {site: axis for site, axis in axes.items() if site in self.draws}
        if not own:
            return self.draws
        found = align({site: self.draws[site].flatten(0, 1) for site in own}, own).draws
        return {**self.draws, **{k: v.reshape(self.draws[k].shape) for k, v in found.items()}}

    def _trajectories(self) -> Iterator[Finding]:
        total = self.num_chains * self.num_samples
        if self.num_chains < 2:
            yield Finding(
                "use with care",
                "one chain: whether another one would agree is not known",
                "draw with num_chains=4",
            )
        if share := self.num_divergent / total:
            yield Finding(
                "do not use" if share > _DIVERGED else "use with care",
                f"{self.num_divergent} of {total} draws diverged",
                "target_accept=0.99, or another parametrisation (non-centred, on another scale)",
            )
        if "energy" in self.told:
            worst = float(_bfmi(self.told["energy"].double()).min())
            if worst < _ENERGY:
                yield Finding(
                    "use with care",
                    f"E-BFMI {worst:.2f}: the tails are hardly visited",
                    "another parametrisation, or lighter tails in the priors",
                )

    def _evidence(self, frame: pd.DataFrame) -> dict[str, str]:
        total = self.num_chains * self.num_samples
        text = {
            "R-hat": f"at most {frame['rhat'].max():.3f}",
            "effective draws": (
                f"{frame['ess_bulk'].min():.0f} in the bulk, {frame['ess_tail'].min():.0f} in the "
                f"tails, at the least, of {total}"
            ),
            "divergences": f"{self.num_divergent} of {total}",
        }
        if "n_steps" in self.told:
            steps = self.told["n_steps"].double()
            cut = int((steps >= _DEEPEST).sum())
            text["steps of a trajectory"] = f"{steps.mean():.0f}; {cut} of {total} were cut off"
        if "acceptance_rate" in self.told:
            text["acceptance"] = f"{float(self.told['acceptance_rate'].mean()):.2f}"
        return text | {"sampler": f"{self.backend}, {self.seconds:.1f} s"}


def _mixing(frame: pd.DataFrame, num_chains: int) -> Iterator[Finding]:
    worst = frame["rhat"].max()
    bad = not worst <= _MIXED[0]
    yield Finding(
        "use" if not bad else "do not use" if not worst <= _MIXED[1] else "use with care",
        f"R-hat of {_named(frame, frame['rhat'].idxmax())} is {worst:.3f}",
        "more draws and a longer warm-up; if chains stay apart, the posterior has several modes",
    )


def _effective(frame: pd.DataFrame, num_chains: int) -> Iterator[Finding]:
    for kind in ("bulk", "tail"):
        fewest = frame[f"ess_{kind}"].min()
        if not fewest >= _FEWEST * num_chains:
            number = _named(frame, frame[f"ess_{kind}"].idxmin())
            yield Finding(
                "use with care",
                f"{number} has {fewest:.0f} effective draws in the {kind}, fewer than "
                f"{_FEWEST:.0f} a chain",
                "more draws (num_samples=), or another parametrisation",
            )


def _named(frame: pd.DataFrame, row: Any) -> str:  # noqa: ANN401
    site, index = frame.loc[row, ["site", "index"]]
    return f"{site}[{index}]" if index else str(site)


def _bfmi(energy: Tensor) -> Tensor:
    """Energy that a step changes, over all there is to change, for each chain (C,)."""
    return energy.diff(dim=1).square().mean(1) / energy.var(1)
