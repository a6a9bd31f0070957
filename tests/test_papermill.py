"The training notebook as a batch job: papermill from the shell, with parameters of one's own."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"{n} plus {n} is {2 * n}."} for n in range(60)]


def papermill(out, *args, cwd):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "20_train.ipynb"), str(out), "-k", "python3", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_own_data_and_settings(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "my.yaml").write_text("model: tiny\ndata: {path: rows.jsonl, max_length: 64}\n"
                                      "train: {max_steps: 4, effective_batch: 4, eval_steps: 2, save_steps: 2, log_steps: 1}\n")
    done = papermill("out.ipynb", "-p", "run_dir", "run", "-p", "config", "my.yaml", "-y", "overrides: [train.lora.r=4]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    assert json.loads((run / "final_adapter" / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((run / "train.json").read_text())["steps"] == 4
    report = json.loads((run / "data" / "report.json").read_text())
    assert report["counts"]["records"] == 60 and report["counts"]["kept"] == 60
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_failure_is_in_the_notebook(tmp_path):
    done = papermill("out.ipynb", "-p", "run_dir", "run", "-y", "overrides: [data.path=nothing.csv]", cwd=tmp_path)
    assert done.returncode != 0
    assert "there is no file nothing.csv" in (tmp_path / "out.ipynb").read_text()
    assert not Path(tmp_path, "run", "config.yaml").exists()


def test_ctrl_c_in_the_pipeline_saves_first(tmp_path):
    "`qlora run` trains in a notebook's kernel: the signal has to reach it, and the same command goes on."
    settings = ["model=tiny", "data=pydoc", "data.max_length=64", "data.eval_fraction=0.01", "train.max_steps=60", "train.effective_batch=4",
                "train.eval_steps=30", "train.save_steps=30", "train.log_steps=1", "train.samples=0"]
    command = [str(Path(sys.executable).with_name("qlora")), "run", "--run", str(tmp_path / "run"), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 130 and "the same command goes on" in said, said[-2000:]
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")]
    assert len(saved) == 1 and not (tmp_path / "run" / "final_adapter").exists()
