"""A training process that tells its phase, so that it can be killed at an instant of one's choice.

`python kill_driver.py BOARD train --run DIR …` is `qlora train --run DIR …`; `python kill_driver.py BOARD serve`
imports everything once and then forks a `qlora` for each line of JSON on its standard input. The phase stands on the
board, a file that both sides map into their memory, so it can still be read when the process is dead. The package itself
knows nothing of this: its functions are wrapped from outside.
"""
import contextlib
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

PHASES = ["imports", "setup", "step", "between steps", "evaluation", "begin", "model", "optimizer", "random state",
          "finish", "manifest", "sync", "rename", "rotate", "delete", "end"]
WRITING = set(PHASES[PHASES.index("begin"):PHASES.index("delete") + 1])  # inside checkpoint writing


class Board:
    "What a training process is doing: phase, steps begun, length of a step and of a saving; and where it shall wait."
    FORMAT = "BBBxIdd"

    def __init__(self, path):
        path.touch()
        os.truncate(path, 4096)
        self.file = open(path, "r+b")
        self.memory = mmap.mmap(self.file.fileno(), 4096)

    def get(self):
        names = "phase", "wait_at", "waits", "steps", "step_s", "saving_s"
        return dict(zip(names, struct.unpack_from(self.FORMAT, self.memory)))

    def set(self, **new): struct.pack_into(self.FORMAT, self.memory, 0, *(self.get() | new).values())
    @property
    def phase(self): return PHASES[self.get()["phase"]]

    def enter(self, phase):
        number = PHASES.index(phase)
        self.set(phase=number)
        if number and self.get()["wait_at"] == number:
            self.set(waits=1)
            time.sleep(600)  # the kill comes


# The training process

@contextlib.contextmanager
def inside(board, phase):
    before = board.phase
    board.enter(phase)
    try: yield
    finally: board.set(phase=PHASES.index(before))


def wrap(owner, name, board, phase, when=lambda *args: True):
    "Have a function tell that it runs."
    real = getattr(owner, name)

    def told(*args, **kw):
        with inside(board, phase) if when(*args) else contextlib.nullcontext(): return real(*args, **kw)
    setattr(owner, name, told)


def watch(board):
    "Wrap what trains and what saves."
    from transformers.trainer_callback import CallbackHandler
    from qlora_nb import checkpoint
    from qlora_nb.checkpoint import ResumableTrainer
    from qlora_nb.trainer import Trainer
    for name, phase in (("_begin", "begin"), ("save_model", "model"), ("_save_optimizer_and_scheduler", "optimizer"),
                        ("_save_rng_state", "random state"), ("_finish", "finish"), ("_load_best_model", "end")):
        wrap(ResumableTrainer, name, board, phase)
    wrap(Trainer, "evaluate", board, "evaluation")
    for name, phase in (("write_manifest", "manifest"), ("sync_tree", "sync"), ("rotate", "rotate")):
        wrap(checkpoint, name, board, phase)
    wrap(os, "replace", board, "rename", lambda source, target: board.phase == "finish")
    wrap(shutil, "rmtree", board, "delete", lambda *args: board.phase == "rotate")
    watch_steps(board, CallbackHandler)
    watch_saving(board, ResumableTrainer)


def watch_steps(board, handler):
    "A step is what lies between the callbacks' on_step_begin and on_step_end."
    begin, end, began = handler.on_step_begin, handler.on_step_end, [0.0]

    def on_step_begin(*args, **kw):
        done = begin(*args, **kw)
        began[0] = time.monotonic()
        board.set(steps=board.get()["steps"] + 1)
        board.enter("step")
        return done

    def on_step_end(*args, **kw):
        board.set(step_s=time.monotonic() - began[0])
        board.enter("between steps")
        return end(*args, **kw)

    handler.on_step_begin, handler.on_step_end = on_step_begin, on_step_end


def watch_saving(board, trainer):
    "How long a saving takes."
    save = trainer._save_checkpoint

    def timed(*args, **kw):
        start = time.monotonic()
        save(*args, **kw)
        board.set(saving_s=time.monotonic() - start)
    trainer._save_checkpoint = timed


def train(board, arguments):
    "One `qlora`, as a user starts it."
    from qlora_nb.cli import main
    watch(board)
    board.set(steps=0)
    board.enter("setup")
    sys.argv = ["qlora", *arguments]
    main()


def serve(board):
    "Import everything, then fork a `qlora` for every line."
    import bitsandbytes, datasets, peft, torch.utils.tensorboard, trl  # noqa: E401, F401
    import qlora_nb.checkpoint, qlora_nb.cli, qlora_nb.model, qlora_nb.monitor, qlora_nb.train  # noqa: E401, F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    for line in sys.stdin:
        job = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        code = 1
        try: train(board, job["arguments"]); code = 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


# The test's side

class Started:
    "A started training: its pid, its board, what it printed and how it ended."
    def __init__(self, pid, board, log, wait):
        self.pid, self.board, self.log, self._wait, self._code = pid, board, log, wait, None

    def ended(self, timeout=0.0):
        "The exit code, or None while it runs."
        if self._code is None: self._code = self._wait(timeout)
        return self._code

    def until(self, condition, seconds=120):
        "Wait for something on the board or on the disk; False if the process ended before."
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ended() is not None: return False
            assert time.monotonic() < deadline, self.output
            time.sleep(0.001)
        return True

    def signal(self, number): os.kill(self.pid, number)
    @property
    def output(self): return Path(self.log).read_text()


class Starter:
    "Starts trainings: forked from one process that has imported everything, or as processes of their own."
    def __init__(self, folder, forked=True):
        self.folder, self.board, self.forked, self.started = Path(folder), Board(Path(folder) / "board"), forked, 0
        self.environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a fork and CUDA do not go together
        if forked: self.server = self._popen("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _popen(self, *arguments, **kw):
        command = [sys.executable, __file__, str(self.folder / "board"), *arguments]
        return subprocess.Popen(command, env=self.environment, **kw)

    def start(self, *arguments, wait_at=None):
        self.started += 1
        log = self.folder / f"log-{self.started}"
        log.touch()
        self.board.set(phase=0, wait_at=PHASES.index(wait_at) if wait_at else 0, waits=0, steps=0)
        if not self.forked:
            process = self._popen(*map(str, arguments), stdout=open(log, "w"), stderr=subprocess.STDOUT)
            return Started(process.pid, self.board, log, lambda timeout: _waited(process, timeout))
        self.server.stdin.write(json.dumps(dict(arguments=list(map(str, arguments)), log=str(log))) + "\n")
        self.server.stdin.flush()
        return Started(int(self.server.stdout.readline()), self.board, log, self._exit_code)

    def _exit_code(self, timeout):
        import select
        return int(self.server.stdout.readline()) if select.select([self.server.stdout], [], [], timeout)[0] else None

    def run(self, *arguments):
        "Start and wait for the end."
        started = self.start(*arguments)
        assert started.ended(300) is not None, started.output
        return started

    def stop(self):
        if not self.forked: return
        self.server.stdin.close()
        try: self.server.wait(60)
        except subprocess.TimeoutExpired: self.server.kill()


def _waited(process, timeout):
    try: return process.wait(timeout or 0.0001)
    except subprocess.TimeoutExpired: return None


if __name__ == "__main__":
    board = Board(Path(sys.argv[1]))
    board.set(phase=0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(board) if sys.argv[2] == "serve" else train(board, sys.argv[2:])
