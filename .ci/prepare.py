"""Brings everything that is made from the notebooks up to date with them.

    .venv/bin/python .ci/prepare.py             export the package, clean the notebooks, write README.md and the copies
    .venv/bin/python .ci/prepare.py --check     the same, and exit code 1 if that changed any file
"""
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COPIES = {  # Windows has no links, and the wheel carries the notebook that papermill runs
    "_quarto.yml": "nbs/_quarto.yml",
    "nbs/20_train.ipynb": "qlora_nb/assets/20_train.ipynb",
}
STEPS = [
    [str(BIN / "nbdev_clean")],
    [str(BIN / "nbdev_export")],
    [sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"],
    [sys.executable, str(ROOT / ".ci" / "docs.py"), "readme"],
]


def fingerprints():
    "The hash of every file that these steps may write. Not by git: a tree with unfinished edits can be checked too."
    files = [p for folder in ("nbs", "qlora_nb") for p in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    skipped = {"__pycache__", ".ipynb_checkpoints", "runs", "sidebar.yml", ".last_checked"}
    kept = [p for p in files if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)]
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def prepare():
    "Run the steps in order, then make the copies."
    for step in STEPS:
        if subprocess.run(step, cwd=ROOT).returncode:
            sys.exit(f"prepare: {Path(step[0]).name} failed; the lines above say in which notebook")
    for source, copy in COPIES.items():
        if (ROOT / source).exists():
            (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, ROOT / copy)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    before = fingerprints()
    prepare()
    after = fingerprints()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if "--check" in sys.argv:
        if changed:
            sys.exit("prepare: these files did not match their notebooks; they do now: " + ", ".join(changed))
        print(f"prepare: {len(after)} files match their notebooks")
    else:
        print("prepare: " + (", ".join(changed) or "nothing to change"))


if __name__ == "__main__":
    main()
