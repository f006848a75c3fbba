"""The command line: a data file in, a verdict and its files out.

Standard output carries the answer, with ``--json`` one JSON object and nothing else. Progress,
warnings and errors go to standard error, an error as one line. A folder of results is written as a
whole or not at all. torch and Pyro are imported when first used, so that ``--help`` is quick.
"""

from latentlab.cli.entry import main

__all__ = ["main"]
