"Each method and variant, trained for a few real steps: what is saved loads as what was trained."
import json
import shutil

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from qlora_nb import adapter
from qlora_nb.adapter import add_adapter, optimizer_groups, refuse
from qlora_nb.config import compose, start_run
from qlora_nb.contract import Contract, pad_batch
from qlora_nb.model import load_base, load_run
from qlora_nb.prepare import load_samples
from qlora_nb.train import fit, make_data, plan
from qlora_nb.vram_budget import InputError
from safetensors.torch import load_file

STEPS = ["model=tiny", "data.max_length=64", "train.max_steps=3", "train.eval_steps=3", "train.save_steps=3", "train.log_steps=1",
         "train.effective_batch=8", "train.lr=1e-3", "train.lora.r=8", "train.samples=1", "train.sample_tokens=4"]
LORA, NONE = ["train.lora.dropout=0.1"], ["model.quant=none", "model.compute_dtype=fp32"]
OTHER = ["train.lora.r=16", "train.lr=1e-2"]
METHODS = {
    "lora": LORA,
    "lora on 8 bits": [*LORA, "model.quant=int8"],
    "lora on 16 bits": [*LORA, "model.quant=none"],
    "recomputed": [*LORA, "train.activation_checkpointing=true"],
    "packed": [*LORA, "train.packing=true"],
    "dora": [*LORA, "train.lora.dora=true"],
    "rslora": ["train.lora.rslora=true", "train.lora.init=gaussian"],
    "pissa": [*NONE, "train.lora.init=pissa"],
    "loftq": ["train.lora.init=loftq"],
    "eva": ["train.lora.init=eva", "train.lora.r=4"],
    "lora+": ["train.lora.lr_ratio=8"],
    "neftune": ["train.neftune_alpha=5"],
    "ia3": [*OTHER, "train.method=ia3"],
    "prefix": [*OTHER, "train.method=prefix", "train.prefix_tokens=8"],
}
COMPILED = [*LORA, "train.compile=true"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods") / "rows.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}, said in a few more words."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(folder, rows, settings, monkeypatch):
    "A run, and the logits of its model when training ended, on a batch of held-out rows."
    config = compose([*STEPS, f"data.path={rows}", *settings])
    run = start_run(folder, config)
    plan(run, config)
    make_data(run, config)
    held_out = [{k: r[k] for k in ("input_ids", "labels")} for r in load_samples(run.data, "eval")]
    batch = pad_batch(Contract.load(run.contract_file), held_out)
    seen, save = {}, adapter.save_adapter

    def keep(model, *where):
        "Look at what is about to be saved, without the mixed precision of training."
        bare = extract_model_from_parallel(model, keep_fp32_wrapper=False)
        seen.update(dtypes={p.dtype for p in bare.parameters() if p.requires_grad}, logits=logits(bare, batch))
        save(model, *where)

    monkeypatch.setattr(adapter, "save_adapter", keep)
    fit(run, config, quiet=True)
    return run, config, batch, seen


def logits(model, batch):
    with torch.no_grad(): return model.eval()(**{k: v.to(model.device) for k, v in batch.items()}).logits.float()


@pytest.mark.parametrize("method", [*METHODS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_what_is_saved_loads_as_what_was_trained(method, rows, tmp_path, monkeypatch):
    run, config, batch, seen = trained(tmp_path / "run", rows, METHODS.get(method, COMPILED), monkeypatch)
    loaded = load_run(run).model
    untouched = load_base("tiny", quant=config.model.quant, compute=config.model.compute_dtype)
    got, base = logits(loaded, batch), logits(untouched, batch)
    if method == "pissa": assert (got - seen["logits"]).abs().max() < 1e-3 < (got - base).abs().max()
    else: assert torch.equal(got, seen["logits"])
    assert not torch.equal(got, base)
    with loaded.disable_adapter(): assert torch.equal(logits(loaded, batch), base)
    if not torch.cuda.is_available(): assert seen["dtypes"] == {torch.float32}
    losses = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    assert all(0 < m["grad_norm"] < float("inf") for m in losses if "grad_norm" in m)


@pytest.mark.parametrize("method", ["packed", "pissa", "eva", "prefix"])
def test_a_run_that_goes_on_ends_in_the_same_adapter(method, rows, tmp_path, monkeypatch):
    "The last checkpoint and all that came after it are taken away, and the same settings run again."
    settings = [*METHODS[method], "train.max_steps=4", "train.eval_steps=2", "train.save_steps=2"]
    run = trained(tmp_path / "run", rows, settings, monkeypatch)[0]
    whole = load_file(run.adapter / "adapter_model.safetensors")
    for gone in (run.adapter, run.checkpoints / "checkpoint-4"): shutil.rmtree(gone)
    run.summary_file.unlink()
    kept = (run.checkpoints / "checkpoint-2" / "optimizer.pt").stat().st_mtime_ns
    trained(run.path, rows, settings, monkeypatch)
    assert (run.checkpoints / "checkpoint-2" / "optimizer.pt").stat().st_mtime_ns == kept  # it did not start anew
    again = load_file(run.adapter / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_lora_plus_has_two_learning_rates():
    train = compose(["model=tiny", "train.lora.lr_ratio=16", "train.lr=1e-3"]).train
    model = add_adapter(load_base("tiny"), train)
    slow, fast = optimizer_groups(model, train)
    assert fast["lr"] == 16 * slow["lr"] == 16e-3
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("lora_B" in names[id(p)] for p in fast["params"])
    assert not any("lora_B" in names[id(p)] for p in slow["params"])
    assert len(slow["params"]) + len(fast["params"]) == sum(p.requires_grad for p in model.parameters())


REFUSED = {
    "train.lora.dora is a setting of LoRA": ["train.method=ia3", "train.lora.dora=true"],
    "train.lora.lr_ratio is a setting of LoRA": ["train.method=prefix", "train.lora.lr_ratio=4"],
    "train.lora.init is a setting of LoRA": ["train.method=ia3", "train.lora.init=eva"],
    "train.lora.dropout is a setting of LoRA": ["train.method=ia3", "train.lora.dropout=0.2"],
    "train.prefix_tokens is a setting of train.method=prefix": ["train.prefix_tokens=4"],
    "set model.quant=none, or train.lora.init=loftq": ["train.lora.init=pissa"],
    "which model.quant=int8 cannot hold exactly": ["train.lora.init=pissa", "model.quant=int8"],
    "the saved adapter would lack DoRA's magnitudes": ["train.lora.init=pissa", "train.lora.dora=true", "model.quant=none"],
    "corrects what NF4 loses": ["train.lora.init=loftq", "model.quant=none"],
    "makes peft lose their scales": ["train.lora.dora=true", "model.quant=int8"],
    "set train.activation_checkpointing=false": ["train.method=prefix", "train.activation_checkpointing=true"],
    "packed samples would attend to each other": ["train.method=prefix", "train.packing=true"],
    "model.double_quant=false is about NF4": ["model.double_quant=false", "model.quant=int8"],
    "has no gradient scaling on a CPU": ["model.compute_dtype=fp16"],
    "moves activations out of a GPU's memory": ["train.activation_offloading=true"],
    "flash_attention_2 cannot run here: it needs an NVIDIA GPU": ["model.attention=flash_attention_2"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_combination_that_cannot_work_is_refused_with_its_reason(reason):
    with pytest.raises(InputError) as refused: refuse(compose(["model=tiny", *REFUSED[reason]]), where="cpu")
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_tested_here_is_not_refused(method): refuse(compose([*STEPS, *METHODS[method]]), where="cpu")
