"""Simulates the 64 training steps of nbs/03_simulate.ipynb and keeps them beside what the formula predicts.

    .venv/bin/python benchmarks/simulation.py            # about two minutes, no GPU
    .venv/bin/python benchmarks/simulation.py --formula  # only predict again: the formula has changed

Writes benchmarks/results/simulation.json, with the versions of the libraries, and prints the worst and the mean error.
"""
import json
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
logging.disable(logging.ERROR)
warnings.simplefilter("ignore")

from qlora_nb.simulate import compare, comparison, grid, versions

RESULT = Path(__file__).parent / "results" / "simulation.json"


if __name__ == "__main__":
    known = [None] * len(grid())
    if "--formula" in sys.argv[1:]:
        old = json.loads(RESULT.read_text())
        if old["versions"] != versions(): sys.exit(f"simulated with {old['versions']}; run without --formula")
        known = [row["simulated"] for row in old["rows"]]
    found = comparison([compare(**cell, simulated=s) for cell, s in zip(grid(), known)])
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for key in ("absolute_error", "absolute_error_of_activations"):
        print(f"{key.replace('_', ' ')}: worst {found[key]['worst']:.2%}, mean {found[key]['mean']:.2%}")
