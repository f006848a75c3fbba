"""The command line speaks of its options and of the file, not of Python."""

import pandas as pd
import pytest
from test_cli import refused, run

from latentlab.cli.wording import as_options

COUNTS = pd.DataFrame({"a": [1, 2, 3, 4], "b": [2, -1, 1, 5]})


def fit(tmp_path, frame, arguments):
    """``latentlab fit`` of a frame in data.csv."""
    kind, *options = arguments.split()
    file = tmp_path / "data.csv"
    frame.to_csv(file, index=False)
    return run("fit", kind, file, *options, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("gmm --components 100", "--components: expected at most"),
        ("gmm --components 1 --covariance foo", '--covariance: expected "full"'),
        ("gmm --components 1 --guide foo", "--guide: expected one of"),
        ("hmm --states 2 --emission foo", "--emission: expected one of"),
        ("hmm --states 2 --categories 3", "--categories: is for --emission categorical"),
        ("hmm --states 2 --emission poisson", "at sequence 1, step 2, column 2"),
        ("vae --latent 1 --likelihood poisson", "data.csv: expected counts"),
        ("vae --latent 1 --likelihood poisson", "at row 2, column 2"),
        ("vae --latent 1 --likelihood poisson,poisson,poisson", "--likelihood: expected"),
        ("flow --kind foo", "--kind: expected one of"),
    ],
)
def test_faults_name_options_and_the_file(tmp_path, arguments, expected):
    refused(fit(tmp_path, COUNTS, arguments), expected)


def test_columns_that_are_text_are_left_out_by_an_option(tmp_path):
    frame = COUNTS.assign(b=list("wxyz"))
    refused(fit(tmp_path, frame, "gmm --components 1"), "choose --columns a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('try guide="full_rank"', "try --guide full_rank"),
        ("fit with a larger max_steps", "fit with a larger --max-steps"),
        ("x has 1 inf (first at [3, 1])", "a.csv has 1 inf (first at row 4, column 2)"),
        ("at [0, 1, 2, 3] there", "at image 1, channel 2, line 3, pixel 4 there"),
        ("weights: expected x", "weights: expected x"),
        ("at [0, 1, 2, 3, 4]", "at [0, 1, 2, 3, 4]"),
    ],
)
def test_single_words(text, expected):
    assert as_options(text, "a.csv") == expected
