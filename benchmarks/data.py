"""Measures how fast rows become training samples, beside TRL's own preprocessing and plain `datasets.map`, and the memory.

    .venv/bin/python benchmarks/data.py                  # speed: three rounds of each way, some minutes
    .venv/bin/python benchmarks/data.py --memory         # peak memory at 10^4, 10^5 and 10^6 rows, about an hour

All start from the same JSONL file of conversations and end with input_ids and labels on disk; the samples are compared,
row for row, before anything is timed. `prepare` makes all its checks on the way, and writes rows and a report too; the
others check nothing. The peers use two processes, or one with the tokenizer's own threads, whichever is faster. Each
run is a process of its own, rounds take turns, and the time is that of the work, not of the imports. Writes
benchmarks/results/data.json, each part beside the other, with the machine.
"""
import argparse
import datetime
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")

RESULT = Path(__file__).parent / "results" / "data.json"
WAYS = ("prepare", "prepare, near duplicates off", "trl, 2 processes", "datasets.map, 2 processes", "datasets.map, 1 process")


def write_rows(path, count, words):
    "A file of different rows: words of the embedded help desk, shuffled."
    from qlora_nb.tiny_base import helpdesk_rows
    rng, desk = random.Random(0), helpdesk_rows()
    text, names = " ".join(r["output"] for r in desk).split(), [r["group"] for r in desk]
    with open(path, "w", encoding="utf-8") as f:
        for n in range(count):
            start, size = rng.randrange(len(text) - 1000), max(4, int(rng.gauss(words, words / 4)))
            said = text[start:start + size]
            rng.shuffle(said)
            asked = f"What about {rng.choice(names)} and {rng.choice(names)} in case {n}?"
            f.write(json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(said)}]},
                               ensure_ascii=False) + "\n")


def contract_and_tokenizer():
    "Those of the embedded model, with room for all rows."
    from transformers import AutoTokenizer

    from qlora_nb.config import ASSETS, compose
    from qlora_nb.contract import make_contract
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-mistral")
    return make_contract(tokenizer, compose(["model=tiny", "data.max_length=1024"])), tokenizer


def by_prepare(rows, out, near):
    "This package: (seconds, samples by question)."
    from qlora_nb.config import DataSection
    from qlora_nb.prepare import prepare
    contract, tokenizer = contract_and_tokenizer()
    start = time.perf_counter()
    prepare(DataSection(path=str(rows), max_length=1024, near_duplicates=near), contract, tokenizer, out)
    return time.perf_counter() - start


def by_map(rows, out, processes):
    "`datasets.map` over the tokenizer's chat template, as its documentation shows it."
    from datasets import load_dataset
    contract, tokenizer = contract_and_tokenizer()
    tokenizer.chat_template = contract.template

    def encode(batch):
        found = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        labels = [[i if m else -100 for i, m in zip(*pair)] for pair in zip(found["input_ids"], found["assistant_masks"])]
        return {"input_ids": found["input_ids"], "labels": labels}

    start = time.perf_counter()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(out / "cache"))
    data.map(encode, batched=True, num_proc=processes, remove_columns="messages", cache_file_name=str(out / "done.arrow"))
    return time.perf_counter() - start


def by_trl(rows, out):
    "What TRL's SFTTrainer does with the same file before it trains; labels follow from its masks."
    from datasets import Dataset, load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from qlora_nb.config import ASSETS
    contract, tokenizer = contract_and_tokenizer()
    tokenizer.chat_template = contract.template
    tokenizer.pad_token_id = contract.pad_token_id
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / "tiny-mistral"))
    settings = SFTConfig(output_dir=str(out / "trainer"), dataset_num_proc=2, assistant_only_loss=True, max_length=1024,
                         use_cpu=True, report_to=[], bf16=False)
    first = Dataset.from_list([json.loads(line) for _, line in zip(range(4), open(rows, encoding="utf-8"))])
    trainer = SFTTrainer(model, settings, train_dataset=first, processing_class=tokenizer)
    start = time.perf_counter()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(out / "cache"))
    done = trainer._prepare_dataset(data, tokenizer, settings, False, None, "train")
    took = time.perf_counter() - start
    done.save_to_disk(out / "done")  # for the comparison; its cache on disk is what counts
    return took


def one(way, rows, out):
    "Seconds of one way, in this process."
    out.mkdir(parents=True, exist_ok=True)
    if way.startswith("prepare"): return by_prepare(rows, out, "off" if "off" in way else "keep")
    return by_trl(rows, out) if way.startswith("trl") else by_map(rows, out, 2 if "2" in way else None)


def samples(way, out, rows):
    "What a way made, as {text of the row: (input_ids, labels)}."
    from datasets import Dataset, load_from_disk

    from qlora_nb.contract import messages_of
    lines = [json.loads(line)["messages"] for line in open(rows, encoding="utf-8")]
    if way.startswith("prepare"):
        from qlora_nb.prepare import load_rows, load_samples
        found = {}
        for side in ("train", "eval"):
            told = load_rows(out, side)
            for s in load_samples(out, side): found[messages_of(told[s["row"]])[0]["content"]] = s["input_ids"], s["labels"]
        return found
    from datasets import concatenate_datasets
    parts = sorted(out.glob("done*.arrow"))
    data = load_from_disk(str(out / "done")) if way.startswith("trl") else concatenate_datasets([Dataset.from_file(str(p)) for p in parts])
    masks = "assistant_masks"
    labels = lambda s: s["labels"] if "labels" in s else [i if m else -100 for i, m in zip(s["input_ids"], s[masks])]
    return {m[0]["content"]: (s["input_ids"], labels(s)) for m, s in zip(lines, data)}


def child(*args):
    "The last line that another process of this script prints, as JSON."
    done = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, args))}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(count, rounds):
    "Rows a second of each way, and whether all made the same."
    with tempfile.TemporaryDirectory() as folder:
        rows, took = Path(folder) / "rows.jsonl", {way: [] for way in WAYS}
        write_rows(rows, count, 78)
        for n in range(rounds):
            for way in WAYS:
                out = Path(folder) / "out"
                took[way].append(child("--one", way, rows, out))
                if n == 0:
                    found = samples(way, out, rows)
                    if way == WAYS[0]: expected = found
                    different = sum(found.get(k) != v for k, v in expected.items())
                    if len(found) != count or different: sys.exit(f"{way} made {len(found)} of {count} rows, {different} of them differently")
                shutil.rmtree(out)
                print(f"{way}: {count / took[way][-1]:,.0f} rows/s", flush=True)
        tokens = statistics.mean(len(ids) for ids, _ in expected.values())
    rate = {way: round(count / statistics.median(t)) for way, t in took.items()}
    best = max((way for way in WAYS if not way.startswith("prepare")), key=rate.get)
    return {"rows": count, "tokens_a_row": round(tokens), "rows_a_second": rate, "seconds": {w: [round(s, 2) for s in t] for w, t in took.items()},
            "same_samples": True, "best_peer": best, "ratio": round(rate["prepare"] / rate[best], 2)}


def memory_of(count, near):
    "Peak memory of this process before and after `prepare`, in MiB."
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        for name, n in (("warm", 4000), ("rows", count)):
            write_rows(f"{folder}/{name}.jsonl", n, 34)
            before = peak()
            seconds = by_prepare(f"{folder}/{name}.jsonl", Path(folder) / name, near)
    return {"before_mib": round(before), "peak_mib": round(peak()), "rows_a_second": round(count / seconds)}


def memory(counts):
    "Peak memory by rows, near duplicates looked for or not."
    found = []
    for near in ("off", "keep"):
        for n in counts:
            found.append({"near_duplicates": near, "rows": n, **child("--memory-of", near, n)})
            print(found[-1], flush=True)
    def growth(near):
        first, *_, last = [f for f in found if f["near_duplicates"] == near]
        return round((last["peak_mib"] - first["peak_mib"]) * 2**20 / (last["rows"] - first["rows"]))
    return {"runs": found, "bytes_a_row": {near: growth(near) for near in ("off", "keep")}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: print("\n" + json.dumps(one(args.one[0], *map(Path, args.one[1:]))))
    elif args.memory_of: print("\n" + json.dumps(memory_of(int(args.memory_of[1]), args.memory_of[0])))
    else:
        from qlora_nb.calibrate import cpu_name
        from qlora_nb.config import versions
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), **versions()}
        part = {"memory": memory(args.sizes)} if args.memory else {"speed": speed(args.rows, args.rounds)}
        RESULT.write_text(json.dumps({**known, **part, "machine": machine, "date": datetime.date.today().isoformat()}, indent=1) + "\n")
        if args.memory: print(f"growth a row: {part['memory']['bytes_a_row']} bytes")
        else: print(f"prepare against {part['speed']['best_peer']}: {part['speed']['ratio']} times")
