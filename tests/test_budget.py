"The budget from outside: exact figures, exit codes, the nearest fit, and the guard before a training."
import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, qlora

# MiB, worked out by hand and, for the peaks, by a simulation: packed weights, constants, weights in 16 bits, adapters,
# AdamW in 32 bits, checkpoints (Phi-3's with a mask of 4 MiB, its window being shorter than the row), room for a block;
# then the active peaks with AdamW in 8 bits, fused and with materialised scores.
KEYS = ("base_quantised", "quant_constants", "base_16bit", "lora", "optimizer", "checkpoints", "layer")
BYTES = {"mistral-7b": (3328, 106, 500, 80, 320, 512, 546, 5249, 5470),
         "llama-3-8b": (3328, 106, 2004, 80, 320, 512, 546, 6753, 9229),
         "gemma-7b": (3696, 117, 1500, 95, 381, 336, 787, 6724, 11960),
         "phi-3-mini": (1728, 55, 376, 48, 192, 388, 397, 3084, 3463)}


def budget(*args, code=0):
    done = qlora("budget", *args, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("model", BYTES)
def test_components_and_peaks_agree_with_figures_worked_out_elsewhere(model):
    *parts, peak, logits = BYTES[model]
    roomy = (model, "--vram", 24, "--micro-batch", 1)
    found = budget(*roomy)["components"]
    for key, mib in zip(KEYS, parts, strict=True):
        within = 0.02 if key == "layer" else 0.01
        assert abs(found[key] / 2**20 - mib) < max(1, within * mib), key
    eight_bits = (*roomy, "--optimizer", "adamw_8bit")
    for expected, b in ((peak, budget(*eight_bits)), (logits, budget(*eight_bits, "--loss", "materialised"))):
        assert abs(b["active_bytes"] / 2**20 / expected - 1) < 0.01


def test_mistral_fits_a_laptop_with_exact_counts():
    found = budget("mistral-7b", "--vram", 7.5, "--seq", 2048, "--micro-batch", 1)
    assert found["fits"] and found["counts"] == {"parameters": 7_241_732_096, "lora_parameters": 41_943_040}
    assert all(isinstance(n, int) for n in found["components"].values())


@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-7b"])
def test_what_does_not_fit_names_settings_that_do(model):
    found = budget(model, "--vram", 7.5, "--seq", 2048, "--loss", "materialised", code=1)
    near = found["nearest"]
    assert not found["fits"] and near["fits"] and near["overrides"]
    shown = qlora("budget", model, "--vram", 7.5, "--seq", 2048, "--loss", "materialised").stdout
    assert "does not fit 7.5 GB" in shown and all(text in shown.replace("\n", " ") for text in near["overrides"])
    best = near["best"]["settings"]
    flags = ["--offloading" if best["offloading"] else "--no-offloading", "--checkpointing" if best["checkpointing"] else "--no-checkpointing"]
    assert budget(model, "--vram", 7.5, "--seq", best["seq_len"], "--micro-batch", best["micro_batch"], "--rank", best["rank"],
                  "--optimizer", best["optimizer"], *flags)["fits"]


def test_a_card_adds_roofline_and_verdicts():
    found = budget("mistral-7b", "--gpu", "rtx-4060-laptop", "--micro-batch", 1)
    assert found["training_tokens_per_s"]["limit"] in ("compute", "bandwidth", "PCIe") and len(found["verdicts"]) == 4
    statuses = [v["status"] for v in found["verdicts"]]
    assert all(s.startswith(("reachable", "impossible", "not known")) for s in statuses)
    assert all(any(c.isdigit() for c in v["arithmetic"]) for v in found["verdicts"])


@pytest.mark.parametrize("family", ["mixtral", "mamba", "qwen3_moe"])
def test_an_architecture_it_does_not_know_is_refused_by_name(tmp_path, family):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family, **sizes)))
    done = qlora("budget", tmp_path)
    assert done.returncode == 2 and f"'{family}'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": "x"}, {"head_dim": -3}, {"sliding_window": "big"}, {"model_type": ["llama"]}])
def test_an_odd_config_is_one_line(tmp_path, wrong):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="mistral") | sizes | wrong))
    done = qlora("budget", tmp_path)
    assert done.returncode == 2 and next(iter(wrong)) in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options, fix", [
    (["--optimizer", "adam"], "choose from adamw_torch"), (["--loss", "half"], "give fused or materialised"),
    (["--gpu", "rtx4060"], "did you mean rtx-4060"), (["--targets", "wq"], "no linear layer wq"),
    (["--device", "cpu", "--offloading"], "leave it off"), (["--device", "cpu", "--gpu", "t4"], "leave out one of them"),
    (["--vram", "inf"], "give a number of GB")])
def test_bad_options_are_one_line(options, fix):
    done = qlora("budget", "mistral-7b", *options)
    assert done.returncode == 2 and fix in done.stderr and done.stderr.count("\n") == 1


def test_the_budget_needs_the_standard_library_only():
    code = "import sys, qlora_nb.vram_budget, qlora_nb.fit; print({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    shown = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" not in shown and eval(shown) <= {"__main__", "qlora_nb"}


def test_what_the_guard_suggests_works_in_the_same_folder(tmp_path):
    command = ["train", "--run", tmp_path / "run", "model=tiny", "data=pydoc", *SHORT, "train.effective_batch=16", "train.micro_batch=16", "gpu.vram_gb=0.3"]
    refused = qlora(*command)
    assert refused.returncode == 2 and "these fit: " in refused.stderr, refused.stderr
    suggested = refused.stderr.split("these fit: ")[1].split(";")[0].split()
    done = qlora(*command, *suggested)
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / "run" / "budget.json").read_text())["chosen"]
    assert chosen["micro_batch"] * chosen["grad_accum"] == 16


def test_an_8_bit_base_has_a_budget_though_no_roofline():
    found = budget("mistral-7b", "--quant", "int8", "--gpu", "rtx-4090")
    assert found["fits"] and "verdicts" not in found


def test_training_that_will_not_fit_is_refused_and_can_be_forced(tmp_path):
    command = ["train", "--run", tmp_path / "run", "model=tiny", "data=pydoc", *SHORT, "train.micro_batch=8", "gpu.vram_gb=0.15"]
    refused = qlora(*command)
    assert refused.returncode == 2 and "predicted" in refused.stderr and "--force" in refused.stderr, refused.stderr
    assert "0.15 GB are there" in refused.stderr and not (tmp_path / "run" / "checkpoints").exists()
    forced = qlora(*command, "--force")
    assert forced.returncode == 0 and "going on because of --force" in forced.stdout, forced.stderr
    plan = json.loads((tmp_path / "run" / "budget.json").read_text())
    assert plan["peak_bytes"] > 0.15e9 and plan["measured"]["process_bytes"] == plan["measured_peak_bytes"] > 0
    assert (plan["chosen"]["micro_batch"], plan["chosen"]["grad_accum"]) == (8, 1)


def test_the_micro_batch_is_what_the_budget_allows(tmp_path):
    "All samples of a step at a time where they fit, else half of them; the effective batch stays."
    def plan(name, cap_gb):
        done = qlora("train", "--dry-run", "--run", tmp_path / name, "model=tiny", "train=default", "data=pydoc",
                     "data.eval_fraction=0.02", f"gpu.vram_gb={cap_gb}")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "budget.json").read_text())
    roomy = plan("roomy", 8)
    assert (roomy["chosen"]["micro_batch"], roomy["chosen"]["grad_accum"]) == (16, 1)
    tight = plan("tight", roomy["peak_bytes"] * 0.97 / 1e9)
    assert (tight["chosen"]["micro_batch"], tight["chosen"]["grad_accum"]) == (8, 2)
    assert tight["peak_bytes"] < roomy["peak_bytes"]


def test_what_a_run_measured_is_used_by_the_next_prediction(tmp_path):
    home = {"QLORA_CACHE": str(tmp_path / "cache")}
    long_enough = [s for s in SHORT if "max_steps" not in s] + ["train.max_steps=20"]
    done = qlora("train", "--run", tmp_path / "first", "model=tiny", "data=pydoc", *long_enough, env=home)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "cache" / "overhead.json").read_text())
    assert len(kept) == 1 and all(e["basis"].startswith("measured") for e in kept.values())
    again = qlora("budget", "tiny", "--device", "cpu", "--json", env=home)
    assert json.loads(again.stdout)["basis"].startswith("measured")
