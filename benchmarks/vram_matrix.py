"""Measures the memory of real training steps on an NVIDIA GPU and sets it beside what `predict` says of them.

    .venv/bin/python benchmarks/vram_matrix.py                         all configurations, into benchmarks/results/
    .venv/bin/python benchmarks/vram_matrix.py --list                  what they are; needs no GPU
    .venv/bin/python benchmarks/vram_matrix.py --configs "phi-3;1x512" those whose name holds one of these
    .venv/bin/python benchmarks/vram_matrix.py --report                the table again, predicted anew
    .venv/bin/python benchmarks/vram_matrix.py --tiny --out FILE       a rehearsal with small models, on any machine

Nothing is downloaded: the models have the real shapes and random weights. The weights are made on the GPU one tensor at
a time and go through transformers' own loader, so the 16-bit model never exists; adapters, trainer, generation and
merge are the package's. Each configuration runs in a process of its own and is written to the file when it is done. The
same command again measures what is missing; Ctrl-C and --time-limit lose nothing but the configuration at work. One
that fails is recorded with its reason and the others go on; --retry tries it again. What the processes said stands
beside the file, in a .log. Exit code 0: all are measured; 1: some failed or are left; 2: bad input; 130: Ctrl-C.

A GPU machine without a network has to be brought what it lacks: on one with a network, download the wheels of what
requirements.txt names (bitsandbytes, trl, peft, datasets, pydantic, nvidia-ml-py and their needs, and transformers if
the one there is older than settings.ini asks for) and unpack them into one folder, SITE below. There, in a copy of the
project, as often as it takes:

    PYTHONPATH=$PWD:SITE HF_HUB_OFFLINE=1 python3 benchmarks/vram_matrix.py --out FILE --time-limit 570

Where the machine is a new one each time, put FILE back first. A configuration is estimated at half a minute, most of it
imports, and the whole matrix at 20 minutes; the merge writes and reads 8 GB where TMPDIR points.

What is compared. `allocated`: the most that torch's tensors took; predicted without what the optimizer may page out,
which is not in torch's pool. `reserved`: the most that torch asked the driver for. `process`: what the driver says this
process holds, or, where it does not say, what the whole GPU holds more than before; predicted with one constant for
context, the median of process - reserved over the runs whose optimizer pages nothing. For the merge, which is done in
RAM, `process` is the growth there.
"""
import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from qlora_nb.config import Run, has_cuda, read_json, validated, versions, write_json
from qlora_nb.vram_budget import MODELS, OVERHEAD, InputError, ModelShape, Overhead, predict, read_config

RESULT = Path(__file__).parent / "results" / "vram_matrix.json"
STEPS, ACCUMULATION = 3, 2  # from the second forward pass on gradients exist; from the second step on, optimizer states


# ---------------------------------------------------------------- what is measured

@dataclass(frozen=True)
class Config:
    "One thing to measure."
    model: str       # of the catalogue
    kind: str        # training, evaluation, generation or merge
    settings: dict   # what is asked of `predict` and its like, beside what the device decides
    note: str = ""

    @property
    def name(self):
        s = self.settings
        rows = f"{s.get('batch', s.get('micro_batch', 1))}x{s.get('prompt', s.get('seq_len', 0))}"
        kind = "" if self.kind == "training" else self.kind
        return " ".join(w for w in (self.model, "" if kind == "merge" else rows, kind, self.note) if w)


NO_CHECKPOINTS = {"checkpointing": False}
OFFLOADING = {"checkpointing": False, "offloading": True}
TRAINING = {  # model: (micro-batch, tokens a row, what differs from the defaults, how the table calls it)
    "mistral-7b": [
        (1, 2048, {}, ""), (2, 2048, {}, ""), (1, 1024, NO_CHECKPOINTS, "no checkpointing"),
        (1, 512, {"rank": 64}, "r=64"), (2, 512, {"fused_loss": False}, "materialised loss"),
        (1, 2048, OFFLOADING, "offloading"), (2, 1024, {"padded": True}, "padded"),
        (2, 1024, {"optimizer": "paged_adamw_8bit", "lora_dropout": 0.0}, "8-bit Adam, no dropout"),
        (1, 2048, {"packed": True}, "packed")],
    "llama-3-8b": [
        (1, 2048, {}, ""), (2, 2048, {"optimizer": "paged_adamw_8bit"}, "8-bit Adam"),
        (1, 2048, {"fused_loss": False}, "materialised loss"), (2, 1024, {"rank": 8}, "r=8"),
        (1, 1024, NO_CHECKPOINTS | {"lora_dropout": 0.0}, "no checkpointing, no dropout"),
        (2, 512, {"double_quant": False}, "no double quant"), (1, 512, {"optimizer": "adamw_torch"}, "adamw_torch"),
        (1, 2048, {"offloading": True}, "checkpointing and offloading")],
    "gemma-7b": [
        (1, 2048, {}, ""), (2, 2048, {"lora_dropout": 0.0}, "no dropout"),
        (1, 1024, {"fused_loss": False, "optimizer": "adamw_8bit"}, "materialised loss, 8-bit Adam"),
        (2, 1024, NO_CHECKPOINTS, "no checkpointing"), (1, 512, {"rank": 64}, "r=64"),
        (2, 512, {"optimizer": "adamw_8bit"}, "8-bit Adam"), (1, 2048, OFFLOADING, "offloading"),
        (2, 1024, {"padded": True}, "padded")],
    "phi-3-mini": [
        (1, 2048, {}, ""), (2, 2048, {"rank": 8, "lora_dropout": 0.0}, "r=8, no dropout"),
        (1, 1024, NO_CHECKPOINTS, "no checkpointing"), (2, 1024, {"fused_loss": False}, "materialised loss"),
        (1, 512, {}, ""), (2, 512, {"double_quant": False, "optimizer": "adamw_8bit"}, "no double quant, 8-bit Adam"),
        (1, 2048, OFFLOADING, "offloading"), (1, 2048, {"packed": True}, "packed"),
        (2, 1024, {"padded": True}, "padded")],
}


def real_matrix():
    "Every configuration at full size, so ordered that an early end leaves something of everything."
    by_model = [[training(model, *row) for row in rows] for model, rows in TRAINING.items()]
    trained = [c for rank in range(max(map(len, by_model))) for rows in by_model for c in rows[rank:rank + 1]]
    asked = {"prompt": 512, "new_tokens": 256}
    answers = [Config(m, "generation", {"batch": n} | asked) for n in (1, 8) for m in TRAINING]
    scored = [Config(m, "evaluation", {"seq_len": 2048, "micro_batch": 1}) for m in TRAINING]
    merged = Config("phi-3-mini", "merge", {"rank": 16})
    return [*trained[:4], *answers[:4], *trained[4:], *answers[4:], *scored, merged]


def tiny_matrix():
    "The same kinds of work on small models; offloading fails without a GPU, as it should."
    changes = {"mistral-7b": ({}, ""), "llama-3-8b": ({"fused_loss": False}, "materialised loss"),
               "gemma-7b": (NO_CHECKPOINTS | {"lora_dropout": 0.0, "rank": 4}, "no checkpointing"),
               "phi-3-mini": ({"padded": True}, "padded")}
    trained = [training(m, 2, 64, c, note) for m, (c, note) in changes.items()]
    more = [training("mistral-7b", 1, 64, OFFLOADING, "offloading"),
            training("llama-3-8b", 1, 64, {"packed": True}, "packed"),
            Config("mistral-7b", "generation", {"batch": 2, "prompt": 16, "new_tokens": 8}),
            Config("gemma-7b", "evaluation", {"seq_len": 64, "micro_batch": 2}),
            Config("phi-3-mini", "merge", {"rank": 4})]
    return trained + more


def training(model, micro_batch, seq_len, changes, note):
    "A training configuration, its settings complete."
    usual = {"rank": 16, "lora_dropout": 0.05, "optimizer": "paged_adamw_32bit"}
    return Config(model, "training", {"seq_len": seq_len, "micro_batch": micro_batch} | usual | changes, note)


def chosen(matrix, parts):
    "The configurations whose name is, or else holds, one of some texts divided by semicolons."
    names, wanted = [c.name for c in matrix], set()
    for word in filter(None, map(str.strip, parts.split(";"))) if parts else names:
        found = {word} & set(names) or {name for name in names if word in name}
        if not found: raise InputError(f"no configuration has {word!r} in its name; see --list")
        wanted |= found
    return [c for c in matrix if c.name in wanted]


# ---------------------------------------------------------------- memory, as torch, the driver and the system see it

def driver():
    "NVML's handle of the GPU that CUDA will call 0, or None."
    from qlora_nb.calibrate import gpu_handle
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return gpu_handle() if has_cuda() and not hidden else None


def gpu_used(handle):
    "Bytes in use on the whole GPU."
    import pynvml
    return pynvml.nvmlDeviceGetMemoryInfo(handle).used


class Meter:
    "Peak memory of what happens inside. On a GPU a look after each step is enough: torch's pool does not shrink."
    def __init__(self, handle, before):
        import psutil
        self.handle, self.before, self.own, self.grown = handle, before, [], []
        self.me, self.done, self.ram = psutil.Process(), threading.Event(), [0, 0]

    def __enter__(self):
        self.start = self.resident()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set(); self.thread.join()

    def resident(self):
        "All that is in RAM, and what of it is not a view of a file."
        m = self.me.memory_info()
        return m.rss, m.rss - getattr(m, "shared", 0)

    def watch(self):
        while not self.done.wait(0.05 if self.handle else 0.005):
            self.ram = [max(old, new) for old, new in zip(self.ram, self.resident())]

    def loaded(self):
        "Forget the peak of loading."
        if self.handle is None: return
        import torch
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def look(self):
        "Ask the driver."
        from qlora_nb.monitor import gpu_process_bytes
        if self.handle is None: return
        if (held := gpu_process_bytes()) is not None: self.own.append(held)
        self.grown.append(gpu_used(self.handle) - self.before)

    def figures(self):
        "What was measured, in bytes; None for what this machine cannot say."
        import torch
        self.look()
        ram, private = (max(high - low, 0) for high, low in zip(self.ram, self.start))
        own_ram = {"ram_growth_bytes": ram, "ram_private_growth_bytes": private}
        if self.handle is None:
            return {"allocated_peak_bytes": None, "reserved_peak_bytes": None, "process_peak_bytes": ram,
                    "process_source": "growth in RAM", "gpu_growth_bytes": None, **own_ram}
        return {"allocated_peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
                "process_peak_bytes": max(self.own or self.grown),
                "process_source": "this process, by the driver" if self.own else "growth of the GPU, by the driver",
                "gpu_growth_bytes": max(self.grown), **own_ram}


# ---------------------------------------------------------------- models of real shape, made of nothing

def shape_config(model, tiny):
    "A catalogue model's config.json, or a small one of its family."
    config = read_config(MODELS / f"{model}.json")
    if not tiny: return config
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    return config | {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 4 // groups, "vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "sliding_window": 63 if config.get("sliding_window") else None}


class RandomWeight:
    "Stands for a tensor in a checkpoint; it comes into being when the loader reads it."
    def __init__(self, shape, device): self.shape, self.device = shape, device

    def __getitem__(self, index):
        import torch
        weight = torch.empty(self.shape, dtype=torch.bfloat16, device=self.device)
        return weight.fill_(1) if len(self.shape) == 1 else weight.normal_(std=0.02)


def random_model(config, quant="nf4", double_quant=True, where=None):
    "What `qlora_nb.model.load_base` would return if a checkpoint of random weights were on the disk."
    import torch
    from qlora_nb.model import compute_dtype, device, keep_autograd
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    config = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "hub_id"})
    with torch.device("meta"): empty = AutoModelForCausalLM.from_config(config)
    weights = {name: RandomWeight(p.shape, device()) for name, p in empty.named_parameters()}
    dtype = compute_dtype() if quant == "nf4" else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
                             bnb_4bit_compute_dtype=dtype)
    torch.manual_seed(0)
    model = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, quantization_config=nf4 if quant == "nf4" else None,
        device_map={"": where or device()}, attn_implementation="sdpa")
    keep_autograd(model)
    return model.eval()


# ---------------------------------------------------------------- the work itself

def run_config(c, path="random"):
    "The `RunConfig` of a configuration."
    get = c.settings.get
    train = {"micro_batch": get("micro_batch", 1), "grad_accum": ACCUMULATION, "max_steps": STEPS, "log_steps": 1,
             "optimizer": get("optimizer", "paged_adamw_32bit"), "activation_checkpointing": get("checkpointing", True),
             "activation_offloading": get("offloading", False),
             "lora": {"r": get("rank", 16), "dropout": get("lora_dropout", 0.05)}}
    data = {"path": "random", "max_length": get("seq_len", 2048)}
    return validated({"model": {"name": c.model, "path": path, "double_quant": get("double_quant", True)},
                      "data": data, "train": train})


def random_rows(c, vocab):
    "Rows of random tokens, all of them trained, of the lengths that a configuration wants, in its order."
    from datasets import Dataset
    s = c.settings
    wanted, n = s["micro_batch"] * ACCUMULATION * STEPS, s["seq_len"]
    lengths = [n] * wanted
    if s.get("padded"): lengths = [n, n * 7 // 8] * (wanted // 2)
    if s.get("packed"): lengths = [n // 4] * 4 * wanted
    draw = random.Random(0)
    rows = [[draw.randrange(4, vocab) for _ in range(length)] for length in lengths]
    return Dataset.from_list([{"input_ids": r, "labels": r, "length": len(r)} for r in rows])


def arguments(c, folder, rows):
    "What `qlora train` would give the trainer, without evaluations, checkpoints and logs."
    from qlora_nb.model import compute_dtype
    from qlora_nb.train import trainer_arguments
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
    args = trainer_arguments(Run(folder), run_config(c), compute_dtype(), rows)
    args.eval_strategy, args.save_strategy, args.do_eval = IntervalStrategy.NO, SaveStrategy.NO, False
    args.load_best_model_at_end, args.report_to, args.train_sampling_strategy = False, [], "sequential"
    if c.settings.get("packed"): args.packing, args.max_length = True, c.settings["seq_len"]
    return args


def trainer_class(fused_loss):
    "The package's trainer, or one that holds the scores of all tokens as transformers' own does."
    from qlora_nb.checkpoint import ResumableTrainer
    from transformers import Trainer

    class MaterialisedLoss(ResumableTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, return_outputs, num_items_in_batch)
    return ResumableTrainer if fused_loss else MaterialisedLoss


def now():
    "Seconds, with all work on the GPU done."
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.monotonic()


def step_clock(meter):
    "A callback that times each optimizer step and looks at the memory after it."
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds = []
        def on_step_begin(self, *args, **kw): self.began = now()
        def on_step_end(self, *args, **kw): self.seconds = [*self.seconds, now() - self.began]; meter.look()
    return Clock()


def do_training(c, config, meter, folder):
    "A few optimizer steps."
    from qlora_nb.adapter import add_adapter
    from qlora_nb.model import load_tokenizer
    from transformers import PrinterCallback
    s, rows = c.settings, random_rows(c, config["vocab_size"])
    model = add_adapter(random_model(config, double_quant=s.get("double_quant", True)), run_config(c).train)
    trainer = trainer_class(s.get("fused_loss", True))(
        model, arguments(c, folder, len(rows)), train_dataset=rows, processing_class=load_tokenizer("tiny"),
        callbacks=[clock := step_clock(meter)])
    trainer.remove_callback(PrinterCallback)
    meter.loaded()
    loss = trainer.train().training_loss
    tokens, warm = s["seq_len"] * s["micro_batch"] * ACCUMULATION, clock.seconds[1:]
    lora = next(p for p in model.parameters() if p.requires_grad)  # the trainer decides on its precision
    return {"settings": {"lora_bytes": lora.element_size()}, "loss": round(loss, 4),
            "step_seconds": [round(t, 3) for t in clock.seconds],
            "tokens_per_s": round(tokens * len(warm) / sum(warm), 1)}


def tuned_model(c, config):
    "Base and adapter, ready to answer."
    from qlora_nb.adapter import add_adapter
    return add_adapter(random_model(config), run_config(c).train).eval()


def do_generation(c, config, meter, folder):
    "Answers of full length, with sampling."
    import torch
    from qlora_nb.contract import Encoder, make_contract
    from qlora_nb.generate import settings
    from qlora_nb.model import Loaded, load_tokenizer
    s, tokenizer = c.settings, load_tokenizer("tiny")
    loaded = Loaded(tuned_model(c, config), Encoder(make_contract(tokenizer, run_config(c)), tokenizer))
    ids = torch.randint(4, config["vocab_size"], (s["batch"], s["prompt"])).to(loaded.model.device)
    meter.loaded()
    for new_tokens in (4, s["new_tokens"]):  # the first one loads kernels, and is not timed
        wishes = settings(loaded, new_tokens, temperature=0.7, top_p=0.9)
        wishes["generation_config"].eos_token_id = -1  # no token ends an answer: it gets its full length
        start = now()
        with torch.inference_mode():
            out = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wishes)
        seconds = now() - start
    made = out.shape[1] - s["prompt"]
    if made != s["new_tokens"]: raise RuntimeError(f"{made} tokens were generated instead of {s['new_tokens']}")
    return {"tokens_per_s": round(made * s["batch"] / seconds, 1)}


def do_evaluation(c, config, meter, folder):
    "The loss of every token, as perplexity is measured."
    import torch
    from qlora_nb.evaluation import answer_nll
    s, model = c.settings, tuned_model(c, config)
    ids = torch.randint(4, config["vocab_size"], (s["micro_batch"], s["seq_len"])).to(model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    meter.loaded()
    for _ in range(2):
        start = now()
        with torch.inference_mode(): nll = answer_nll(model, batch)
        seconds = now() - start
    return {"loss": round(nll.sum().item() / nll.numel(), 4), "tokens_per_s": round(ids.numel() / seconds, 1)}


def merge_run(c, config, folder):
    "A run folder, as far as merging reads it, and its base beside it."
    from qlora_nb.adapter import add_adapter
    from qlora_nb.contract import Encoder, make_contract
    from qlora_nb.model import load_tokenizer, save_tokenizer
    run, settings, tokenizer = Run(folder / "run"), run_config(c, str(folder / "base")), load_tokenizer("tiny")
    random_model(config, quant="none", where="cpu").save_pretrained(folder / "base")
    add_adapter(random_model(config), settings.train).save_pretrained(run.adapter)
    encoder = Encoder(make_contract(tokenizer, settings), tokenizer)
    save_tokenizer(encoder, run.adapter)
    encoder.contract.save(run.contract_file)
    return run


def do_merge(c, config, meter, folder):
    "The tuned model loaded, and its adapter merged into the 16-bit base in RAM."
    from qlora_nb.export import merged_model
    from qlora_nb.model import load_run
    from qlora_nb.monitor import release_freed
    run = merge_run(c, config, folder)
    gc.collect(); release_freed()
    with Meter(None, 0) as ram:
        tuned, start = load_run(run), time.monotonic()
        merged_model(run, tuned.contract)
        seconds = time.monotonic() - start
    return {"merge_seconds": round(seconds, 1), "measured": ram.figures()}


WORK = {"training": do_training, "evaluation": do_evaluation, "generation": do_generation, "merge": do_merge}


def device_settings(kind):
    "What the device decides, in the words of `Settings`, as `qlora_nb.train.plan` finds it."
    from qlora_nb.model import adapter_dtype, compute_dtype, device
    compute = compute_dtype()
    return {"device": device(), "compute_bytes": compute.itemsize, "lora_bytes": adapter_dtype(compute).itemsize,
            "autocast": kind == "training" and compute.itemsize == 2}


def measure(c, facts, tiny=False, vram_gb=None):
    "One configuration, here and now; `facts` gets what is known as soon as it is."
    handle = driver()
    before = gpu_used(handle) if handle else 0  # torch has not touched the GPU yet
    import torch
    import bitsandbytes, datasets, peft, trl  # noqa: F401 -- libraries are not the run's memory
    if not torch.cuda.is_available():
        if not tiny: raise InputError("torch does not see the GPU; install a CUDA build of it, or rehearse with --tiny")
        handle = None
    facts |= {"settings": c.settings | device_settings(c.kind), "cuda": torch.version.cuda}
    predicted(c.model, c.kind, facts["settings"], tiny)  # refuses what cannot be
    if handle and vram_gb: hold_to(vram_gb)
    quiet()
    with tempfile.TemporaryDirectory() as folder, Meter(handle, before) as meter:
        more = WORK[c.kind](c, shape_config(c.model, tiny), meter, Path(folder))
        facts |= {"measured": meter.figures()} | more | {"settings": facts["settings"] | more.get("settings", {})}


def hold_to(vram_gb):
    "Let torch reserve no more than a smaller card would leave it."
    import torch
    room = vram_gb * 1e9 - OVERHEAD["cuda"].context_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / torch.cuda.get_device_properties(0).total_memory))


def quiet():
    "No bars and no advice about models that exist for a minute."
    import datasets, transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ---------------------------------------------------------------- one configuration at a time, each on its own

def measured_here(c, args):
    "Measure in this process."
    facts = {}
    try: measure(c, facts, args.tiny, args.vram_gb)
    except Exception as e:  # whatever goes wrong with one must not stop the others
        if not isinstance(e, InputError): traceback.print_exc()
        facts["error"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:400]
    gc.collect()
    return facts


def measured_apart(c, args, seconds):
    "Measure in a new process, which gets so many seconds."
    with tempfile.TemporaryDirectory() as folder, open(args.out.with_suffix(".log"), "ab") as log:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--child", c.name, "--out", str(answer), *["--tiny"] * args.tiny]
        if args.vram_gb: command += ["--vram-gb", str(args.vram_gb)]
        log.write(f"\n=== {c.name}\n".encode()); log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   env={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ})
        try: code = process.wait(seconds)
        except subprocess.TimeoutExpired: return {"error": f"took longer than {seconds:.0f} s"}
        finally:
            if process.poll() is None: process.kill(); process.wait()
        if answer.exists(): return read_json(answer)
        return {"error": f"the process ended with exit code {code}"}


def machine(args):
    "Where this runs, without importing torch."
    import pynvml
    from qlora_nb.calibrate import cpu_name
    facts = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system(), **versions(), "tiny": args.tiny,
             "vram_gb": args.vram_gb, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}
    if not (handle := driver()): return {"gpu": None} | facts
    return {"gpu": pynvml.nvmlDeviceGetName(handle), "vram_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            "driver": pynvml.nvmlSystemGetDriverVersion()} | facts


def open_results(args):
    "What the file holds already, if it comes from this machine."
    here = machine(args)
    if not args.out.exists(): return {"machine": here, "results": {}}
    found = read_json(args.out)
    there = {k: found.get("machine", {}).get(k) for k in here}
    if differs := [f"{k}={there[k]} there, {here[k]} here" for k in here if there[k] != here[k]]:
        raise InputError(f"{args.out} was measured elsewhere ({'; '.join(differs[:3])}); choose another --out")
    return found


def measure_all(todo, found, args, say):
    "Measure what is missing, writing each result as it comes; whether time was left for all."
    started, longest = time.monotonic(), 0.0
    for i, c in enumerate(todo):
        left = args.time_limit - (time.monotonic() - started) if args.time_limit else float("inf")
        if left < max(longest, 1.0): return False
        say(f"[{i + 1}/{len(todo)}] {c.name} ...")
        began = time.monotonic()
        facts = measured_here(c, args) if args.in_process else measured_apart(c, args, min(args.timeout, left))
        spent = time.monotonic() - began
        if "error" in facts and left < args.timeout and spent >= left: return False  # ours to blame, not its own
        longest = max(longest, spent)
        found["machine"]["cuda"] = facts.pop("cuda", found["machine"].get("cuda"))
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        found["results"][c.name] = {"model": c.model, "kind": c.kind, "status": "failed" if "error" in facts else "ok",
                                    "settings": c.settings, **facts, "seconds": round(spent, 1), "measured_at": at}
        write_json(args.out, with_predictions(found))
        say(f"    {facts.get('error') or shown_bytes(facts['measured'])}, {spent:.0f} s")
    return True


def shown_bytes(measured):
    "What was measured, for people."
    return ", ".join(f"{k} {measured[f'{k}_peak_bytes'] / 1e9:.3f} GB" for k in ("allocated", "reserved", "process")
                     if measured[f"{k}_peak_bytes"] is not None)


# ---------------------------------------------------------------- predicted beside measured

def predicted(model, kind, settings, tiny, overhead=None):
    "The `Budget` of a configuration; an `InputError` where its settings cannot be."
    from qlora_nb.phases import predict_evaluation, predict_generation, predict_merge
    predictors = {"training": predict, "evaluation": predict_evaluation, "generation": predict_generation,
                  "merge": predict_merge}
    return predictors[kind](ModelShape.from_config(shape_config(model, tiny), model), overhead=overhead, **settings)


def budget_of(result, tiny, overhead=None):
    "The `Budget` of a result, or None where there can be none."
    if "device" not in result["settings"]: return None  # its process ended before it said
    with contextlib.suppress(InputError):
        return predicted(result["model"], result["kind"], result["settings"], tiny, overhead)


def error_percent(expected, measured):
    "How far a prediction is off, in percent of what was measured."
    return round(100 * (expected / measured - 1), 2) if measured else None


def calibrated(runs):
    "From pairs of measured and `Budget`: the constant for context, and whether `process` counts what may be paged out."
    known = [(m["process_peak_bytes"] - m["reserved_peak_bytes"], b.pageable_bytes) for m, b in runs]
    if not known: return None, None
    context = statistics.median([beside for beside, paged in known if not paged] or [beside for beside, _ in known])
    shares = [(beside - context) / paged for beside, paged in known if paged]
    return round(context), statistics.median(shares) > 0.5 if shares and len(shares) < len(known) else None


def with_predictions(found):
    "The results with predictions by the formula as it is now, errors, and a summary."
    tiny = found["machine"]["tiny"]
    results = {name: r | {"predicted": None, "error_percent": None} for name, r in found["results"].items()}
    budgets = {name: budget_of(r, tiny) for name, r in results.items()}
    on_gpu = [name for name, r in results.items()
              if r["status"] == "ok" and budgets[name] and r["measured"]["reserved_peak_bytes"]]
    context, paged_counted = calibrated([(results[name]["measured"], budgets[name]) for name in on_gpu])
    overhead = Overhead(context, OVERHEAD["cuda"].fragments, "measured") if on_gpu else None
    for name, b in budgets.items():
        if b is None: continue
        now_known = budget_of(results[name], tiny, overhead if name in on_gpu else None)
        set_beside(results[name], b, now_known, paged_counted)
    return found | {"results": results, "summary": summary(results, on_gpu, context, paged_counted)}


def set_beside(result, assumed, budget, paged_counted):
    "Put prediction and errors into a result."
    in_torch = budget.active_bytes - budget.pageable_bytes
    process = budget.peak_bytes - (budget.pageable_bytes if paged_counted is False else 0)
    result["predicted"] = {
        "allocated_bytes": in_torch, "process_bytes": process, "pageable_bytes": budget.pageable_bytes,
        "uncalibrated_peak_bytes": assumed.peak_bytes, "components": budget.components}
    if result["status"] != "ok": return
    m = result["measured"]
    m["context_bytes"] = m["process_peak_bytes"] - m["reserved_peak_bytes"] if m["reserved_peak_bytes"] else None
    result["error_percent"] = {"allocated": error_percent(in_torch, m["allocated_peak_bytes"]),
                               "process": error_percent(process, m["process_peak_bytes"])}


def summary(results, on_gpu, context, paged_counted):
    "The errors of all runs on the GPU, after one constant for context."
    spare = [(m := results[name]["measured"])["reserved_peak_bytes"] / m["allocated_peak_bytes"] - 1 for name in on_gpu]
    ok = sum(r["status"] == "ok" for r in results.values())
    facts = {"ok": ok, "failed": len(results) - ok, "on_gpu": len(on_gpu), "context_bytes": context,
             "paged_state_in_process": paged_counted,
             "fragments_median": round(statistics.median(spare), 4) if spare else None}
    for kind in ("allocated", "process"):
        errors = {name: abs(results[name]["error_percent"][kind]) for name in on_gpu}
        worst = max(errors, key=errors.get, default=None)
        facts[f"{kind}_error_percent"] = {"mean": round(statistics.mean(errors.values()), 2), "worst": errors[worst],
                                          "worst_at": worst} if errors else None
    return facts


def report(found):
    "The results as a table in Markdown, and the summary."
    gb = lambda n: "" if n is None else f"{n / 1e9:.3f}"
    off = lambda n: "" if n is None else f"{n:+.1f} %"
    lines = ["| configuration | predicted, GB | allocated | error | reserved | process | error | tokens/s |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, r in found["results"].items():
        if r["status"] != "ok": lines.append(f"| {name} | {r['error'].replace('|', '/')} |" + " |" * 6); continue
        m, p, e = r["measured"], r["predicted"], r["error_percent"]
        speed = f"{r['tokens_per_s']:,.0f}" if "tokens_per_s" in r else ""
        cells = [name, gb(p["process_bytes"]), gb(m["allocated_peak_bytes"]), off(e["allocated"]),
                 gb(m["reserved_peak_bytes"]), gb(m["process_peak_bytes"]), off(e["process"]), speed]
        lines.append("| " + " | ".join(cells) + " |")
    s = found["summary"]
    lines += ["", f"{s['ok']} measured, {s['failed']} failed."]
    if (e := s["process_error_percent"]) and (a := s["allocated_error_percent"]):
        lines += [f"{what}: off by {x['mean']:.1f} % on average, {x['worst']:.1f} % at worst ({x['worst_at']})."
                  for what, x in (("process", e), ("allocated", a))]
        lines += [f"context: {s['context_bytes'] / 2**20:.0f} MiB."]
    return "\n".join(lines)


def show(text):
    "Markdown, drawn if a person is looking."
    if not sys.stdout.isatty(): return print(text)
    from rich.console import Console
    from rich.markdown import Markdown
    Console().print(Markdown(text))


# ---------------------------------------------------------------- the command

def command_line(argv):
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="More in the file's docstring.")
    add = parser.add_argument
    add("--out", type=Path, help="the JSON file; written after each configuration")
    add("--configs", help="only those whose name holds one of these texts, divided by semicolons")
    add("--list", action="store_true", help="print the configurations and stop")
    add("--report", action="store_true", help="predict anew, print the table and stop")
    add("--tiny", action="store_true", help="rehearse with small models, on a CPU if need be")
    add("--in-process", action="store_true", help="no process for each; for --tiny only")
    add("--time-limit", type=float, help="seconds after which to stop; the same command goes on from there")
    add("--timeout", type=float, default=240.0, help="seconds for one configuration")
    add("--retry", action="store_true", help="measure again what failed")
    add("--vram-gb", type=float, help="let torch have no more than a card of this size would leave it")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(args, say=print):
    "The exit code."
    matrix = tiny_matrix() if args.tiny else real_matrix()
    if args.child:
        write_json(args.out, measured_here(next(c for c in matrix if c.name == args.child), args))
        return 0
    todo = chosen(matrix, args.configs)
    if args.list:
        print(*[f"{c.name:50} {c.kind:11} {json.dumps(c.settings)}" for c in todo], sep="\n")
        return 0
    if args.in_process and not args.tiny: raise InputError("--in-process would measure what was left over; add --tiny")
    if args.tiny and not args.out: raise InputError("a rehearsal is not kept with the results; give --out FILE")
    args.out = args.out or RESULT
    if args.report: return report_again(args)
    if not args.tiny and not has_cuda(): raise InputError("no NVIDIA GPU answers; rehearse with --tiny --out FILE")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = open_results(args)
    done = {name for name, r in found["results"].items() if r["status"] == "ok" or not args.retry}
    missing = [c for c in todo if c.name not in done]
    say(f"{len(todo)} configurations, {len(todo) - len(missing)} of them measured already, into {args.out}")
    whole = measure_all(missing, found, args, say)
    if found["results"]: show(report(with_predictions(found)))
    if not whole: say("stopped by the time limit; the same command goes on from here")
    return 0 if whole and all(found["results"][c.name]["status"] == "ok" for c in todo) else 1


def report_again(args):
    "Predict anew, keep it and show it."
    found = with_predictions(read_json(args.out))
    write_json(args.out, found)
    show(report(found))
    return 0


def main(argv=None):
    args = command_line(argv)
    try: return run(args)
    except InputError as e: print(f"vram_matrix: {e}", file=sys.stderr); return 2
    except KeyboardInterrupt:
        print("stopped; what is measured is kept, and the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
