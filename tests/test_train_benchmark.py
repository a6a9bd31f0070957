"The benchmark of training, at a size of seconds: all see the same, what is measured is whole and kept, nobody is flattered."
import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, benchmark
from qlora_nb.config import has_cuda

SCRIPT = ROOT / "benchmarks" / "train.py"
script = benchmark("train")
FEW = ["--rows", "32", "--eval-rows", "4", "--rounds", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A small file of rows, of different lengths."
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    said = [{"instruction": f"What is {n} times {n + 1}, and why?", "output": f"It is {n * (n + 1)}" + f", as {n} says" * (n % 9)}
            for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in said))
    return ["--data", str(file)]


def measurements(out, part):
    return {(m["setting"], m["peer"]): m for m in json.loads(out.read_text())[part]["measurements"]}


def test_an_interrupt_keeps_what_a_process_measured_and_all_see_the_same(tmp_path, rows):
    out, log = tmp_path / "train.json", tmp_path / "train.log"
    command = [*FEW, *rows, "--settings", "as both come", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while not out.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    first = measurements(out, "cpu")
    assert process.returncode == 130 and "the same command goes on from there" in said
    assert list(first) == [("as both come", "plain")], log.read_text()[-3000:]

    assert script.main([*command, "--in-process"]) == 0
    part, found = json.loads(out.read_text())["cpu"], measurements(out, "cpu")
    plain, own = found["as both come", "plain"], found["as both come", "ours"]
    assert plain == first["as both come", "plain"]
    for key in ("answer_tokens", "tokens", "steps", "adapter_parameters", "four_bit_layers"):
        assert plain[key] == own[key] > 0, key
    assert plain["answer_tokens"] == part["job"]["answer_tokens"] and plain["steps"] == len(plain["losses"]) == 2
    for m in (plain, own): assert m["micro_batch"] * m["grad_accum"] == 16
    assert plain["checkpointing"] and abs(plain["heldout_loss"] / own["heldout_loss"] - 1) < 0.1
    if sys.platform == "linux": assert plain["ram_growth_bytes"] > 0
    ratio = part["summary"]["as both come"]["ratio"]["plain"]
    assert ratio["rounds"] == [round(own["answer_tokens_per_s"] / plain["answer_tokens_per_s"], 3)]
    assert {"cpu", "cores", "torch", "trl"} <= set(part["machine"])
    before = out.read_bytes()
    assert script.main([*command, "--in-process", "--eval-rows", "3"]) == 2 and out.read_bytes() == before


def test_packed_and_the_time_limit(tmp_path, rows, capsys):
    out = tmp_path / "train.json"
    command = [*FEW, *rows, "--in-process", "--settings", "packed", "--out", str(out)]
    assert script.main([*command, "--time-limit", "0.001"]) == 1 and not out.exists()
    assert "stopped by the time limit" in capsys.readouterr().out
    assert script.main(command) == 0, capsys.readouterr().out
    found, facts = measurements(out, "cpu"), json.loads(out.read_text())["cpu"]["job"]
    for m in found.values():
        assert facts["answer_tokens"] <= m["answer_tokens"] <= 1.1 * facts["answer_tokens"] and m["padding"] < 0.1
        assert m["padding"] == pytest.approx(1 - m["tokens"] / m["computed_tokens"], abs=1e-3)


def test_a_process_says_why_it_failed(tmp_path):
    job, answer = tmp_path / "job.json", tmp_path / "answer.json"
    job.write_text(json.dumps({"peer": "ours", "device": "cpu", "vram_gb": None, "pad_token_id": 3, "seed": 1,
                               "overrides": ["model=tiny", "train.lr=-1"]}))
    assert script.main(["--child", str(job), str(answer)]) == 0
    assert json.loads(answer.read_text())["error"].startswith("InputError: train.lr=-1")
    job.write_text(job.read_text().replace("ours", "litgpt").replace("overrides", "quant"))
    script.train_peers.main(job, answer)
    assert "on a GPU only" in json.loads(answer.read_text())["cannot_run"]


@pytest.mark.skipif(has_cuda(), reason="what is rehearsed here runs there")
def test_the_part_for_a_gpu_is_rehearsed(tmp_path, capsys):
    out = tmp_path / "train.json"
    command = ["--gpu", "--device", "cpu", "--tiny", "--in-process", "--max-length", "64", "--out", str(out),
               "--settings", "1x64 as each comes;2x64 offload;1x64 fused kernels"]
    assert script.main(command) == 1
    said, found = capsys.readouterr().out, measurements(out, "gpu")
    assert json.loads(out.read_text())["gpu"]["job"]["tokens"] == 8 * 64
    for peer in ("plain", "ours"):
        m = found["1x64 as each comes", peer]
        assert m["status"] == "ok" and m["steps"] == len(m["grad_norms"]) == 8 and min(m["grad_norms"]) > 0, m
        assert sum(m["losses"][-2:]) < sum(m["losses"][:2]) and m["four_bit_layers"] == 14
    assert found["1x64 as each comes", "unsloth"]["cannot_run"] == "Unsloth needs a GPU"
    assert "offloading" in found["2x64 offload", "ours"]["error"] and "| 2x64 offload | ours | InputError: " in said
    fused = {peer: m.get("cannot_run", "") for (setting, peer), m in found.items() if "fused" in setting}
    if importlib.util.find_spec("liger_kernel") is None: assert fused.keys() == {"plain", "ours"} and all("liger" in why for why in fused.values())


def made_up(peer, n, speed):
    return {"setting": "as both come", "peer": peer, "round": n, "status": "ok", "answer_tokens_per_s": speed, "padding": 0.1,
            "losses": [2.0, 1.0], "heldout_loss": 1.0, "ram_growth_bytes": 10**8, "cpu_seconds": 1.0}


@pytest.mark.parametrize("speeds, said", [
    ([300, 300, 240], ["Ours is nowhere slower, in no round.", "As both come: 3.00 times", "; the aim is 2.5, met."]),
    ([90, 90, 200], ["SLOWER than plain, as both come: 0.90 times its answer tokens/s.", "NOT met"]),
    ([150, 90, 200], ["slower than plain in a round, as both come: 0.90 times at the least.", "1.50 times", "NOT met"])])
def test_being_slower_is_said_plainly(speeds, said):
    rounds = [m for n, speed in enumerate(speeds) for m in (made_up("plain", n, 100), made_up("ours", n, speed))]
    text = script.report({"summary": script.summary(rounds)})
    assert all(words in text for words in said), text
    assert ("nowhere slower" in text) == (min(speeds) >= 100)


def test_a_loss_that_does_not_fall_is_a_failure():
    job, good = {"strict": True, "norms": True}, {"losses": [3.0, 2.0, 2.0, 1.0], "grad_norms": [1.0]}
    wrong = lambda **changes: script.train_peers.wrong(good | changes, job)
    assert wrong() is None
    assert "did not fall" in wrong(losses=[1.0, 2.0, 2.0, 3.0]) and "not finite" in wrong(losses=[1.0, float("nan")])
    assert "gradient norms" in wrong(grad_norms=[0.0]) and "gradient norms" in wrong(grad_norms=[])


def test_bad_input_is_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.json")]
    cases = [(["--peers", "axolotl"], "no such peer"), (["--rows", "3"], "--rows 3"), (["--tiny"], "--tiny goes with --gpu"),
             (["--in-process"], "give --out"), (["--data", "none.jsonl", *out], "no such file"),
             (["--list", "--settings", "xyz"], "'xyz'"),
             (["--peer-python", "litgpt=/bin/sh", *out], "add --peers litgpt"),
             (["--gpu", "--device", "cpu", *out], "add --tiny"),
             (["--report", *out], "x.json is missing")]
    for argv, said in cases:
        assert script.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
