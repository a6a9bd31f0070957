"A training process that is killed, interrupted, or left without its disk goes on, and ends where it would have ended."
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from kill_driver import PHASES, WRITING, Starter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and fork")
SETTINGS = ["model=tiny", "train.micro_batch=2", "train.grad_accum=2", "train.eval_steps=4", "train.save_steps=4",
            "train.log_steps=2", "train.keep_checkpoints=2", "train.lora.dropout=0.1", "train.max_steps=16",
            "train.samples=1", "train.sample_tokens=8", "data.max_length=96"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A small data set of short rows: its epoch is 14 steps of four, so 16 steps end within the second."
    words = "apple bread cloud drum eagle flute grape house iron jam kite lemon moon nest oak pear".split()
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    some = random.Random(3).choices
    rows = [dict(instruction=" ".join([str(i), *some(words, k=2 + i % 5)]), output=" ".join(some(words, k=3)))
            for i in range(62)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    starter = Starter(tmp_path_factory.mktemp("starter"))
    yield starter
    starter.stop()


def command(folder, rows, *more): return ["train", "--run", folder, f"data.path={rows}", *SETTINGS, *more]
def adapter(folder): return (folder / "final_adapter" / "adapter_model.safetensors").read_bytes()


def finish(starter, arguments, says="going on from"):
    "Give the command again and let it end."
    done = starter.run(*arguments)
    assert done.ended() == 0 and says in done.output, done.output
    return done.output


def complaint(output):
    "The one line for people that a failed run ends with."
    lines = [line for line in output.splitlines() if line.startswith("qlora: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


@pytest.fixture(scope="module")
def whole(starter, rows, tmp_path_factory):
    "The adapter of an uninterrupted run."
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = starter.run(*command(folder, rows))
    assert done.ended() == 0, done.output
    return adapter(folder)


# Killed

def kill(starter, arguments, where, chosen, earliest=2):
    "Start, kill at an instant of the wanted kind, and say in which phase that was; None if the training ended before."
    waits = where in PHASES and where != "step"
    at, board = starter.start(*arguments, wait_at=where if waits else None), starter.board
    steps, moment = chosen.randint(earliest, earliest + 3), chosen.random()  # the first tells a step's length
    if waits: there = at.until(lambda: board.get()["waits"])
    else: there = at.until(lambda: board.get()["steps"] >= steps and board.phase == "step")
    if where == "step": time.sleep(moment * 0.8 * board.get()["step_s"])
    if where == "any moment of writing":
        there = at.until(lambda: board.phase in WRITING)
        time.sleep(moment * max(board.get()["saving_s"], 0.01))
    if not there or at.ended() is not None: return None
    at.signal(signal.SIGKILL)
    assert at.ended(30) == -signal.SIGKILL, at.output
    return board.phase


def killed_and_resumed(starter, arguments, wanted, seed, earliest=2):
    "Kill a run again and again, let it end, and count the phases in which it was killed."
    chosen, fell = random.Random(seed), []
    for where in wanted:
        fell.append(kill(starter, arguments, where, chosen, earliest))
        assert fell[-1], f"the run ended after {fell} and before {where}"
    finish(starter, arguments)
    return Counter("writing" if phase in WRITING else phase for phase in fell)


def test_three_kills_change_nothing(starter, rows, whole, tmp_path):
    arguments = command(tmp_path / "run", rows)
    counts = killed_and_resumed(starter, arguments, ["step", "rename", "step"], seed=5, earliest=5)
    assert counts == dict(writing=1, step=2)
    assert adapter(tmp_path / "run") == whole


@pytest.mark.slow
def test_twenty_kills_change_nothing(rows, tmp_path):
    "Each start is a process of its own, and does its imports; the moments are spread over everything that writes."
    starter, arguments = Starter(tmp_path, forked=False), command(tmp_path / "run", rows, "train.max_steps=64")
    wanted = ["model", "random state", "manifest", "rename", "rotate", "delete", *["any moment of writing"] * 2,
              "evaluation", *["step"] * 11]
    random.Random(20).shuffle(wanted)
    counts = killed_and_resumed(starter, arguments, wanted, seed=20)
    print(counts)
    assert counts.total() == 20 and counts["writing"] >= 5 and counts["step"] >= 10 and not counts["imports"]
    assert kill(starter, command(tmp_path / "whole", rows, "train.max_steps=64"), "end", random.Random(0)) == "end"
    finish(starter, command(tmp_path / "whole", rows, "train.max_steps=64"))  # from the last step's checkpoint
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


# Asked to stop

@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_the_same_run(starter, rows, whole, tmp_path, number):
    at = starter.start(*command(tmp_path / "run", rows))
    assert at.until(lambda: starter.board.get()["steps"] >= 6 and starter.board.phase == "step")
    at.signal(number)
    assert at.ended(60) == 130 and not (tmp_path / "run" / "final_adapter").exists()
    step = max(int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert step >= 6  # the steps since the last checkpoint were saved
    finish(starter, command(tmp_path / "run", rows), f"checkpoint-{step}")
    assert adapter(tmp_path / "run") == whole


# Damaged

class Payload:
    "A pickle of it creates a file when it is loaded."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def poisoned(checkpoint, mark):
    "An optimizer.pt that runs code when unpickled, and a manifest that agrees with it."
    import hashlib, pickle  # noqa: E401
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = pickle.dumps({"state": Payload(mark)})
    (checkpoint / "optimizer.pt").write_bytes(content)
    manifest["files"]["optimizer.pt"] = dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_checkpoints_are_never_loaded(starter, rows, whole, tmp_path):
    arguments, folder = command(tmp_path / "run", rows), tmp_path / "run" / "checkpoints"
    at = starter.start(*arguments)
    assert at.until(lambda: (folder / "checkpoint-8").exists())
    at.signal(signal.SIGKILL)
    assert at.ended(30) == -signal.SIGKILL
    shutil.rmtree(folder / "checkpoint-12", ignore_errors=True)
    poisoned(folder / "checkpoint-8", tmp_path / "executed")
    shutil.copytree(folder / "checkpoint-4", tmp_path / "backup")
    with open(folder / "checkpoint-4" / "adapter_model.safetensors", "r+b") as f: f.seek(-1, 2); f.write(b"\xff")
    failed = starter.run(*arguments)
    line = complaint(failed.output)
    assert failed.ended() == 1 and f"delete {folder}" in line
    assert "checkpoint-8 is damaged (optimizer.pt holds more than tensors)" in line
    assert "checkpoint-4 is damaged (adapter_model.safetensors is not what was written)" in line
    shutil.rmtree(folder / "checkpoint-4")
    shutil.move(tmp_path / "backup", folder / "checkpoint-4")
    finish(starter, arguments, "set aside as checkpoint-8.damaged; using checkpoint-4")
    assert not (tmp_path / "executed").exists()
    assert adapter(tmp_path / "run") == whole


# Without a disk

def after_first_checkpoint(starter, arguments, folder):
    "A run that has saved once and is in a step."
    at = starter.start(*arguments)
    assert at.until(lambda: (folder / "checkpoints" / "checkpoint-4").exists() and starter.board.phase == "step")
    return at


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_no_room_for_a_file(starter, rows, whole, tmp_path):
    import resource
    arguments, folder = command(tmp_path / "run", rows), tmp_path / "run" / "checkpoints"
    at = after_first_checkpoint(starter, arguments, tmp_path / "run")
    resource.prlimit(at.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))  # less than optimizer.pt
    assert at.ended(60) == 1, at.output
    line = complaint(at.output)
    assert re.search(r"checkpoint-8 could not be written \(file too large, [\d.]+ MB needed and [\d.,]+ MB free\)", line)
    assert "checkpoint-4 is good: make room, and the same command goes on from there" in line
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-4"]
    finish(starter, arguments)
    assert adapter(tmp_path / "run") == whole


def test_the_folder_goes_away_and_comes_back(starter, rows, whole, tmp_path):
    arguments, folder = command(tmp_path / "run", rows), tmp_path / "run" / "checkpoints"
    at = after_first_checkpoint(starter, arguments, tmp_path / "run")
    folder.rename(tmp_path / "elsewhere")
    assert at.ended(60) == 1 and not folder.exists(), at.output
    line = complaint(at.output)
    assert "could not be written (no such file or directory" in line and "bring its disk or folder back" in line
    shutil.move(tmp_path / "elsewhere", folder)
    finish(starter, arguments)
    assert adapter(tmp_path / "run") == whole


def private_mounts():
    "Whether this user may mount something in a name space of their own."
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not private_mounts(), reason="unshare -rm mount is not permitted here")
@pytest.mark.parametrize("trouble, cause", [("", "no space left on device"), ("remount,ro", "read-only file system")])
def test_a_real_disk_fills_up(rows, whole, tmp_path, trouble, cause):
    "A disk of a few MB in memory; what it holds is gone with the name space, so the adapter is copied out."
    (tmp_path / "disk").mkdir()
    qlora = " ".join(map(str, [Path(sys.executable).with_name("qlora"), *command(tmp_path / "disk" / "run", rows)]))
    watch = f"until [ -e disk/run/checkpoints/checkpoint-4 ]; do sleep 0.05; done; sleep 0.2; mount -o {trouble} disk"
    script = f"""cd {tmp_path}; mount -t tmpfs -o size={"100m" if trouble else "8m"} none disk
        {f"({watch}) &" if trouble else ""}
        {qlora} > first.log 2>&1; echo $? > code; ls -A disk/run/checkpoints > left
        mount -o remount,rw,size=100m disk; {qlora} > second.log 2>&1; cp -r disk/run/final_adapter ."""
    subprocess.run(["unshare", "-rm", "sh", "-c", script], timeout=300)
    line = complaint((tmp_path / "first.log").read_text())
    assert (tmp_path / "code").read_text() == "1\n" and cause in line and "is good: make" in line
    good = line.split(" is good")[0].split()[-1]
    left = (tmp_path / "left").read_text().split()
    assert good in left and (trouble or ".saving" not in left)
    assert good in (tmp_path / "second.log").read_text()
    assert adapter(tmp_path) == whole
