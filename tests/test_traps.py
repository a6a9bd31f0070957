"The two faults that spoil a fine-tune without a sign, on the trainer as `qlora train` builds it."
import json

import pytest
import torch
from datasets import Dataset
from qlora_nb.config import compose, start_run
from qlora_nb.contract import IGNORED, Contract
from qlora_nb.display import display_for
from qlora_nb.monitor import MemoryMeter
from qlora_nb.plan import choose, plan
from qlora_nb.train import check_ends, make_data, make_trainer
from qlora_nb.vram_budget import InputError

LONG = "It is a very long answer. " * 40


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    "A trainer on 40 short rows and 10 that are longer than max_length."
    folder = tmp_path_factory.mktemp("traps")
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}. " + LONG * (n % 5 == 0)} for n in range(50)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = compose(["model=tiny", f"data.path={folder / 'rows.jsonl'}", "data.max_length=64", "train.effective_batch=4", "train.max_steps=6"])
    run = start_run(folder / "run", config)
    plan(run, config)
    report = make_data(run, config)
    assert report.counts["kept"] == 40 and report.counts["rejected"] == 10
    with MemoryMeter() as meter:
        yield make_trainer(run, choose(run, config), meter, display_for("none")), Contract.load(run.contract_file), report


def test_every_trained_row_ends_in_a_trained_eos(trainer):
    trainer, contract, report = trainer
    seen = set()
    for batch in [*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()]:
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            trained = labels[labels != IGNORED]
            assert trained[-1] == contract.eos_token_id and (trained == contract.eos_token_id).sum() == 1
            assert len(ids[ids != contract.pad_token_id]) <= 64
            seen.add(tuple(ids[ids != contract.pad_token_id].tolist()))
    assert len(seen) == report.counts["kept"]


@pytest.mark.parametrize("labels, most", [([[1, 2], [3, 4]], 9), ([[1, 2], [3, 2, 2]], 2), ([[2], []], 9)])
def test_a_row_without_its_eos_or_too_long_is_refused(labels, most):
    with pytest.raises(InputError, match="row 7 of eval.jsonl does not end in a trained EOS"):
        check_ends(Dataset.from_dict({"labels": labels, "row": [6, 7]}), 2, most, "eval")
    check_ends(Dataset.from_dict({"labels": [[1, 2], [2]], "row": [6, 7]}), 2, 2, "eval")


def gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(0)
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_gradients_are_the_same_after_an_evaluation(trainer):
    trainer = trainer[0]
    batch = next(iter(trainer.get_train_dataloader()))
    before = gradients(trainer, batch)
    trainer.evaluate()
    after = gradients(trainer, batch)
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_training_moves_the_adapter_and_nothing_else(trainer):
    model = trainer[0].model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer[0].train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in moved)
