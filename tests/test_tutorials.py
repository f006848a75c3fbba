"""Every tutorial runs as a plain script, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "tutorials").glob("[0-9]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_tutorial_runs(script, tmp_path):
    environment = os.environ | {"MPLBACKEND": "Agg"}
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_there_is_a_tutorial():
    assert SCRIPTS
