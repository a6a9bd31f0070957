"""Keeps the figures of a finished demo with the machine they were measured on.

    .venv/bin/qlora demo && .venv/bin/python benchmarks/demo.py [RUN]

Base and tuned model are measured in the same run, on the same rows. Writes benchmarks/results/demo.json, which README.md
shows, and prints tuned over base.
"""
import datetime
import json
import os
import platform
import sys
from pathlib import Path

from qlora_nb.calibrate import cpu_name
from qlora_nb.config import open_run, read_json, versions, write_json

RESULT = Path(__file__).parent / "results" / "demo.json"


def record(run):
    "The figures of a run and the machine."
    report, training, budget = read_json(run.eval / "report.json"), read_json(run.summary_file), read_json(run.budget_file)
    rows = read_json(run.data / "report.json")["counts"]["train"]
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), **versions()}
    return {**report, "training": {**training, "rows": rows}, "predicted_peak_bytes": budget["peak_bytes"],
            "machine": machine, "date": datetime.date.today().isoformat()}


if __name__ == "__main__":
    found = record(open_run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))
    write_json(RESULT, found)
    base, tuned = found["base"], found["tuned"]
    print(f"perplexity tuned/base {tuned['perplexity'] / base['perplexity']:.3f}")
    print(f"ROUGE-L tuned/base {tuned['rougeL']['mean'] / base['rougeL']['mean']:.2f}")
    print(f"stop rate base {base['stop_rate']:.3f}, tuned {tuned['stop_rate']:.3f}")
