"""Installs everything this project was tested with into .venv, in the order that avoids a wrong torch build.

    python3 .ci/install.py          (Windows: py .ci/install.py)

Needs only the standard library. Run again, it does nothing unless requirements.txt, setup.py or settings.ini changed.
"""
import http.client
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".installed"
SOURCES = [ROOT / name for name in ("requirements.txt", "setup.py", "settings.ini")]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
CUDA_WHEELS = "https://download.pytorch.org/whl/cu130"  # PyPI has no CUDA build for Windows
LOG_LINES = 30  # of pip's output, shown when a step fails


def stop(message):
    "End with one line on stderr that says what to do."
    sys.exit("install: " + message)


def say(text):
    print(text, flush=True)


# ---------------------------------------------------------------- which Python


def version_of(python):
    "The (major, minor) of an interpreter, or None when it does not run."
    code = "import sys; print(*sys.version_info[:2])"
    try:
        found = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return tuple(map(int, found.stdout.split())) if found.returncode == 0 else None


def base_python():
    "An interpreter that is new enough: the one running this, else python3.12 or python3.11 from PATH."
    if sys.version_info[:2] >= OLDEST:
        return sys.executable
    for name in ("python3.12", "python3.11"):
        path = shutil.which(name)
        if path and (version_of(path) or (0, 0)) >= OLDEST:
            return path
    found = platform.python_version()
    stop("Python %s is too old: install Python 3.11 or 3.12 (python.org) and run this again" % found)


def make_venv():
    "Create .venv, or check that the one that is there works."
    if PYTHON.exists():
        found = version_of(PYTHON)
        if found is None or found < OLDEST:
            stop("%s does not run Python 3.11 or later: delete the folder .venv and run this again" % PYTHON)
        return
    python = base_python()
    say("Python %d.%d -> %s" % (version_of(python) + (VENV,)))
    made = subprocess.run([python, "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        print(made.stdout.decode(errors="replace"), file=sys.stderr)
        shutil.rmtree(str(VENV), ignore_errors=True)
        stop("cannot create .venv; on Debian or Ubuntu: sudo apt install python3-venv, then run this again")


# ---------------------------------------------------------------- pip, with little noise


def package_in(line):
    "The package that a line of pip's output is about, or None."
    found = re.match(r"\s*(?:Collecting|Downloading|Using cached|Building wheel for)\s+([A-Za-z0-9._-]+)", line)
    return found.group(1).split("-")[0].split("=")[0] if found else None


def pip(step, *args):
    "Run one pip install under a heading, with a sign of life; returns whether it worked."
    say("%s ..." % step)
    start = spoke = time.monotonic()
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *args]
    job = subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace")
    lines, pause = [], 1 if sys.stdout.isatty() else 10
    for line in job.stdout:
        lines.append(line.rstrip())
        name = package_in(line)
        if name and time.monotonic() - spoke > pause:
            spoke = time.monotonic()
            say("    %3.0f s  %s" % (spoke - start, name))
        if line.startswith("Installing collected packages"):
            say("    %3.0f s  unpacking %d packages" % (time.monotonic() - start, line.count(",") + 1))
    if job.wait() == 0:
        say("    done in %.0f s" % (time.monotonic() - start))
        return True
    print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)
    return False


def install(step, *args):
    "Run one pip install, or end with what to do."
    if not pip(step, *args):
        stop("%s could not be installed: the lines above say why; check the network and the free disk space, then run"
             " this again" % step)


def pinned(name):
    "The line of requirements.txt that pins a package."
    for line in SOURCES[0].read_text(encoding="utf-8").splitlines():
        if line.startswith(name + "=="):
            return line
    stop("requirements.txt has no line %s==...: restore it with git checkout requirements.txt" % name)


# ---------------------------------------------------------------- torch, in the right build


def has_nvidia():
    "Whether an NVIDIA driver answers on this machine."
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    return subprocess.run([tool, "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def reachable(url):
    "Whether a package index answers within ten seconds."
    try:
        with urllib.request.urlopen(url + "/torch/", timeout=10) as page:
            return page.status == 200
    except (OSError, ValueError, http.client.HTTPException):  # no network, refused, certificates, a proxy that says no
        return False


def torch_build():
    "(version, CUDA version or 'cpu') of the torch in .venv, or None when it does not import."
    code = "import torch; print(torch.__version__.split('+')[0], torch.version.cuda or 'cpu')"
    found = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return tuple(found.stdout.decode().split()) if found.returncode == 0 else None


def install_torch():
    "The CUDA build for an NVIDIA GPU, else PyTorch's CPU wheels, else whatever the plain name brings."
    want, nvidia = pinned("torch"), has_nvidia()
    have = torch_build()
    if have and have[0] == want.split("==")[1] and not (nvidia and have[1] == "cpu"):
        say("torch %s (%s) is there" % have)
        return
    again = ["--force-reinstall"] if have else []  # a CPU build satisfies the same pin as a CUDA one
    index = None
    if nvidia and os.name == "nt":
        index = CUDA_WHEELS
    elif not nvidia and sys.platform.startswith("linux"):
        index = CPU_WHEELS
    kind = "for the NVIDIA GPU" if nvidia else "for the CPU"
    if index and not reachable(index):
        say("%s does not answer: taking %s from the usual index" % (index, want))
        index = None
    done = index and pip("torch %s, from %s" % (kind, index), want, "--index-url", index, *again)
    if not done and not pip("torch %s" % kind, want, *again):
        stop("%s could not be installed: the lines above say why; see https://pytorch.org/get-started for this machine,"
             " install it with %s -m pip, and run this again" % (want, PYTHON))
    if torch_build() is None:
        subprocess.run([str(PYTHON), "-c", "import torch"])
        stop("torch is installed but does not import: the lines above say why; delete .venv and run this again")


# ---------------------------------------------------------------- the check at the end

CHECK = """
import platform, torch, bitsandbytes, transformers, trl, peft, qlora_nb
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    device = f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB (CUDA {torch.version.cuda})"
elif torch.backends.mps.is_available(): device = "Apple GPU"
else: device = f"CPU, {torch.get_num_threads()} threads"
print(f"device        {device}")
print(f"torch         {torch.__version__}")
print(f"bitsandbytes  {bitsandbytes.__version__}")
print(f"qlora_nb      {qlora_nb.__version__}, Python {platform.python_version()}")
"""


def check():
    "Import what matters from .venv and print the device it will run on."
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    found = subprocess.run([str(PYTHON), "-c", CHECK], cwd=str(VENV), env=env, stderr=subprocess.PIPE)
    if found.returncode:
        print(found.stderr.decode(errors="replace"), file=sys.stderr)
        stop("the installed packages do not import together: delete .venv and run this again")
    build = torch_build()
    if has_nvidia() and build and build[1] == "cpu":
        say("note: this machine has an NVIDIA GPU, but torch is a CPU build; see https://pytorch.org/get-started")


def main():
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    newest = max(path.stat().st_mtime for path in SOURCES)
    if STAMP.exists() and STAMP.stat().st_mtime >= newest and PYTHON.exists():
        say("%s is up to date (delete it to install anew)" % VENV)
        return
    make_venv()
    install("pip", "--upgrade", "pip", "setuptools", "wheel")
    install_torch()
    install("bitsandbytes", pinned("bitsandbytes"))
    install("the rest of requirements.txt", "-r", "requirements.txt")
    install("qlora_nb itself", "--editable", ".", "--no-deps", "--no-build-isolation")
    check()
    STAMP.write_text("made by .ci/install.py\n", encoding="utf-8")


if __name__ == "__main__":
    main()
