"What every test here shares: the markers, an environment without network, the command line as a process, the benchmarks."
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg",
                  QLORA_CACHE=tempfile.mkdtemp(prefix="qlora-cache-"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; tests send it to what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.max_steps=8", "train.eval_steps=4", "train.save_steps=4", "train.log_steps=2", "train.effective_batch=8",
         "data.eval_fraction=0.02", "eval.rows=8", "eval.max_new_tokens=24"]


def pytest_configure(config):
    "`make test` leaves out both; `make test-full` runs slow, and gpu where there is one."
    config.addinivalue_line("markers", "slow: takes more than a minute")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")


def qlora(*args, cwd=None, env=None, timeout=300):
    "Run the command line to its end, as a user would."
    command = [str(Path(sys.executable).with_name("qlora")), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=timeout)


def benchmark(name):
    "A script of benchmarks/ as a module."
    if (folder := str(ROOT / "benchmarks")) not in sys.path: sys.path.insert(0, folder)
    return importlib.import_module(name)
