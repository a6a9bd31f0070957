"The same training however it is cut up: by accumulation, over processes, under a memory limit, with or without an audience."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import qlora
from safetensors.torch import load_file

# float32 without dropout, so that only the order of additions may differ
EXACT = ["model=tiny", "model.quant=none", "model.compute_dtype=fp32", "data=pydoc", "data.max_length=64", "data.eval_fraction=0.01",
         "train.lora.dropout=0", "train.effective_batch=8", "train.max_steps=8", "train.eval_steps=4", "train.save_steps=4",
         "train.log_steps=1", "train.samples=0"]


def train(folder, *settings, options=(), says="trained 8 steps"):
    done = qlora("train", "--run", folder, *options, *EXACT, *settings)
    assert done.returncode == 0 and says in done.stdout, done.stderr + done.stdout
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(metrics, key="loss"):
    return {m["step"]: m[key] for m in metrics if key in m}


def furthest(one, other):
    assert one.keys() == other.keys() and len(one) > 0
    return max(abs(one[step] - other[step]) for step in one)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    "The run in which eight samples go through the model together."
    return train(tmp_path_factory.mktemp("at_once") / "run", "train.micro_batch=8", "train.grad_accum=1")


def test_eight_at_once_or_one_by_one(at_once, tmp_path):
    metrics = train(tmp_path / "run", "train.micro_batch=1", "train.grad_accum=8")
    assert furthest(curve(at_once), curve(metrics)) < 1e-5
    assert furthest(curve(at_once, "eval_loss"), curve(metrics, "eval_loss")) < 1e-5


def test_two_processes(at_once, tmp_path):
    metrics = train(tmp_path / "run", "train.micro_batch=4", "train.grad_accum=1", options=("--nproc", "2"))
    assert furthest(curve(at_once), curve(metrics)) < 1e-5
    assert furthest(curve(at_once, "eval_loss"), curve(metrics, "eval_loss")) < 1e-5
    assert json.loads((tmp_path / "run" / "budget.json").read_text())["chosen"]["processes"] == 2
    adapter = tmp_path / "run" / "final_adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    for gone in (adapter.parent, tmp_path / "run" / "checkpoints" / "checkpoint-8"): shutil.rmtree(gone)
    (tmp_path / "run" / "train.json").unlink()
    train(tmp_path / "run", "train.micro_batch=4", "train.grad_accum=1", options=("--nproc", "2"), says="checkpoint-4\n")
    assert adapter.read_bytes() == whole


def test_sizes_that_cannot_make_up_the_effective_batch_are_refused(tmp_path):
    done = qlora("train", "--nproc", "3", "--run", tmp_path / "run", *EXACT)
    assert done.returncode == 2 and "cannot be made up with 3 processes; set train.effective_batch=6 or 9" in done.stderr


def test_bad_input_to_several_processes_is_one_line(tmp_path):
    done = qlora("train", "--nproc", "2", "--run", tmp_path / "run", "model=tiny", "data.path=nothing.csv")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "there is no file nothing.csv" in done.stderr


def test_questions_asked_meanwhile_change_nothing(tmp_path):
    adapters = []
    for samples in (0, 3):
        folder = tmp_path / f"samples{samples}"
        train(folder, "train.micro_batch=8", "train.grad_accum=1", f"train.samples={samples}", "train.lora.dropout=0.1")
        adapters.append((folder / "final_adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert (tmp_path / "samples3" / "samples.jsonl").exists()


# Have the C library give freed blocks back, so that the address space that counts is the memory in use.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
LIMITED = """
import json, resource, sys
from qlora_nb import train
from qlora_nb.cli import main

def room():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024

built = train.make_trainer
def limited(*args, **kw):
    trainer = built(*args, **kw)
    resource.setrlimit(resource.RLIMIT_AS, (room() + int({extra}), resource.RLIM_INFINITY))
    train.make_trainer = built
    return trainer
train.make_trainer = limited
main()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a limit on the address space is set from /proc")
def test_out_of_memory_halves_the_micro_batch(tmp_path):
    rows = [{"question": f"Tell me about {n}.", "answer": " ".join(f"It is {n + k}." for k in range(150))} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    folder = tmp_path / "run"
    settings = ["model=tiny", f"data.path={tmp_path / 'rows.jsonl'}", "data.max_length=1024", "train.max_steps=4", "train.eval_steps=2",
                "train.save_steps=2", "train.log_steps=1", "data.near_duplicates=off", "train.effective_batch=16", "train.micro_batch=16", "train.grad_accum=1"]
    (tmp_path / "limited.py").write_text(LIMITED.format(extra=700e6))
    done = subprocess.run([sys.executable, tmp_path / "limited.py", "train", "--force", "--run", folder, *settings],
                          capture_output=True, text=True, timeout=300, env={**os.environ, **GIVES_BACK})
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert "out of memory with micro-batch 16: going on with train.micro_batch=8" in done.stdout, done.stdout
    chosen = json.loads((folder / "budget.json").read_text())["chosen"]
    assert chosen["micro_batch"] < 16 and chosen["micro_batch"] * chosen["grad_accum"] == 16
    assert json.loads((folder / "train.json").read_text())["steps"] == 4
    assert load_file(folder / "final_adapter" / "adapter_model.safetensors")


def test_fsdp_on_a_cpu_is_refused(tmp_path):
    done = qlora("train", "--run", tmp_path / "run", *EXACT, env={"ACCELERATE_USE_FSDP": "true"})
    assert done.returncode == 2 and "FSDP shares a model out among GPUs" in done.stderr


def test_a_loss_that_explodes_ends_the_run_in_one_line(tmp_path):
    settings = ["train.lr=1", "train.scheduler=constant", "train.max_steps=40", "train.eval_steps=100", "train.save_steps=100"]
    done = qlora("train", "--run", tmp_path / "run", *EXACT, *settings)
    lines = [line for line in done.stderr.splitlines() if line.startswith("qlora: ")]
    assert done.returncode == 1 and len(lines) == 1 and "the loss" in lines[0] and "Try, in another folder, train.lr=" in lines[0]
    assert not (tmp_path / "run" / "final_adapter").exists()
