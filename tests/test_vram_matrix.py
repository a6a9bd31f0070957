"The GPU benchmark, rehearsed on small models: what it measures is whole, is kept, and one failure stops nothing."
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, benchmark
from qlora_nb.config import has_cuda
from qlora_nb.vram_budget import Overhead

SCRIPT = ROOT / "benchmarks" / "vram_matrix.py"
MIXED = ["--configs", "mistral-7b 2x64;mistral-7b 1x64 offloading;gemma-7b 2x64 no checkpointing;phi-3-mini merge"]
script = benchmark("vram_matrix")


def matrix(*args, timeout=300):
    "Run the benchmark to its end, as a user would."
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=timeout)


def results(out):
    return json.loads(out.read_text())["results"] if out.exists() else {}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    "A rehearsal, stopped after one result and then finished: file, both runs, first result, processes left over."
    out = tmp_path_factory.mktemp("matrix") / "matrix.json"
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--tiny", *MIXED, "--out", str(out)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while not results(out):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    first = results(out)
    again = matrix("--tiny", "--in-process", *MIXED, "--out", out)
    return out, (process.returncode, said), again, first, [c for c in children if c.is_running()]


def test_interrupt_keeps_what_is_measured(rehearsal):
    _, (code, said), _, first, left = rehearsal
    assert code == 130 and "the same command goes on from there" in said
    assert list(first) == ["mistral-7b 2x64"] and first["mistral-7b 2x64"]["status"] == "ok"
    assert not left


def test_second_run_does_the_rest(rehearsal):
    out, _, again, first, _ = rehearsal
    found = results(out)
    assert "4 configurations, 1 of them measured already" in again.stdout, again.stderr
    assert found["mistral-7b 2x64"]["measured_at"] == first["mistral-7b 2x64"]["measured_at"]
    assert list(found) == ["mistral-7b 2x64", "gemma-7b 2x64 no checkpointing", "mistral-7b 1x64 offloading",
                           "phi-3-mini merge"]


def test_each_result_is_whole(rehearsal):
    out = rehearsal[0]
    file = json.loads(out.read_text())
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "gpu", "cuda", "cpu"} <= set(file["machine"])
    for name, r in file["results"].items():
        if r["status"] == "failed": continue
        assert r["measured"]["process_peak_bytes"] > 0 and r["predicted"]["process_bytes"] > 0, name
        assert r["error_percent"]["process"] is not None and r["seconds"] > 0, name
        if r["kind"] == "training":
            assert len(r["step_seconds"]) == script.STEPS and r["tokens_per_s"] > 0 and r["loss"] > 0, name
        if not has_cuda(): assert r["measured"]["allocated_peak_bytes"] is r["measured"]["reserved_peak_bytes"] is None


@pytest.mark.skipif(has_cuda(), reason="offloading works on a GPU")
def test_a_failure_is_recorded_and_stops_nothing(rehearsal):
    out, _, again, _, _ = rehearsal
    failed = results(out)["mistral-7b 1x64 offloading"]
    assert failed["status"] == "failed" and "offloading moves activations from a GPU" in failed["error"]
    assert failed["predicted"] is None and again.returncode == 1
    assert results(out)["phi-3-mini merge"]["status"] == "ok"
    summary = json.loads(out.read_text())["summary"]
    assert (summary["ok"], summary["failed"]) == (3, 1)


def test_third_run_measures_nothing(rehearsal):
    out = rehearsal[0]
    before = out.read_bytes()
    done = matrix("--tiny", *MIXED, "--out", out)
    assert "4 configurations, 4 of them measured already" in done.stdout and out.read_bytes() == before
    assert all(f"| {name} |" in done.stdout for name in results(out))


def test_results_of_another_machine_are_left_alone(rehearsal, tmp_path):
    file = json.loads(rehearsal[0].read_text())
    file["machine"]["torch"] = "0.0.1"
    out = tmp_path / "other.json"
    out.write_text(json.dumps(file))
    before, done = out.read_bytes(), matrix("--tiny", "--out", out)
    assert done.returncode == 2 and "torch=0.0.1 there" in done.stderr and done.stderr.count("\n") == 1
    assert out.read_bytes() == before


def test_one_that_takes_too_long_is_stopped(tmp_path):
    out = tmp_path / "late.json"
    done = matrix("--tiny", "--out", out, "--configs", "gemma-7b 2x64 no checkpointing", "--timeout", "1")
    assert done.returncode == 1
    assert results(out)["gemma-7b 2x64 no checkpointing"]["error"] == "took longer than 1 s"
    assert matrix("--tiny", "--out", tmp_path / "none.json", "--time-limit", "0.5").returncode == 1
    assert not (tmp_path / "none.json").exists()


def test_bad_input_is_one_line(tmp_path):
    cases = [(["--configs", "mixtral"], "'mixtral' in its name"), (["--tiny"], "give --out"),
             (["--in-process"], "add --tiny"), (["--report", "--out", tmp_path / "no.json"], "no.json is missing")]
    for args, said in cases:
        done = matrix(*args)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(has_cuda(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = matrix("--out", tmp_path / "x.json")
    assert done.returncode == 2 and "no NVIDIA GPU answers" in done.stderr and not list(tmp_path.iterdir())


def on_a_gpu(c):
    "The settings of a configuration as a GPU with bf16 completes them."
    return c.settings | {"device": "cuda", "compute_bytes": 2, "lora_bytes": 2, "autocast": c.kind == "training"}


def test_the_matrix_covers_what_it_should():
    configs = script.real_matrix()
    trained = [c for c in configs if c.kind == "training"]
    assert len(configs) == len({c.name for c in configs}) and len(trained) >= 24
    for model in script.TRAINING:
        mine = [c.settings for c in trained if c.model == model]
        assert {s["seq_len"] for s in mine} == {512, 1024, 2048} and {s["micro_batch"] for s in mine} == {1, 2}
        assert {c.settings["batch"] for c in configs if c.kind == "generation" and c.model == model} == {1, 8}
    for c in configs: assert script.predicted(c.model, c.kind, on_a_gpu(c), False).peak_bytes > 10**9, c.name


@pytest.mark.parametrize("paged_counted", [True, False])
def test_one_constant_for_context_is_found(paged_counted):
    "Figures made by the formula, with a context of 612 MB: calibration finds it and no error is left."
    truth, found = Overhead(612_000_000, script.OVERHEAD["cuda"].fragments), {"machine": {"tiny": False}, "results": {}}
    for c in script.real_matrix():
        if c.kind == "merge": continue
        b = script.predicted(c.model, c.kind, on_a_gpu(c), False, truth)
        paged = b.pageable_bytes
        measured = {"allocated_peak_bytes": b.active_bytes - paged, "process_source": "made up",
                    "reserved_peak_bytes": b.peak_bytes - truth.context_bytes - paged,
                    "process_peak_bytes": b.peak_bytes - (0 if paged_counted else paged)}
        found["results"][c.name] = {"model": c.model, "kind": c.kind, "status": "ok", "settings": on_a_gpu(c),
                                    "measured": measured}
    s = script.with_predictions(found)["summary"]
    assert s["context_bytes"] == truth.context_bytes and s["paged_state_in_process"] is paged_counted
    assert s["process_error_percent"]["worst"] == s["allocated_error_percent"]["worst"] == 0
    assert "context: 584 MiB" in script.report(script.with_predictions(found))
