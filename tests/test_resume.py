"""From any checkpoint, in one process or two, a resumed run ends with the same bits.

`torchrun --nproc-per-node 2 tests/test_resume.py DIR` is what the test of two processes starts.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ORDERS = {"random": "float32", "sequential": "bfloat16"}


def trainer_for(folder, order="random", dtype="float32", kind=None, **settings):
    "The tiny model on 22 rows of random tokens: batches of two, so an epoch is eleven of them, or six steps of two."
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from qlora_nb.checkpoint import ResumableTrainer
    from qlora_nb.model import load_base, load_tokenizer
    from trl import SFTConfig
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_base("tiny"), lora)
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.to(getattr(torch, dtype))
    lengths = torch.randint(4, 24, (22,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [torch.randint(10, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    data = Dataset.from_list([dict(input_ids=r, labels=r, length=len(r)) for r in rows])
    arguments = dict(max_steps=15, save_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                     max_length=None, learning_rate=1e-3,
                     train_sampling_strategy=order, report_to="none", disable_tqdm=True, bf16=False,
                     use_cpu=True, activation_checkpointing=False, seed=42, data_seed=42, logging_steps=5,
                     optim="paged_adamw_32bit", restore_callback_states_from_checkpoint=True)
    return (kind or ResumableTrainer)(model, SFTConfig(output_dir=str(folder), **arguments | settings),
                                      train_dataset=data, processing_class=load_tokenizer("tiny"))


def train(trainer, resume=None):
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        trainer.train(resume)


def weights(folder, step): return (folder / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("order, steps", [("random", (3, 8, 14, 15)), ("sequential", (6, 10, 12, 13))])
def test_from_any_checkpoint(tmp_path, order, steps):
    "In the first epoch, at its end, in later ones, at the last step: always the same bits, of Adam's state too."
    whole, dtype = tmp_path / "whole", ORDERS[order]
    train(trainer_for(whole, order, dtype))
    for step in steps:
        again = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", again / f"checkpoint-{step}")
        trainer, said = trainer_for(again, order, dtype), []
        trainer.say = said.append
        train(trainer, resume=True)
        assert (said, trainer.state.global_step) == ([f"going on from {again / f'checkpoint-{step}'}"], 15)
        assert weights(again, 15) == weights(whole, 15), step
        optimizers = [(folder / "checkpoint-15" / "optimizer.pt").read_bytes() for folder in (whole, again)]
        assert optimizers[0] == optimizers[1], step
        shutil.rmtree(again)
    assert weights(whole, 14) != weights(whole, 15)


@pytest.mark.slow
def test_two_processes(tmp_path):
    "Two real processes save and resume to the same bits; if one cannot save, both say so and end."
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, __file__, str(tmp_path)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for order, dtype in ORDERS.items(): assert f"the same bits, {order} {dtype}" in done.stdout
    assert "checkpoint-5 is damaged (optimizer.pt is missing), set aside" in done.stdout
    assert done.stdout.count("is damaged") == 2  # once for each of the two orders, though two processes looked
    failures = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("failed in ")]
    assert len(failures) == 2 and failures[0] == failures[1], done.stdout
    assert "checkpoint-2 could not be written (no such file or directory" in failures[0]
    assert "checkpoint-1 is good" in failures[0]


def two_processes(folder):
    "What each of two processes does."
    from qlora_nb.checkpoint import ResumableTrainer
    from qlora_nb.config import RunFailed
    rank = int(os.environ["RANK"])
    for order, dtype in ORDERS.items():
        whole, again = folder / order / "whole", folder / order / "again"
        settings = dict(order=order, dtype=dtype, gradient_accumulation_steps=1, max_steps=8)  # six steps an epoch
        trainer = trainer_for(whole, **settings)
        train(trainer)
        assert {p.name for p in (whole / "checkpoint-7").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
        if rank == 0:
            shutil.copytree(whole / "checkpoint-4", again / "checkpoint-4")
            shutil.copytree(whole / "checkpoint-7", again / "checkpoint-5")
            (again / "checkpoint-5" / "optimizer.pt").unlink()
        trainer.accelerator.wait_for_everyone()
        trainer = trainer_for(again, **settings)
        found = trainer.last_checkpoint()
        assert found.name == "checkpoint-4"
        train(trainer, found)
        if rank == 0 and weights(whole, 8) == weights(again, 8): print(f"the same bits, {order} {dtype}", flush=True)

    class Struck(ResumableTrainer):
        "One whose second process cannot write its random state at step 2."
        def _save_rng_state(self, output_dir):
            if (self.args.process_index, self.state.global_step) == (1, 2): (Path(output_dir) / "gone" / "file").touch()
            super()._save_rng_state(output_dir)
    trainer = trainer_for(folder / "struck", kind=Struck, gradient_accumulation_steps=1)
    try: train(trainer)
    except RunFailed as e: print(f"failed in {rank}: {e}", flush=True)
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor hangs now and then when a process group ends before the models that used it


if __name__ == "__main__": two_processes(Path(sys.argv[1]))
