"The main job from outside: a short demo, what it leaves, and everything that can be done with it afterwards."
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import SHORT, qlora

SECRETS = {"HF_TOKEN": "hf_canary5f1c9e77aa", "WANDB_API_KEY": "wandbcanary5f1c9e77", "QLORA_API_KEY": "qloracanary5f1c9e77"}
EXPECTED = {
    "budget.json", "config.yaml", "contract.json", "environment.json", "metrics.jsonl", "samples.jsonl", "train.ipynb", "train.json",
    *(f"data/{n}" for n in ("train.jsonl", "eval.jsonl", "train.arrow", "eval.arrow", "rejected.jsonl", "report.json", "report.html")),
    *(f"final_adapter/{n}" for n in ("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
                                     "contract.json", "tokenizer.json", "tokenizer_config.json")),
    *(f"eval/{n}" for n in ("answers.jsonl", "report.json", "report.md", "report.png"))}
CHECKPOINT = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "optimizer.pt",
              "manifest.json", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A short demo, run in a folder outside the repository: the process and the run folder."
    folder = tmp_path_factory.mktemp("demo")
    done = qlora("demo", "--out", "runs/demo", *SHORT, cwd=folder, env=SECRETS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done, folder / "runs" / "demo"


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_leaves_exactly_these_files(demo):
    found = files(demo[1])
    saved = {n for n in found if n.startswith("checkpoints/")}
    board = {n for n in found if n.startswith("tensorboard/")}
    assert found - saved - board == EXPECTED
    assert saved == {f"checkpoints/checkpoint-{step}/{n}" for step in (4, 8) for n in CHECKPOINT}
    assert board and all("events.out.tfevents" in n for n in board)


def test_says_what_it_did(demo):
    shown = demo[0].stdout
    for word in ("eval loss", "perplexity of the answers", "ROUGE-L", "stop rate", "answer tokens/s",
                 "memory peak predicted", "prediction over measurement", "> What does os.path.join do?", "report.md", "qlora infer runs/demo"):
        assert word in shown, word


def test_report_holds_base_and_tuned(demo):
    report = json.loads((demo[1] / "eval" / "report.json").read_text())
    for side in ("base", "tuned"):
        assert report[side]["perplexity"] > 1 and 0 <= report[side]["stop_rate"] <= 1
        assert report[side]["rougeL"]["low"] <= report[side]["rougeL"]["mean"] <= report[side]["rougeL"]["high"]
    assert report["tuned"]["perplexity"] < report["base"]["perplexity"]


def test_no_secret_anywhere(demo):
    done, folder = demo
    for text in [done.stdout, done.stderr, *(p.read_bytes().decode("utf-8", "replace") for p in folder.rglob("*") if p.is_file())]:
        assert not any(secret in text for secret in SECRETS.values())


def test_no_question_about_a_held_out_object_was_trained(demo):
    groups = [{json.loads(line)["group"] for line in open(demo[1] / "data" / f"{side}.jsonl")} for side in ("train", "eval")]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_second_demo_trains_nothing(demo):
    done, folder = demo
    before = {n: (folder / n).stat().st_mtime_ns for n in files(folder)}
    again = qlora("demo", "--out", "runs/demo", *SHORT, cwd=folder.parent.parent)
    assert again.returncode == 0 and "is trained already" in again.stdout
    assert before == {n: (folder / n).stat().st_mtime_ns for n in files(folder)}


def test_other_settings_are_refused(demo):
    done = qlora("demo", "--out", demo[1], *SHORT, "train.lora.r=4")
    assert done.returncode == 2 and "train.lora.r=16 there, 4 now" in done.stderr and done.stderr.count("\n") == 1


def test_infer_answers(demo):
    done = qlora("infer", demo[1], "What does os.path.join do?", "--max-new-tokens", "24")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert done.stdout == qlora("infer", demo[1], "What does os.path.join do?", "--max-new-tokens", "24").stdout


def test_merged_model_is_an_ordinary_one(demo, tmp_path):
    done = qlora("merge", demo[1], "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    contract = json.loads((demo[1] / "contract.json").read_text())
    assert model.generation_config.eos_token_id == contract["stop_token_ids"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=True)
    assert ids["input_ids"][0, 0] == contract["bos_token_id"]
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    again = qlora("merge", demo[1], "--out", tmp_path / "merged")
    assert again.returncode == 2 and "overwrite" in again.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url, data=None):
    "Status and JSON of a request, sent as `curl -d` sends it."
    try:
        with urllib.request.urlopen(url, data and json.dumps(data).encode(), timeout=60) as r:
            return r.status, json.load(r)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


@pytest.fixture(scope="module")
def server(demo):
    "`qlora serve` on loopback, and its log."
    port = free_port()
    command = [str(Path(sys.executable).with_name("qlora")), "serve", str(demo[1]), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        time.sleep(0.5)
        try:
            ask(url + "/health")
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
    yield url
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=30)[0]
    assert "shutil.copy" not in shown  # prompts are not logged


def test_health(server):
    status, health = ask(server + "/health")
    assert status == 200 and health["status"] == "ok" and health["gpu"]


def test_generate(server):
    body = {"prompt": "What does os.path.join do?", "max_new_tokens": 16, "temperature": 0.7}
    status, answer = ask(server + "/generate", body)
    assert status == 200 and set(answer) == {"response"} and isinstance(answer["response"], str)


def test_served_greedily_is_what_infer_says(demo, server):
    _, answer = ask(server + "/generate", {"prompt": "What does shutil.copy do?", "max_new_tokens": 16, "temperature": 0})
    said = qlora("infer", demo[1], "What does shutil.copy do?", "--max-new-tokens", "16").stdout
    assert answer["response"].strip() == said.strip()


@pytest.mark.parametrize("body", [{"prompt": "x", "max_new_tokens": 0}, {"prompt": "x", "temprature": 1}, {},
                                  {"prompt": "word " * 4000}])
def test_bad_requests_are_422(server, body):
    assert ask(server + "/generate", body)[0] == 422
    assert ask(server + "/health")[0] == 200
