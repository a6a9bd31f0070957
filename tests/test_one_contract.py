"One contract from training to the merged model: the ids that reach the model are the same at all four places."
import contextlib
import json

import pytest
from conftest import qlora
from fastapi.testclient import TestClient
from qlora_nb.config import compose, start_run
from qlora_nb.contract import messages_of
from qlora_nb.evaluation import answer_losses
from qlora_nb.display import display_for
from qlora_nb.export import load_merged, merge
from qlora_nb.model import load_run
from qlora_nb.monitor import MemoryMeter
from qlora_nb.plan import choose, plan
from qlora_nb.prepare import load_rows
from qlora_nb.serve import Engine, make_app
from qlora_nb.train import fit, make_data, make_trainer
from transformers import AutoTokenizer

TALKS = [[dict(role="system", content="Be brief."), dict(role="user", content=f" What is {n}? 😀"),
          dict(role="assistant", content=f"  {n}, 漢字\n"), dict(role="user", content="\tAnd twice that? "),
          dict(role="assistant", content=f"{2 * n} of course")] for n in range(40)]


@contextlib.contextmanager
def seen_by(model):
    "The rows of ids that reach a model's embedding."
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: rows.extend(args[0].tolist()))
    yield rows
    hook.remove()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A short training, and what its model saw."
    folder = tmp_path_factory.mktemp("contract")
    (folder / "talks.jsonl").write_text("".join(json.dumps(dict(messages=t)) + "\n" for t in TALKS))
    config = compose(["model=tiny", f"data.path={folder / 'talks.jsonl'}", "train.max_steps=4", "train.effective_batch=4",
                      "train.eval_steps=2", "train.save_steps=2", "train.samples=0"])
    run = start_run(folder / "run", config)
    make_data(run, config)
    plan(run, config)
    with MemoryMeter() as meter: trainer = make_trainer(run, choose(run, config), meter, display_for("none"))
    with seen_by(trainer.model) as rows: trainer.evaluate()
    fit(run, config, quiet=True)
    return run, rows


def without_padding(rows, pad): return [[i for i in row if i != pad] for row in rows]


def test_training_evaluation_serving_and_the_merged_model_see_the_same_ids(trained):
    run, in_training = trained
    rows, loaded = load_rows(run.data, "eval"), load_run(run)
    contract, pad = loaded.contract, loaded.contract.pad_token_id
    talks = [messages_of(r) for r in rows]
    whole = [loaded.encoder.encode(t).input_ids for t in talks]
    in_training = without_padding(in_training, pad)
    assert sorted(in_training) == sorted(whole)

    with seen_by(loaded.model) as in_evaluation: answer_losses(loaded, rows, batch_size=4)
    assert sorted(without_padding(in_evaluation, pad)) == sorted(whole)

    http, prompts = TestClient(make_app(Engine(loaded))), []
    for talk in talks[:3]:
        with seen_by(loaded.model) as served:
            body = dict(prompt=talk[1]["content"], system=talk[0]["content"], max_new_tokens=2, temperature=0)
            assert http.post("/generate", json=body).status_code == 200
        prompts += without_padding(served[:1], pad)
    assert len(prompts) == 3 and all(any(ids[:len(p)] == p for ids in in_training) for p in prompts)

    out = merge(run, run.path / "exports" / "merged")
    merged, stock = load_merged(out), AutoTokenizer.from_pretrained(out)
    with seen_by(merged.model) as in_merged: answer_losses(merged, rows, batch_size=4)
    assert sorted(without_padding(in_merged, pad)) == sorted(whole)
    for talk, ids in zip(talks, whole):
        asked = stock.apply_chat_template(talk[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert asked == ids[:len(asked)] and contract.eos_token_id == ids[-1]


@pytest.mark.parametrize("change, said", {
    "template": ("chat_template.jinja", "the chat template in final_adapter differs from contract.json's at character"),
    "tokenizer": ("tokenizer.json", "the tokenizer differs from the contract's in its added tokens"),
    "contract": ("contract.json", "contract.json and final_adapter/contract.json differ in max_length")}.values())
def test_a_changed_file_is_refused_by_name(trained, change, said):
    run, file = trained[0], trained[0].adapter / change
    kept = file.read_text()
    edits = {"chat_template.jinja": ("[INST]", "[INST] "), "contract.json": ('"max_length": 2048', '"max_length": 2047'),
             "tokenizer.json": ('"content": "[INST]"', '"content": "[ASK]"')}
    assert edits[change][0] in kept
    try:
        file.write_text(kept.replace(*edits[change], 1))
        done = qlora("infer", run.path, "What is 3?")
    finally: file.write_text(kept)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
