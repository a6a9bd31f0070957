"The training notebook as a batch job: papermill from the shell, with parameters of one's own."
import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"{n} plus {n} is {2 * n}."} for n in range(60)]


def papermill(out, *args, cwd):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "20_train.ipynb"), str(out), "-k", "python3", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_own_data_and_settings(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "my.yaml").write_text("model: tiny\ndata: {path: rows.jsonl, max_length: 64}\n"
                                      "train: {max_steps: 4, micro_batch: 4, eval_steps: 2, save_steps: 2, log_steps: 1}\n")
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
