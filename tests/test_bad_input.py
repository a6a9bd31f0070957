"Bad input is one line on stderr that names the fix, exit code 2, and nothing is lost."
import json

import pytest
from conftest import qlora

GOOD = '{"question": "What is it?", "answer": "It is a thing."}\n{"question": "Why?", "answer": "Because."}\n'
CASES = {
    "missing file": (["train", "--run", "r", "data.path=rwos.jsonl"], "did you mean rows.jsonl?"),
    "empty CSV": (["train", "--run", "r", "data.path=empty.csv"], "holds no rows"),
    "no answer column": (["train", "--run", "r", "data.path=names.csv"], "name it with --map output=COLUMN"),
    "misspelt key": (["train", "--run", "r", "train.lora.rnak=8"], "did you mean train.lora.r"),
    "misspelt model": (["train", "--run", "r", "model=mistral7b"], "did you mean mistral-7b?"),
    "rank zero": (["train", "--run", "r", "train.lora.r=0"], "change train.lora.r"),
    "no override": (["train", "--run", "r", "tiny"], "write key=value"),
    "no config file": (["train", "--run", "r", "--config", "no.yaml"], "give --config an existing YAML file"),
    "folder of others": (["train", "--run", "full", "model=tiny"], "choose another folder with --run"),
    "model offline": (["train", "--run", "r", "model=mistral-7b", "data.path=rows.jsonl"], "hf download"),
    "not a run": (["eval", "nowhere"], "qlora train --run nowhere"),
    "unknown budget": (["budget", "mistral7b"], "mistral-7b"),
    "unknown data": (["data", "rwos.jsonl", "--out", "d"], "did you mean rows.jsonl?"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "names.csv").write_text("first,last\nAda,Lovelace\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_names_the_fix(folder, name):
    command, fix = CASES[name]
    done = qlora(*command, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert fix in done.stderr and done.stderr.startswith("qlora: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "r" / "config.yaml").exists()  # the corrected command may use the same folder
    assert (folder / "full" / "thesis.txt").read_text() == "do not touch"


def test_the_corrected_command_works_in_the_same_folder(folder):
    assert qlora("train", "--run", "r", "model=tiny", "data.path=names.csv", cwd=folder).returncode == 2
    done = qlora("train", "--run", "r", "model=tiny", "data.path=rows.jsonl", "--dry-run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["config"]["data"]["path"] == "rows.jsonl" and plan["rows"][0]["labels"][-1] == plan["rows"][0]["input_ids"][-1]


def test_a_trained_run_keeps_its_rows(folder):
    "Another file under the same name is no reason to replace what a run was trained on."
    command = ["train", "--run", "r", "model=tiny", "data.path=rows.jsonl", "train.max_steps=1", "train.samples=0"]
    assert qlora(*command, cwd=folder).returncode == 0
    before = (folder / "r" / "data" / "eval.jsonl").read_bytes()
    (folder / "rows.jsonl").write_text(GOOD.replace("a thing", "another thing"))
    done = qlora(*command, cwd=folder)
    assert done.returncode == 2 and "r is trained on other rows" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (folder / "r" / "data" / "eval.jsonl").read_bytes() == before
    (folder / "rows.jsonl").write_text(GOOD)
    assert "is trained already" in qlora(*command, cwd=folder).stdout


def test_a_refusal_loses_no_earlier_run(folder):
    "`--again` takes the earlier run away only when the new one is trained."
    command = ["run", "--run", "r", "model=tiny", "train.max_steps=1", "train.samples=0", "eval.rows=1", "eval.max_new_tokens=4"]
    assert qlora(*command, "data.path=rows.jsonl", cwd=folder).returncode == 0
    before = (folder / "r" / "final_adapter" / "adapter_model.safetensors").read_bytes()
    refused = qlora(*command, "data.path=rwos.jsonl", "--again", cwd=folder)
    assert refused.returncode == 2 and "did you mean rows.jsonl?" in refused.stderr
    assert (folder / "r" / "final_adapter" / "adapter_model.safetensors").read_bytes() == before and not (folder / "r.before").exists()
    assert qlora(*command, "data.path=rows.jsonl", "train.lr=1e-3", "--again", cwd=folder).returncode == 0
    assert (folder / "r" / "final_adapter" / "adapter_model.safetensors").read_bytes() != before and not (folder / "r.before").exists()


def test_two_trainings_do_not_share_a_folder(folder):
    from filelock import FileLock
    (folder / "r").mkdir()
    command = ["train", "--run", "r", "model=tiny", "data.path=rows.jsonl", "train.max_steps=1", "train.samples=0"]
    with FileLock(folder / "r" / "training.lock"): refused = qlora(*command, cwd=folder)
    assert refused.returncode == 2 and "another process is training in r" in refused.stderr
    assert qlora(*command, cwd=folder).returncode == 0


def test_debug_shows_the_traceback(folder):
    done = qlora("train", "--run", "r", "train.lora.r=0", "--debug", cwd=folder)
    assert done.returncode == 1 and "Traceback" in done.stderr
