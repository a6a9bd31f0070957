"A training process that is killed goes on, and ends where it would have ended."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import qlora

SETTINGS = ["model=tiny", "data=pydoc", "train.max_steps=16", "train.micro_batch=4", "train.eval_steps=4", "train.save_steps=4",
            "train.log_steps=2", "data.eval_fraction=0.01", "data.max_length=96"]


def start(folder, **env):
    command = [str(Path(sys.executable).with_name("qlora")), "train", "--run", str(folder), *SETTINGS]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_after(process, path, number):
    "Send a signal once `path` exists; what was printed."
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=100)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The adapter of an uninterrupted run."
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = qlora("train", "--run", folder, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return (folder / "final_adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_and_resumed_is_the_same_run(whole, tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(folder)
    stop_after(process, folder / "checkpoints" / "checkpoint-8", number)
    assert process.returncode == code
    assert not (folder / "final_adapter").exists()
    again = qlora("train", "--run", folder, *SETTINGS)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert (folder / "final_adapter" / "adapter_model.safetensors").read_bytes() == whole
