"A run as it is watched: in a terminal, in a Jupyter kernel, in TensorBoard and in W&B, each read back by its own means."
import json
import os
import re
import struct
import sys
import textwrap
import time
from pathlib import Path

import pytest

KEYS = {"WANDB_API_KEY": "no-real-key-0123456", "HF_TOKEN": "hf_nobody-shall-read-this"}

TRAINING = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from qlora_nb.config import compose, start_run
    from qlora_nb.display import display_for
    from qlora_nb.monitor import MemoryMeter, MetricsLog, Readings
    from qlora_nb.tracking import Tracking, reporters

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids))
            return dict(loss=torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)

    class Watched(Trainer):
        def training_step(self, model, inputs, *args, **kw):
            self.readings.add(inputs)
            return super().training_step(model, inputs, *args, **kw)
        def log(self, logs, start_time=None):
            super().log(self.readings.enrich(logs, self.state))
        def evaluate(self, *args, **kw):
            found, step = super().evaluate(*args, **kw), self.state.global_step
            self.tracking.samples(step, [dict(question="1 + 1?", reference="2", answer="two", stopped=True)])
            return found

    settings = compose(["model=tiny", "train.report_to=[tensorboard,wandb]"])
    run = start_run(Path(sys.argv[1]), settings)
    run.record(settings)
    sample = dict(input_ids=torch.tensor([7, 7, 8, 2]), labels=torch.tensor([-100, -100, 8, 2]))
    for steps in 4, 8:  # the second goes on from the first's checkpoint
        display = display_for()
        arguments = TrainingArguments(output_dir=run.checkpoints, max_steps=steps, per_device_train_batch_size=2, logging_steps=2,
            eval_strategy="steps", eval_steps=4, save_steps=4, report_to=reporters(run, settings, display.say), disable_tqdm=True, use_cpu=True)
        last = max(map(str, run.checkpoints.glob("*")), default=None)
        with MemoryMeter() as meter:
            trainer = Watched(Layer(), arguments, train_dataset=[sample] * 8, eval_dataset=[sample] * 2)
            trainer.remove_callback(PrinterCallback)
            trainer.readings, trainer.tracking = Readings(meter, 100_000_000), Tracking(run, settings, display.say)
            trainer.tracking.attach(trainer)
            trainer.add_callback(MetricsLog(run, trainer.readings, display))
            trainer.train(resume_from_checkpoint=last)
        display.say(f"[one] of {steps}")
        print("printed by something else")
        display.close()
        trainer.tracking.close()
""")


def on_screen(text):
    "What a terminal shows after this output: its lines, where a cursor that goes up writes over them."
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.startswith("\x1b") and piece.endswith("A"):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece[0] not in "\x1b\r":
            lines[row] += piece
    return [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    "A training that was resumed once, in a terminal of 60 columns, with a key that W&B refuses: its folder and its screen."
    pexpect = pytest.importorskip("pexpect")
    folder = tmp_path_factory.mktemp("watched")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "JPY", "COLUMNS", "LINES"))}
    env |= {"HOME": str(folder), "TERM": "xterm", **KEYS}
    child = pexpect.spawn(sys.executable, ["-W", "ignore", "-c", TRAINING, str(folder / "run")], env=env, cwd=str(folder),
                          dimensions=(40, 60), timeout=180, encoding="utf-8")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before[-3000:]
    return folder / "run", child.before


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_terminal(watched):
    "One bar for each of the two trainings, messages above it, nothing wider than the window."
    lines = on_screen(watched[1])
    bars = [i for i, line in enumerate(lines) if line.startswith("step ")]
    assert [lines[i].split()[1] for i in bars] == ["4/4", "8/8"]
    assert all(len(line) <= 60 for line in lines if line.startswith(("step ", "loss "))), lines
    below = " ".join(lines[bars[-1] + 1:])
    assert "loss" in below and "eval loss" in below and "answer tokens/s" in below and "of 0.10 GB" in below
    for i, steps in zip(bars, (4, 8)):
        assert lines[i - 2:i] == [f"[one] of {steps}", "printed by something else"]
    assert watched[1].count("\x1b[?25l") == watched[1].count("\x1b[?25h") == 2  # the cursor comes back
    assert "is kept offline" in "".join(lines)


def test_tensorboard_has_the_same_numbers(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = watched[0]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    seen = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {"train/loss", "eval/loss", "train/answer_tokens_per_s", "train/padding_waste", "train/eta_s",
            "train/memory_process_bytes", "train/memory_budget_bytes"} <= set(seen)
    for tag, points in seen.items():
        key = tag.removeprefix("train/").replace("eval/", "eval_")
        written = [(e["step"], pytest.approx(e[key], rel=1e-6)) for e in metrics(run) if key in e]
        if key != "total_flos":  # the entry that summed up the first training went from metrics.jsonl when it was resumed
            assert [w for w in written if w not in points] == [], tag
    assert [step for step, _ in seen["train/loss"]] == [2, 4, 6, 8] and [step for step, _ in seen["eval/loss"]] == [4, 8]
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "effective_batch: " in texts["settings/text_summary"] and "ram_bytes: " in texts["environment/text_summary"]
    assert "answer: two" in texts["samples/text_summary"]


def wandb_records(path):
    "The records of a .wandb file: a log in blocks of 32 KiB as LevelDB writes them, of W&B's own messages."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, record = Path(path).read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum; kind: 1 whole, 2 first, 3 middle, 4 last
        record = (b"" if kind in (1, 2) else record) + data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)


def test_wandb_offline_holds_settings_losses_and_memory(watched):
    run = watched[0]
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    known_as = json.loads((run / "wandb.json").read_text())["id"]
    assert [f.name for f in files] == [f"run-{known_as}.wandb"] * 2  # the resumed training continues the same run
    config, points = {}, {}
    for record in (r for f in files for r in wandb_records(f)):
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for key in row:
            points.setdefault(key, []).append((row.get("train/global_step"), row[key]))
    assert config["settings"]["train"]["report_to"] == ["tensorboard", "wandb"]
    assert config["environment"]["versions"]["wandb"] and config["environment"]["ram_bytes"] > 0
    losses = [(e["step"], e["loss"]) for e in metrics(run) if "loss" in e]
    assert len(losses) == 4 and points["train/loss"] == losses
    assert points["eval/loss"] == [(e["step"], e["eval_loss"]) for e in metrics(run) if "eval_loss" in e]
    assert {v for _, v in points["train/memory_budget_bytes"]} == {100_000_000}
    assert len(points["train/memory_process_bytes"]) >= len(losses)
    tables = [json.loads(f.read_text()) for f in run.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert [t["data"][0][1:] for t in tables] == [["1 + 1?", "2", "two", True]] * 2


def test_no_secret_is_written(watched):
    written = b"".join(f.read_bytes() for f in watched[0].rglob("*") if f.is_file()) + watched[1].encode()
    assert len(written) > 10_000 and not [name for name, key in KEYS.items() if key.encode() in written]


def test_wandb_has_to_be_installed(tmp_path, monkeypatch):
    from qlora_nb import tracking
    from qlora_nb.config import Run, compose
    from qlora_nb.vram_budget import InputError
    monkeypatch.setattr(tracking, "installed", lambda library: None)
    with pytest.raises(InputError, match=r"pip install 'qlora_nb\[wandb\]'"):
        tracking.reporters(Run(tmp_path), compose(["model=tiny", "train.report_to=[wandb]"]))


# ---------------------------------------------------------------- in a kernel

LOOP = textwrap.dedent("""
    import time
    from qlora_nb.display import display_for
    began, display, drawn = time.monotonic(), display_for(), set()
    display.start([], 400)
    for step in range(1, 401):
        display.show(dict(step=step, loss=3 / step, learning_rate=1e-4, memory_process_bytes=1e9, memory_budget_bytes=2e9), 400)
        if step > 30:  # thirty in a row, and then slowly until it was drawn twice
            if len(drawn) >= 2: break
            time.sleep(0.05)
        drawn.add(getattr(display, "_next", step))  # what the plot changes whenever it is drawn
    display.say("that was all")
    display.close()
    seconds = time.monotonic() - began
""")


@pytest.fixture(scope="module")
def kernel():
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, person):
    "Run code as a front end with or without a person in front does: the messages it would show."
    sent, shown = client.execute(code, allow_stdin=person), []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != sent:
            continue
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", "\n".join(content["traceback"])
        if kind == "status" and content["execution_state"] == "idle":
            return shown
        shown.append((kind, content))
    raise AssertionError("the kernel did not finish")


def printed(shown):
    return "".join(content["text"] for kind, content in shown if kind == "stream" and content["name"] == "stdout")


def test_live_plot_updates_in_place(kernel):
    shown = execute(kernel, LOOP, person=True)
    first = [content for kind, content in shown if kind == "display_data"]
    later = [content for kind, content in shown if kind == "update_display_data"]
    assert len(first) == 1 and len(later) >= 2
    assert {c["transient"]["display_id"] for c in first + later} == {first[0]["transient"]["display_id"]}
    assert all("image/png" in c["data"] for c in first + later) and first[0]["data"] != later[-1]["data"]
    assert printed(shown) == "that was all\n"
    seconds = float(printed(execute(kernel, "print(seconds)", person=True)))
    assert len(later) <= seconds + 1  # at most one a second, and one at the end


def test_plain_lines_without_a_person(kernel):
    shown = execute(kernel, LOOP, person=False)
    assert not [kind for kind, _ in shown if "display" in kind]
    assert printed(shown).splitlines()[-2:] == ["step 31/400  loss 0.0968  lr 1.00e-04  1.00 of 2.00 GB", "that was all"]


def test_a_kernels_command_is_no_terminal(kernel):
    shown = execute(kernel, "import sys\n!{sys.executable} -c 'import sys; from qlora_nb.display import surroundings; "
                            "print(sys.stdout.isatty(), surroundings())'", person=True)
    assert "True lines" in printed(shown)


@pytest.mark.gpu
def test_gpu_state():
    from qlora_nb.monitor import gpu_state
    state = gpu_state()
    assert 0 <= state["gpu_utilisation_percent"] <= 100 and 10 < state["gpu_temperature_c"] < 110
