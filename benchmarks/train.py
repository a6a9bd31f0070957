"""Measures how fast `qlora train` trains beside a plain TRL + peft + bitsandbytes script: speed, memory, loss.

    .venv/bin/python benchmarks/train.py                        all settings on the embedded model; about half an hour
    .venv/bin/python benchmarks/train.py --list                 what they are
    .venv/bin/python benchmarks/train.py --data rows.jsonl      on other rows
    .venv/bin/python benchmarks/train.py --peers litgpt --peer-python VENV/bin/python        and llamafactory, likewise
    .venv/bin/python benchmarks/train.py --gpu                  Mistral-7B's shape in NF4, random weights, in 7.5 GB of a GPU
    .venv/bin/python benchmarks/train.py --report               the tables again
    .venv/bin/python benchmarks/train.py --gpu --device cpu --tiny --out FILE        a rehearsal with a small model

What is the same for all: the model, the tokens and labels (those of the run's data folder, compared before and counted
during training), the effective batch, dropout rate, precision, rank, targets, learning rate and its schedule, clipping,
and the number of steps, or of epochs where samples are packed. The plain script (benchmarks/train_peers.py) leaves all
else to the defaults of SFTConfig; ours goes through the functions of `qlora_nb.train` that `qlora train` calls.

Each measurement is a process of its own, rounds take turns, and each result is in the file before the next one begins.
The same command again measures what is missing; Ctrl-C and --time-limit lose nothing but the measurement at work. What
the processes said stands beside the file, in a .log. Answer tokens are those with a label; a second is one of the
training loop, without loading, evaluation and saving, on a GPU after the first two steps. Memory on a CPU is the growth
of the process above its imports. The held-out loss is computed by one function for all. Exit code 0: all are measured;
1: some failed or are left; 2: bad input; 130: Ctrl-C. A peer that cannot run here is noted with the reason.
"""
import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import train_peers
from qlora_nb.config import has_cuda, read_json, versions, write_json, write_jsonl
from qlora_nb.vram_budget import InputError
from vram_matrix import driver, random_model, shape_config, show

RESULT = Path(__file__).parent / "results" / "train.json"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
         "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
BATCH, LR, DROPOUT, WARMUP, CLIP, OPTIMIZER, SEED = 16, 2e-3, 0.05, 0.03, 0.3, "paged_adamw_32bit", 42
AIM = 2.5  # times the plain script's answer tokens a second, as both come
NEVER = 10**6  # steps between evaluations and checkpoints: none before the last step


# ---------------------------------------------------------------- what is measured

@dataclass(frozen=True)
class Setting:
    "One line of the table: what differs from the common job, in each one's words."
    name: str
    job: dict = field(default_factory=dict)       # for all
    plain: dict = field(default_factory=dict)     # arguments of SFTConfig beside the usual
    ours: tuple = ()                              # overrides
    peers: tuple = ("plain", "ours")


def cpu_settings(per_sequence, more):
    "The settings on a CPU; `per_sequence` samples fit into one packed sequence, `more` peers were asked for."
    on, off = {"activation_checkpointing": True}, {"activation_checkpointing": False}
    recompute, keep = ("train.activation_checkpointing=true",), ("train.activation_checkpointing=false",)
    no_dropout, packs = {"dropout": 0.0}, max(1, round(BATCH / per_sequence))
    and_more = lambda *names: ("plain", "ours", *(n for n in names if n in more))
    return [
        Setting("as both come", peers=and_more("llamafactory")),
        Setting("both recompute", plain=on, ours=recompute),
        Setting("neither recomputes", plain=off, ours=keep),
        Setting("no dropout", no_dropout),
        Setting("no dropout, neither recomputes", no_dropout, off, keep),
        Setting("fp32", {"dtype": "float32"}, ours=("model.compute_dtype=fp32",)),
        Setting("micro-batch 2", {"micro_batch": 2, "grad_accum": 8}, ours=("train.micro_batch=2", "train.grad_accum=8")),
        Setting("packed", {"packing": True, "micro_batch": 1, "grad_accum": packs},
                ours=("train.packing=true", "train.micro_batch=1", f"train.grad_accum={packs}")),
        Setting("LoRA on 16 bits", {"quant": "none"}, ours=("model.quant=none",), peers=and_more("litgpt"))]


def gpu_settings(seq_len):
    "The settings on a GPU, so ordered that an early end leaves something of everything."
    def of(micro_batch):
        said = f"{micro_batch}x{seq_len}"
        job = lambda **more: {"micro_batch": micro_batch, "grad_accum": 2, **more}
        on, recompute = {"activation_checkpointing": True}, ("train.activation_checkpointing=true",)
        offload = ("train.activation_checkpointing=false", "train.activation_offloading=true")
        return [
            Setting(f"{said} as each comes", job(), peers=("plain", "ours", "unsloth")),
            Setting(f"{said} recompute", job(unsloth_checkpointing=True), on, recompute, ("plain", "ours", "unsloth")),
            Setting(f"{said} offload", job(), {"activation_checkpointing": False, "activation_offloading": True}, offload),
            Setting(f"{said} fused kernels", job(liger=True), on, recompute),
            Setting(f"{said} compiled", job(), on | {"torch_compile": True}, (*recompute, "train.compile=true"))]
    return [s for pair in zip(of(1), of(2)) for s in pair]


def chosen(settings, parts):
    "The settings whose name is, or else holds, one of some texts divided by semicolons."
    names, wanted = [s.name for s in settings], set()
    for word in filter(None, map(str.strip, parts.split(";"))) if parts else names:
        found = {word} & set(names) or {name for name in names if word in name}
        if not found: raise InputError(f"no setting has {word!r} in its name; see --list")
        wanted |= found
    return [s for s in settings if s.name in wanted]


# ---------------------------------------------------------------- model and data, made once

def some_rows(args, folder):
    "Files of rows to train on and to hold out: as many as asked for, free of whatever the data stage rejects."
    from qlora_nb.config import DataSection, compose
    from qlora_nb.contract import make_contract
    from qlora_nb.model import load_tokenizer
    from qlora_nb.prepare import load_rows, prepare
    tokenizer = load_tokenizer("tiny")
    contract = make_contract(tokenizer, compose(["model=tiny", f"data.max_length={args.max_length}"]))
    prepare(DataSection(path=args.data, max_length=args.max_length), contract, tokenizer, folder / "all")
    for side, count in (("train", args.rows // BATCH * BATCH), ("eval", args.eval_rows)):
        rows = load_rows(folder / "all", side)
        if len(rows) < count:
            raise InputError(f"{args.data} leaves {len(rows)} rows to {side}, {count} are wanted; ask for fewer")
        random.Random(SEED).shuffle(rows)
        write_jsonl(folder / f"{side}.jsonl", rows[:count])
    return "tiny", load_path("tiny")


def load_path(name):
    "The folder of a model."
    from qlora_nb.model import fetch
    return str(fetch(name))


def long_rows(args, folder):
    "A model of Mistral's shape in NF4, of random weights, and rows of words at random that fill its sequences exactly."
    from qlora_nb.config import compose
    from qlora_nb.contract import Encoder, make_contract, messages_of
    from qlora_nb.model import load_tokenizer
    from qlora_nb.tiny_base import helpdesk_rows
    base, tokenizer = folder / "base", load_tokenizer("tiny")
    random_model(shape_config("mistral-7b", args.tiny)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = Encoder(make_contract(tokenizer, compose([f"model={base}", f"data.max_length={args.max_length}"])), tokenizer)
    words = sorted({w for row in helpdesk_rows() for w in row["output"].split() if w.isalpha()})
    tokens = tokenizer([f" {w}" for w in words], add_special_tokens=False).input_ids
    words, draw = [w for w, ids in zip(words, tokens) if len(ids) == 1], random.Random(SEED)
    for side, count in (("train", 8), ("eval", 2)):
        asked = [f"Say what you know, part {n} to {side}." for n in range(count)]
        rows = [{"instruction": q, "input": "", "output": draw.choice(words)} for q in asked]
        for row in rows:
            room = args.max_length - len(encoder.samples([messages_of(row)])[0][0])
            row["output"] = " ".join([row["output"], *draw.choices(words, k=room)])
        write_jsonl(folder / f"{side}.jsonl", rows)
    return str(base), str(base)


def prepare_work(args, folder):
    "Model, rows and samples in a folder; what they are."
    from qlora_nb.config import compose
    from qlora_nb.contract import make_contract
    from qlora_nb.model import compute_dtype, load_tokenizer
    from qlora_nb.prepare import load_samples, prepare
    model, base = (long_rows if args.gpu else some_rows)(args, folder)
    config = compose([f"model={model}", *data_overrides(folder, args)])
    tokenizer = load_tokenizer(base)
    contract = make_contract(tokenizer, config)
    prepare(config.data, contract, tokenizer, folder / "data")
    only = lambda side: [{k: s[k] for k in ("input_ids", "labels")} for s in load_samples(folder / "data", side)]
    samples = {side: only(side) for side in ("train", "eval")}
    write_json(folder / "samples.json", samples)
    answer = lambda side: sum(n != train_peers.IGNORED for s in samples[side] for n in s["labels"][1:])
    tokens = sum(len(s["input_ids"]) for s in samples["train"])
    return {"data": args.data, "train_rows": len(samples["train"]), "eval_rows": len(samples["eval"]), "tokens": tokens,
            "answer_tokens": answer("train"), "eval_answer_tokens": answer("eval"), "max_length": args.max_length,
            "longest": max(len(s["input_ids"]) for s in samples["train"]), "dtype": str(compute_dtype()).removeprefix("torch."),
            "samples_sha256": hashlib.sha256(json.dumps(samples).encode()).hexdigest(), "pad_token_id": contract.pad_token_id,
            "model": model if model == "tiny" else "mistral-7b" + " in small" * args.tiny}, base


def data_overrides(folder, args):
    "Where the rows are."
    return [f"data.path={folder / 'train.jsonl'}", f"data.eval_path={folder / 'eval.jsonl'}",
            f"data.max_length={args.max_length}"]


def job_of(setting, peer, folder, base, facts, args):
    "All that a process has to know."
    steps = args.steps if args.gpu else facts["train_rows"] // BATCH * args.epochs
    dropout = setting.job.get("dropout", DROPOUT)
    job = {"peer": peer, "base": base, "samples": str(folder / "samples.json"), "device": args.device,
           "vram_gb": args.vram_gb if args.gpu else None, "pad_token_id": facts["pad_token_id"],
           "max_length": args.max_length, "quant": "nf4", "dtype": facts["dtype"], "dropout": dropout, "micro_batch": 8,
           "grad_accum": 2, "epochs": args.epochs, "max_steps": steps if args.gpu else -1, "steps": steps, "lr": LR,
           "warmup_steps": round(WARMUP * steps), "max_grad_norm": CLIP, "optimizer": OPTIMIZER, "packing": False,
           "liger": False, "unsloth_checkpointing": "unsloth", "seed": SEED, "heldout": not args.gpu,
           "warm_steps": 2 if args.gpu else 0, "strict": steps >= 8, "norms": args.gpu, **setting.job}
    job["more"] = {**({"logging_steps": 1} if args.gpu else {}), **setting.plain}
    usual = [f"train.lr={LR}", "train.scheduler=cosine", f"train.warmup_ratio={WARMUP}", f"train.max_grad_norm={CLIP}",
             f"train.optimizer={OPTIMIZER}", f"train.lora.dropout={dropout}", f"train.seed={SEED}",
             f"train.epochs={args.epochs}", f"train.eval_steps={NEVER}", f"train.save_steps={NEVER}", "train.samples=0"]
    micro, accum = job["micro_batch"], job["grad_accum"]
    of_gpu = [f"gpu.vram_gb={args.vram_gb}", f"train.max_steps={steps}", "train.log_steps=1", f"train.micro_batch={micro}",
              f"train.grad_accum={accum}", f"train.effective_batch={micro * accum}"] if args.gpu else []
    model = base if args.gpu else "tiny"
    return job | {"overrides": [f"model={model}", *data_overrides(folder, args), *usual, *of_gpu, *setting.ours]}


# ---------------------------------------------------------------- this package

def ours(job, watch):
    "What `qlora train` does: settings, run folder, data, budget, training."
    import gc
    import bitsandbytes, datasets, peft, trl  # noqa: F401 -- libraries are not the run's memory
    from qlora_nb import train
    from qlora_nb.calibrate import release_freed
    from qlora_nb.config import compose, start_run
    from qlora_nb.plan import plan
    from qlora_nb.prepare import load_samples
    config = compose(job["overrides"])
    run = start_run(Path(job["out"]) / "run", config)
    plan(run, config)  # refuses what cannot be, before any data
    report = train.make_data(run, config)
    for side, given in json.loads(Path(job["samples"]).read_text()).items():
        own = [{k: s[k] for k in ("input_ids", "labels")} for s in load_samples(run.data, side)]
        if own != given: raise RuntimeError(f"the {side} samples of the run are not those that the peers are given")
    plan(run, config, report.tokens["max"])
    del own, given
    gc.collect(); release_freed()
    watch.libraries_loaded()
    make = train.make_trainer

    def watched(*args, **kw):
        trainer = make(*args, **kw)
        if job["liger"]: train_peers.with_liger(trainer.model.get_base_model())
        return watch.attach(trainer)

    train.make_trainer = watched
    try: train.fit(run, config)
    finally: train.make_trainer = make


# ---------------------------------------------------------------- one measurement at a time

def measured(job, args, seconds):
    "What one peer did with a job, in a process of its own."
    with tempfile.TemporaryDirectory() as folder:
        job = job | {"out": folder}
        if args.in_process:
            work = ours if job["peer"] == "ours" else train_peers.PEERS[job["peer"]]
            return train_peers.answer(job, work)
        write_json(Path(folder) / "job.json", job)
        files = [str(Path(folder) / name) for name in ("job.json", "answer.json")]
        script = [__file__, "--child"] if job["peer"] == "ours" else [train_peers.__file__]
        found = apart([python_of(job["peer"], args), *script, *files], args, seconds, f"{job['peer']} {json.dumps(job)}")
        return found if found is not None else read_json(files[1])


def python_of(peer, args):
    "The Python that has a peer."
    if peer not in args.peers: return sys.executable
    return args.peer_python.get(peer) or args.peer_python.get("", sys.executable)


def apart(command, args, seconds, title):
    "Run a command to its end; what went wrong, or None."
    cache = str(Path(tempfile.gettempdir()) / "no-qlora-cache")  # what earlier runs measured decides nothing here
    env = {**os.environ, **QUIET, "QLORA_CACHE": cache, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if args.device == "cpu": env["CUDA_VISIBLE_DEVICES"] = ""
    with open(args.out.with_suffix(".log"), "ab") as log:
        log.write(f"\n=== {title}\n".encode()); log.flush()
        try: process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        except OSError as e: return {"cannot_run": f"{command[0]}: {e.strerror}"}
        try: code = process.wait(seconds)
        except subprocess.TimeoutExpired: return {"error": f"took longer than {seconds:.0f} s"}
        finally:
            if process.poll() is None: process.kill(); process.wait()
    return {"error": f"the process ended with exit code {code}"} if code else None


def checked(found, job, facts, args):
    "The result, or the reason why it does not count: all have to have seen the same."
    if "error" in found or "cannot_run" in found: return found
    steps, answer, tokens = found["steps"], found["answer_tokens"], found["tokens"]
    batch, wanted = found["micro_batch"] * found["grad_accum"], job["micro_batch"] * job["grad_accum"]
    if batch != wanted: return found | {"error": f"{batch} samples or sequences a step instead of {wanted}"}
    if not job["packing"] and steps != job["steps"]: return found | {"error": f"{steps} steps instead of {job['steps']}"}
    most = 1.1 if job["packing"] else 1  # sequences that fill up the last step are seen twice
    counted = ("answer tokens", answer, facts["answer_tokens"]), ("tokens", tokens, facts["tokens"])
    for said, got, once in () if args.gpu else counted:
        wanted = once * args.epochs
        if not wanted <= got <= wanted * most:
            return found | {"error": f"{got} {said} were trained on instead of {wanted}"}
    return found


def measure_all(todo, part, folder, base, args, save, say):
    "Measure what is missing, round by round, writing each result as it comes; whether time was left for all."
    started, longest = args.started, 0.0
    for i, (n, setting, peer) in enumerate(todo):
        if (setting.name, peer) in {(m["setting"], m["peer"]) for m in part["measurements"] if m["status"] != "ok"}: continue
        left = args.time_limit - (time.monotonic() - started) if args.time_limit else float("inf")
        if left < max(longest, 1.0): return False
        say(f"[{i + 1}/{len(todo)}] round {n + 1}, {setting.name}, {peer} ...")
        job, began = job_of(setting, peer, folder, base, part["job"], args), time.monotonic()
        found = checked(measured(job, args, min(args.timeout, left)), job, part["job"], args)
        spent = time.monotonic() - began
        if "error" in found and left < args.timeout and spent >= left: return False  # ours to blame, not its own
        longest = max(longest, spent)
        status = "cannot run" if "cannot_run" in found else "failed" if "error" in found else "ok"
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        part["measurements"].append({"setting": setting.name, "peer": peer, "round": n, "status": status, **found,
                                     "process_seconds": round(spent, 1), "measured_at": at})
        part["summary"] = summary(part["measurements"])
        save()
        say("    " + (found.get("cannot_run") or found.get("error") or shown(found)) + f", {spent:.0f} s")
    return True


def shown(m):
    "A measurement for people."
    peak = peak_of(m)
    memory = f", peak {peak / 1e6:,.0f} MB" if peak else ""
    held = f", held-out loss {m['heldout_loss']:.4f}" if m.get("heldout_loss") is not None else ""
    return (f"{m['answer_tokens_per_s']:,.0f} answer tokens/s, {m['padding']:.1%} padding{memory}, "
            f"loss {m['losses'][0]:.3f} to {m['losses'][-1]:.3f}{held}")


def peak_of(m):
    "The peak that stands in the table: of the GPU if there is one, else growth in RAM."
    return m.get("allocated_bytes") or m.get("ram_growth_bytes")


# ---------------------------------------------------------------- what comes of it

def summary(measurements):
    "By setting: each peer's medians, and our speed over each peer's, round by round."
    found = {}
    for name in dict.fromkeys(m["setting"] for m in measurements):
        of = {}
        for m in measurements:
            if m["setting"] == name: of.setdefault(m["peer"], []).append(m)
        good = {peer: {m["round"]: m for m in ms if m["status"] == "ok"} for peer, ms in of.items()}
        def middle(ms, key):
            known = [x for m in ms.values() if (x := key(m)) is not None]
            return statistics.median(known) if known else None
        line = {"peers": {peer: {
            "answer_tokens_per_s": middle(ms, lambda m: m["answer_tokens_per_s"]), "peak_bytes": middle(ms, peak_of),
            "padding": middle(ms, lambda m: m["padding"]), "heldout_loss": middle(ms, lambda m: m["heldout_loss"]),
            "last_loss": middle(ms, lambda m: m["losses"][-1]), "cpu_seconds": middle(ms, lambda m: m["cpu_seconds"]),
            "rounds": len(ms)} for peer, ms in good.items() if ms},
            "not_measured": {peer: bad[0] for peer, ms in of.items()
                             if (bad := [m.get("cannot_run") or m["error"] for m in ms if m["status"] != "ok"])}, "ratio": {}}
        for peer, ms in good.items():
            rounds = sorted(set(ms) & set(good.get("ours", {})))
            if peer == "ours" or not rounds: continue
            ratios = [round(good["ours"][n]["answer_tokens_per_s"] / ms[n]["answer_tokens_per_s"], 3) for n in rounds]
            line["ratio"][peer] = {"median": round(statistics.median(ratios), 3), "least": min(ratios), "most": max(ratios),
                                   "rounds": ratios}
        found[name] = line
    return found


def report(part):
    "The table in Markdown, and in plain words where we are slower."
    lines = ["| setting | whose | answer tokens/s | ours over it, median (spread) | peak, MB | padding | held-out loss "
             "| last loss |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    number = lambda n, form: "" if n is None else format(n, form)
    for name, line in part["summary"].items():
        for peer, m in line["peers"].items():
            r = line["ratio"].get(peer)
            peak = m["peak_bytes"] and m["peak_bytes"] / 1e6
            cells = [name, peer, number(m["answer_tokens_per_s"], ",.0f"),
                     f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" if r else "", number(peak, ",.0f"),
                     number(m["padding"], ".1%"), number(m["heldout_loss"], ".4f"), number(m["last_loss"], ".4f")]
            lines.append("| " + " | ".join(cells) + " |")
        missing = line["not_measured"].items()
        lines += [f"| {name} | {peer} | {why.replace('|', '/')} |" + " |" * 5 for peer, why in missing]
    return "\n".join([*lines, "", *verdict(part)])


def verdict(part):
    "How far the aims are met."
    ratios = {(name, peer): r for name, line in part["summary"].items() for peer, r in line["ratio"].items()}
    said = [f"SLOWER than {peer}, {name}: {r['median']:.2f} times its answer tokens/s."
            for (name, peer), r in ratios.items() if r["median"] < 1]
    said += [f"slower than {peer} in a round, {name}: {r['least']:.2f} times at the least."
             for (name, peer), r in ratios.items() if r["least"] < 1 <= r["median"]]
    if ratios and not said: said = ["Ours is nowhere slower, in no round."]
    if missing := sum(len(line["not_measured"]) for line in part["summary"].values()):
        said.append(f"Not measured: {missing}, for the reasons above.")
    if r := ratios.get(("as both come", "plain")):
        met = "met" if r["median"] >= AIM else "NOT met"
        said.append(f"As both come: {r['median']:.2f} times the plain script's answer tokens/s; the aim is {AIM}, {met}.")
    return said


# ---------------------------------------------------------------- the file

def machine(args):
    "Where this runs, without importing torch."
    from qlora_nb.calibrate import cpu_name
    facts = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(),
             "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), **versions()}
    if args.device != "cuda": return facts
    import pynvml
    handle = driver()
    return {"gpu": pynvml.nvmlDeviceGetName(handle), "vram_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            "driver": pynvml.nvmlSystemGetDriverVersion(), "vram_gb_allowed": args.vram_gb} | facts


def open_part(found, name, facts, args):
    "The part of the file that this command goes on with."
    here = {"machine": machine(args), "job": facts | {"steps": args.steps if args.gpu else None, "epochs": args.epochs}}
    part = found.setdefault(name, {**here, "measurements": [], "summary": {}})
    for key, now in here.items():
        if differs := [f"{k}={part[key].get(k)} there, {now[k]} here" for k in now if part[key].get(k) != now[k]]:
            raise InputError(f"{args.out} was measured with another {key} ({'; '.join(differs[:3])}); choose another --out")
    if args.retry: part["measurements"] = [m for m in part["measurements"] if m["status"] == "ok"]
    part["date"] = datetime.date.today().isoformat()
    return part


def pythons(given, peers):
    "{peer: its Python}; a path without a name holds for all peers."
    pairs = [(text.split("=", 1) if "=" in text else ("", text)) for text in given]
    for name, path in pairs:
        if name and name not in peers:
            raise InputError(f"--peer-python {name}=…: no such peer is asked for; add --peers {name}")
        if not Path(path).exists(): raise InputError(f"--peer-python {path}: there is no such file")
    return dict(pairs)


# ---------------------------------------------------------------- the command

def command_line(argv):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="More in the file's docstring.")
    add = parser.add_argument
    add("--out", type=Path, help="the JSON file; written after each measurement")
    add("--settings", help="only those whose name holds one of these texts, divided by semicolons")
    add("--list", action="store_true", help="print the settings and stop")
    add("--report", action="store_true", help="print the tables of the file and stop")
    add("--rounds", type=int, help="times that all take turns: 3, with --gpu 1")
    add("--data", default="pydoc", help="rows of one's own; without --gpu")
    add("--rows", type=int, default=1024, help="rows to train on")
    add("--eval-rows", type=int, default=128, help="rows for the held-out loss")
    add("--epochs", type=int, default=1)
    add("--max-length", type=int, help="tokens a sample: 256, with --gpu 2048")
    add("--peers", default="", help="more peers: litgpt, llamafactory")
    add("--peer-python", action="append", default=[], metavar="[PEER=]PATH", help="the Python of an environment that has them")
    add("--gpu", action="store_true", help="the part for a GPU")
    add("--device", choices=("cuda", "cpu"), help="cpu: rehearse the part for a GPU, with --tiny")
    add("--tiny", action="store_true", help="a small model instead of a 7B one; with --gpu")
    add("--steps", type=int, default=8, help="optimizer steps, with --gpu")
    add("--vram-gb", type=float, default=7.5, help="what torch may have of the GPU")
    add("--time-limit", type=float, help="seconds after which to stop; the same command goes on from there")
    add("--timeout", type=float, default=600.0, help="seconds for one measurement")
    add("--retry", action="store_true", help="measure again what failed")
    add("--in-process", action="store_true", help="no process for each; a rehearsal, as memory is wrong then")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    add("--prepare", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.started = time.monotonic()
    args.device = args.device or ("cuda" if args.gpu else "cpu")
    args.max_length = args.max_length or (2048 if args.gpu else 256)
    args.rounds = args.rounds or (1 if args.gpu else 3)
    args.peers = [p for p in args.peers.split(",") if p]
    return args


def check(args):
    "Refuse what cannot be."
    if unknown := set(args.peers) - {"litgpt", "llamafactory"}:
        raise InputError(f"--peers {min(unknown)}: there is no such peer; choose litgpt or llamafactory")
    args.peer_python = pythons(args.peer_python, args.peers)
    if args.rows < BATCH: raise InputError(f"--rows {args.rows}: a step takes {BATCH}; ask for that many or more")
    if args.tiny and not args.gpu: raise InputError("--tiny goes with --gpu; without it the model is small anyway")
    rehearsal = args.tiny or args.in_process
    if rehearsal and not args.out: raise InputError("a rehearsal is not kept with the results; give --out FILE")
    if args.gpu and args.device == "cpu" and not args.tiny: raise InputError("a 7B model is too much for a CPU; add --tiny")
    if args.device == "cuda" and not has_cuda():
        raise InputError("no NVIDIA GPU answers; rehearse with --gpu --device cpu --tiny --out FILE")
    if args.data != "pydoc" and not Path(args.data).exists():
        raise InputError(f"--data {args.data}: there is no such file")


def prepared(args, folder):
    "Facts and base of the work folder, made in a process of its own: this one stays small."
    if args.in_process: return prepare_work(args, folder)
    keys = ("gpu", "tiny", "max_length", "data", "rows", "eval_rows")
    write_json(folder / "ask.json", {k: getattr(args, k) for k in keys})
    files = [str(folder / name) for name in ("ask.json", "facts.json")]
    why = apart([sys.executable, __file__, "--prepare", *files], args, None, "prepare")
    if (folder / "facts.json").exists(): found = read_json(folder / "facts.json")
    else: raise InputError(f"model and rows could not be made ({why['error']}); see {args.out.with_suffix('.log')}")
    if "refused" in found: raise InputError(found["refused"])
    return found["facts"], found["base"]


def as_prepare(ask, out):
    "The process that makes model and rows."
    folder = Path(out).parent
    try: facts, base = prepare_work(argparse.Namespace(**read_json(Path(ask))), folder)
    except InputError as e: return write_json(Path(out), {"refused": str(e)})
    write_json(Path(out), {"facts": facts, "base": base})


def run(args, say=print):
    "The exit code."
    if args.child: train_peers.main(*args.child, work=ours); return 0
    if args.prepare: as_prepare(*args.prepare); return 0
    check(args)
    name = "gpu" if args.gpu else "cpu"
    if args.list:
        settings = gpu_settings(args.max_length) if args.gpu else cpu_settings(1, args.peers)
        print(*[f"{s.name:32} {', '.join(s.peers)}" for s in chosen(settings, args.settings)], sep="\n")
        return 0
    args.out = args.out or RESULT
    if args.report:
        for part in read_json(args.out).values(): show(report(part | {"summary": summary(part["measurements"])}))
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.in_process: os.environ.update(QUIET)
    folder = Path(tempfile.mkdtemp(prefix="qlora-train-"))
    try:
        facts, base = prepared(args, folder)
        found = read_json(args.out) if args.out.exists() else {}
        part = open_part(found, name, facts, args)
        per_sequence = max(1.0, args.max_length * facts["train_rows"] / facts["tokens"])
        settings = gpu_settings(args.max_length) if args.gpu else cpu_settings(per_sequence, args.peers)
        settings = chosen(settings, args.settings)
        done = {(m["round"], m["setting"], m["peer"]) for m in part["measurements"]}
        turns = [(n, s, p) for n in range(args.rounds) for s in settings for p in s.peers[::-1 if n % 2 else 1]]
        todo = [(n, s, p) for n, s, p in turns if (n, s.name, p) not in done]
        say(f"{facts['train_rows']} rows, {facts['tokens']:,} tokens, {facts['answer_tokens']:,} of them answers; "
            f"{len(turns)} measurements, {len(turns) - len(todo)} of them made already, into {args.out}")
        whole = measure_all(todo, part, folder, base, args, lambda: write_json(args.out, found), say)
    finally: shutil.rmtree(folder, ignore_errors=True)
    if part["measurements"]: show(report(part))
    if not whole: say("stopped by the time limit; the same command goes on from here")
    return 0 if whole and not any(m["status"] == "failed" for m in part["measurements"]) else 1


def main(argv=None):
    args = command_line(argv)
    try: return run(args)
    except InputError as e: print(f"train: {e}", file=sys.stderr); return 2
    except KeyboardInterrupt:
        print("stopped; what is measured is kept, and the same command goes on from there")
        return 130


if __name__ == "__main__": sys.exit(main())
