"""Peak memory of a fit in mini-batches to a million rows, beyond the import and the data.

Each case has a process of its own: what is measured is the high-water mark of that process, less
what it was after the import and, for rows in memory, after they were made.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

N, D, BATCH = 1_000_000, 50, 256
FEW = 5_000
LIMIT = 300  # MB beyond import and data
CASES = ("tensor", "mapped", "tensor-xla", "mapped-xla")


@dataclass(frozen=True)
class Peak:
    """Of one case, in MB of 10^6 bytes."""

    case: str
    after_import: float
    data: float
    peak: float

    @property
    def beyond(self) -> float:
        """The peak beyond the import and the data."""
        return self.peak - self.after_import - self.data

    def __str__(self) -> str:
        head = f"{self.case:<12} import {self.after_import:4.0f}  data {self.data:4.0f}"
        return f"{head}  peak {self.peak:4.0f}  beyond {self.beyond:4.0f} MB (limit {LIMIT})"


def measure(case: str, num_rows: int = N, max_steps: int = 420) -> Peak:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, case, str(num_rows), str(max_steps), folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    after_import, data, peak = map(float, done.stdout.split())
    return Peak(case, after_import, data, peak)


def run() -> str:
    """All cases, one after the other, each with what few rows take: code, and XLA's compiler."""
    lines = []
    for case in CASES:
        many, few = measure(case), measure(case, FEW)
        lines.append(f"{many}; with {FEW:,} rows beyond {few.beyond:4.0f} MB")
    return "\n".join(lines)


def _high_water() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _fit(case: str, num_rows: int, max_steps: int, folder: str) -> None:
    import numpy as np
    import pyro
    import pyro.distributions as dist
    import torch

    import latentlab as ll

    before = _high_water()

    def logistic(x, y, size=None):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        logits = (weights @ x.T).squeeze(-2) if weights.dim() > 1 else weights @ x.T
        with ll.rows(x, size):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    if case.startswith("mapped"):
        path = Path(folder) / "x.npy"
        x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_rows, D))
        rng = np.random.default_rng(0)
        for start in range(0, num_rows, 10_000):
            x[start : start + 10_000] = rng.normal(size=x[start : start + 10_000].shape)
        np.save(Path(folder) / "y.npy", (rng.random(num_rows) < 0.5).astype(np.float32))
        del x
        x, y = (np.load(Path(folder) / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_rows, D, generator=generator)
        y = torch.rand(num_rows, generator=generator).lt(0.5).float()
    size = (x.size if case.startswith("mapped") else x.numel()) + num_rows
    how = {"num_restarts": 1, "max_steps": max_steps, "progress": False}
    how["backend"] = "xla" if case.endswith("xla") else "eager"
    ll.fit(logistic, (x, y), "mean_field", batch_size=BATCH, **how)
    sys.stdout.write(f"{before} {4 * size / 1e6} {_high_water()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("num_rows", type=int)
    parser.add_argument("max_steps", type=int)
    parser.add_argument("folder")
    chosen = parser.parse_args()
    _fit(chosen.case, chosen.num_rows, chosen.max_steps, chosen.folder)
