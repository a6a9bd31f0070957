"""The scripts that benchmarks/train.py compares with, each as its own documentation shows it, and the watch that counts.

Not run by hand: benchmarks/train.py starts it as `PYTHON benchmarks/train_peers.py JOB ANSWER`, with the Python of an
environment that holds the peer. It imports nothing of this package. All peers get the same tokens and labels, train an
adapter of the same rank, dropout rate and targets with the same learning rate, and are watched by the same few lines.
"""
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


class CannotRun(Exception):
    "The peer is not here, or cannot do what is asked; said in one line."


# ---------------------------------------------------------------- what is watched

def memory_lines():
    "What Linux says of this process, in bytes; nothing elsewhere."
    status = Path("/proc/self/status")
    if not status.exists(): return {}
    pairs = (line.split() for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in pairs}


class Watch:
    "Counts what goes through a training loop and takes its time: from the loop's begin to the end of its last step."
    def __init__(self, job):
        self.pad, self.gpu, self.trainer, self.model = job["pad_token_id"], job["device"] == "cuda", None, None
        self.clear()

    def clear(self):
        self.counts, self.loss, self.at, self.losses, self.norms = 0, 0.0, [], [], []

    def now(self):
        if self.gpu:
            import torch
            torch.cuda.synchronize()
        return time.perf_counter()

    def libraries_loaded(self):
        "From here on, memory is the run's."
        try: Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is none of the run's
        except OSError: pass
        self.start_bytes = memory_lines().get("VmRSS")

    def begin(self):
        self.clear()
        if self.gpu:
            import torch
            torch.cuda.reset_peak_memory_stats()
        self.at.append((self.now(), [0, 0, 0]))
        self.cpu_began = self.cpu_ended = time.process_time()

    def seen(self, ids, labels, mask=None):
        "Answer tokens, tokens, and tokens with padding of a batch, without waiting for the GPU."
        import torch
        real = (ids != self.pad if mask is None or mask.shape != ids.shape else mask != 0).sum()
        return torch.stack([(labels[..., 1:] != IGNORED).sum(), real, torch.full_like(real, ids.numel())])

    def step_end(self):
        when, self.cpu_ended = self.now(), time.process_time()
        self.at.append((when, [int(n) for n in self.counts]))
        self.losses.append(float(self.loss))
        self.loss = 0.0

    def attach(self, trainer):
        "Watch a trainer of transformers or one derived from it."
        from transformers import TrainerCallback
        watch, step = self, trainer.training_step

        class Callback(TrainerCallback):
            def on_train_begin(self, *args, **kw): watch.begin()
            def on_step_end(self, *args, **kw): watch.step_end()
            def on_log(self, args, state, control, logs=None, **kw):
                if "grad_norm" in (logs or {}): watch.norms.append(float(logs["grad_norm"]))

        def counted(model, inputs, *args, **kw):
            seen = watch.seen(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))
            loss = step(model, inputs, *args, **kw)
            watch.counts, watch.loss = watch.counts + seen, watch.loss + loss.detach()
            return loss

        trainer.training_step, watch.trainer, watch.model = counted, trainer, trainer.model
        trainer.add_callback(Callback())
        return trainer

    def figures(self, warm=0):
        "What was measured; the speed is that of the steps after the first `warm`."
        if len(self.at) < 2: raise RuntimeError("no step was seen")
        (began, before), (ended, after) = self.at[warm if len(self.at) > warm + 1 else 0], self.at[-1]
        answer, real, computed = self.at[-1][1]
        return {"steps": len(self.losses), "seconds": round(self.at[-1][0] - self.at[0][0], 3),
                "cpu_seconds": round(self.cpu_ended - self.cpu_began, 3),
                "answer_tokens": answer, "tokens": real, "computed_tokens": computed, "padding": round(1 - real / computed, 4),
                "answer_tokens_per_s": round((after[0] - before[0]) / (ended - began), 1),
                "tokens_per_s": round((after[1] - before[1]) / (ended - began), 1),
                "step_seconds": [round(b[0] - a[0], 3) for a, b in zip(self.at, self.at[1:])],
                "losses": [round(x, 4) for x in self.losses], "grad_norms": [round(x, 5) for x in self.norms], **self.memory()}

    def memory(self):
        "Peaks in bytes: of the process by its growth in RAM, on a GPU what torch and the driver say."
        import torch
        ram = memory_lines().get("VmHWM")
        found = {"ram_growth_bytes": ram and ram - self.start_bytes}
        if not self.gpu: return found
        from qlora_nb.monitor import gpu_process_bytes
        return found | {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
                        "gpu_process_bytes": gpu_process_bytes()}

    def facts(self):
        "How a trainer of transformers went about it."
        args, model = self.trainer.args, self.model
        checkpointing = getattr(args, "activation_checkpointing", None)
        if checkpointing is None: checkpointing = args.gradient_checkpointing
        return {"micro_batch": args.per_device_train_batch_size, "grad_accum": args.gradient_accumulation_steps,
                "checkpointing": bool(checkpointing), "optimizer": str(getattr(args.optim, "value", args.optim)),
                "four_bit_layers": sum(type(m).__name__ == "Linear4bit" and "bitsandbytes" in type(m).__module__
                                       for m in model.modules()),  # peft's around them has the same name
                **self.adapter()}

    def adapter(self):
        "What learns, and on how many threads."
        import torch
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return {"adapter_dtype": str(learned[0].dtype).removeprefix("torch."),
                "adapter_parameters": sum(p.numel() for p in learned), "threads": torch.get_num_threads()}


def heldout_loss(scores, samples, pad, device, batch_size=16):
    "Mean loss of an answer token over held-out samples, whoever trained; `scores` maps token ids to logits."
    import torch
    total, count = 0.0, 0
    samples = sorted(samples, key=lambda s: len(s["input_ids"]))
    for at in range(0, len(samples), batch_size):
        some = samples[at:at + batch_size]
        width = max(len(s["input_ids"]) for s in some)
        padded = lambda name, fill: torch.tensor([s[name] + [fill] * (width - len(s[name])) for s in some], device=device)
        ids, labels = padded("input_ids", pad), padded("labels", IGNORED)[:, 1:]
        with torch.no_grad(): logits = scores(ids)[:, :-1]
        chosen = labels != IGNORED
        total += torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum").item()
        count += int(chosen.sum())
    return total / count


def heldout_of(model, job):
    "The held-out loss of a transformers model."
    if not job["heldout"]: return None
    for module in model.modules():  # bitsandbytes repacks these on some processors, which no peer asked for
        if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = False
    model.eval()
    return round(heldout_loss(lambda ids: model(input_ids=ids, use_cache=False).logits, samples_of(job, "eval"),
                              job["pad_token_id"], model.device), 4)


def samples_of(job, side):
    "The tokens and labels that all are given."
    return json.loads(Path(job["samples"]).read_text())[side]


# ---------------------------------------------------------------- TRL, peft and bitsandbytes, put together plainly

def quantisation(job):
    "NF4 with double quantisation, unless the files come so or 16 bits are wanted."
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig
    ready = getattr(AutoConfig.from_pretrained(job["base"]), "quantization_config", None)
    if job["quant"] == "none" or ready: return {}
    return {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job["dtype"]))}


def sft_arguments(job):
    "SFTConfig: what the job says, and its defaults for all else."
    from trl import SFTConfig
    return SFTConfig(
        output_dir=job["out"], num_train_epochs=job["epochs"], max_steps=job["max_steps"],
        per_device_train_batch_size=job["micro_batch"], gradient_accumulation_steps=job["grad_accum"],
        learning_rate=job["lr"], lr_scheduler_type="cosine", warmup_steps=job["warmup_steps"], max_grad_norm=job["max_grad_norm"],
        optim=job["optimizer"], bf16=job["dtype"] == "bfloat16", max_length=job["max_length"], packing=job["packing"],
        save_strategy="no", report_to="none", disable_tqdm=True, seed=job["seed"], use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=job["device"] == "cuda", **job["more"])


def by_trl(job, watch):
    "A plain script: model, tokenizer, rows, SFTConfig, LoraConfig, train."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer
    import bitsandbytes  # noqa: F401 -- libraries are not the run's memory
    watch.libraries_loaded()
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]), device_map={"": job["device"]},
                                                 **quantisation(job))
    if job["liger"]: with_liger(model)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=job["dropout"], target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args=sft_arguments(job), train_dataset=Dataset.from_list(samples_of(job, "train")),
                         processing_class=AutoTokenizer.from_pretrained(job["base"]), peft_config=lora)
    watch.attach(trainer).train()


def with_liger(model):
    "Liger's kernels for rotation, norm and gated activation; the loss stays the trainer's."
    try: from liger_kernel.transformers import apply_liger_kernel_to_mistral
    except ImportError as e: raise CannotRun(f"liger-kernel cannot be imported ({e})") from None
    apply_liger_kernel_to_mistral(rope=True, rms_norm=True, swiglu=True, cross_entropy=False,
                                  fused_linear_cross_entropy=False, model=model)


# ---------------------------------------------------------------- Unsloth

def by_unsloth(job, watch):
    "Unsloth's notebook for a 4-bit Mistral. It has to be imported before the libraries that it changes."
    if job["device"] != "cuda": raise CannotRun("Unsloth needs a GPU")
    try: from unsloth import FastLanguageModel
    except Exception as e: raise CannotRun(f"Unsloth cannot be imported ({type(e).__name__}: {e})"[:300]) from None
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTTrainer
    watch.libraries_loaded()
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["base"], max_seq_length=job["max_length"], dtype=torch.bfloat16, load_in_4bit=True)
    if job["vram_gb"]: torch.cuda.empty_cache()
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=32, lora_dropout=job["dropout"], bias="none",
        use_gradient_checkpointing=job["unsloth_checkpointing"], random_state=job["seed"])
    job["more"] = {k: v for k, v in job["more"].items() if k == "logging_steps"}  # its own way of recomputing
    trainer = SFTTrainer(model=model, args=sft_arguments(job), train_dataset=Dataset.from_list(samples_of(job, "train")),
                         processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer))
    watch.attach(trainer).train()


# ---------------------------------------------------------------- LLaMA-Factory

def by_llamafactory(job, watch):
    "`llamafactory-cli train` with a file of settings, on tokens that were made before."
    try:
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
        from llamafactory.train.tuner import run_exp
    except Exception as e: raise CannotRun(f"LLaMA-Factory cannot be imported ({type(e).__name__}: {e})"[:300]) from None
    from datasets import Dataset, DatasetDict
    import bitsandbytes, peft  # noqa: F401
    folder = Path(job["out"])
    rows = [{**s, "attention_mask": [1] * len(s["input_ids"])} for s in samples_of(job, "train")]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(str(folder / "tokens"))
    original = CustomSeq2SeqTrainer.train
    CustomSeq2SeqTrainer.train = lambda self, *args, **kw: original(watch.attach(self), *args, **kw)
    nf4 = {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True, "quantization_type": "nf4"}
    watch.libraries_loaded()
    run_exp({
        "model_name_or_path": job["base"], "stage": "sft", "do_train": True, "finetuning_type": "lora", "template": "default",
        "lora_rank": 16, "lora_alpha": 32, "lora_dropout": job["dropout"], "lora_target": ",".join(TARGETS),
        "dataset": "none", "tokenized_path": str(folder / "tokens"), "cutoff_len": job["max_length"],
        "output_dir": str(folder / "model"),
        "per_device_train_batch_size": job["micro_batch"], "gradient_accumulation_steps": job["grad_accum"],
        "num_train_epochs": job["epochs"], "max_steps": job["max_steps"], "learning_rate": job["lr"],
        "lr_scheduler_type": "cosine", "warmup_steps": job["warmup_steps"], "max_grad_norm": job["max_grad_norm"],
        "optim": job["optimizer"], "seed": job["seed"],
        "bf16": job["dtype"] == "bfloat16", "use_cpu": job["device"] == "cpu", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, **(nf4 if job["quant"] == "nf4" else {})})


# ---------------------------------------------------------------- LitGPT

def lit_checkpoint(job, folder):
    "The base in LitGPT's format."
    import torch
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import copy_config_files, save_config
    from safetensors.torch import load_file
    c = json.loads((Path(job["base"]) / "config.json").read_text())
    config = Config(
        name="base", hf_config={"org": "base", "name": "base"}, block_size=c["max_position_embeddings"],
        n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], n_head=c["num_attention_heads"],
        n_query_groups=c["num_key_value_heads"], head_size=c["head_dim"], vocab_size=c["vocab_size"],
        padded_vocab_size=c["vocab_size"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=c["rms_norm_eps"], mlp_class_name="LLaMAMLP",
        intermediate_size=c["intermediate_size"], rope_base=int(c["rope_parameters"]["rope_theta"]))
    weights = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(job["base"]) / "model.safetensors"))
    folder.mkdir(parents=True)
    torch.save(weights, folder / "lit_model.pth")
    save_config(config, folder)
    copy_config_files(Path(job["base"]), folder)
    return folder


def by_litgpt(job, watch):
    "`litgpt finetune_lora` with its own loop, on tokens that were made before; its 4-bit layers need a GPU."
    if job["quant"] != "none" and job["device"] == "cpu": raise CannotRun("LitGPT quantises to NF4 on a GPU only")
    try: from litgpt.finetune import lora
    except Exception as e: raise CannotRun(f"LitGPT cannot be imported ({type(e).__name__}: {e})"[:300]) from None
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule, get_sft_collate_fn
    folder = lit_checkpoint(job, Path(job["out"]) / "base")
    watch.libraries_loaded()

    class Tokens(DataModule):
        prompt_style = None
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None): self.batch_size = batch_size
        def loader(self, side, shuffle):
            rows = [{"input_ids": torch.tensor(s["input_ids"]), "labels": torch.tensor(s["labels"]), "token_counts": {
                "raw": len(s["input_ids"]), "raw_plus_prompt_template": len(s["input_ids"])}} for s in samples_of(job, side)]
            return torch.utils.data.DataLoader(rows, self.batch_size, shuffle=shuffle, collate_fn=counting, drop_last=False)
        def train_dataloader(self): return self.loader("train", True)
        def val_dataloader(self): return self.loader("eval", False)

    class Trained(Exception): pass

    collate, fit = get_sft_collate_fn(pad_id=job["pad_token_id"]), lora.fit

    def counting(samples):
        batch = collate(samples)
        watch.counts = watch.counts + watch.seen(batch["input_ids"], batch["labels"])
        return batch

    def timed(model, optimizer, **kw):  # the loop alone, without what is saved after it
        lora.validate = lambda *args, **more: torch.tensor(0.0)
        step, loss_of = optimizer.step, lora.chunked_cross_entropy
        def stepped(*args, **more): step(*args, **more); watch.step_end()
        def losing(*args, **more):
            loss = loss_of(*args, **more)
            watch.loss += loss.item() / job["grad_accum"]
            return loss
        optimizer.step, lora.chunked_cross_entropy, watch.model = stepped, losing, model
        watch.begin()
        fit(model=model, optimizer=optimizer, **kw)
        raise Trained

    lora.fit = timed
    try:
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": job["lr"], "weight_decay": 0.0}}
        precision = {"bfloat16": "bf16-true", "float32": "32-true"}[job["dtype"]]
        lora.setup(folder, out_dir=Path(job["out"]) / "lit", precision=precision, lora_r=16, lora_alpha=32,
                   lora_dropout=job["dropout"], lora_query=True, lora_key=True, lora_value=True, lora_projection=True,
                   lora_mlp=True, data=Tokens(), eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1),
                   optimizer=adamw, seed=job["seed"], train=TrainArgs(
                       save_interval=None, log_interval=10, micro_batch_size=job["micro_batch"], epochs=10**6,
                                   global_batch_size=job["micro_batch"] * job["grad_accum"], max_steps=job["steps"],
                                   lr_warmup_steps=max(1, job["warmup_steps"])))
    except Trained: pass


def lit_facts(job, watch):
    "What LitGPT's loop has no arguments object for."
    watch.model.eval()
    loss = heldout_loss(lambda ids: watch.model(ids), samples_of(job, "eval"), job["pad_token_id"], "cpu")
    return {"micro_batch": job["micro_batch"], "grad_accum": job["grad_accum"], "checkpointing": False,
            "optimizer": "torch.optim.AdamW", **watch.adapter(), "heldout_loss": round(loss, 4)}


# ---------------------------------------------------------------- one job

PEERS = {"plain": by_trl, "unsloth": by_unsloth, "llamafactory": by_llamafactory, "litgpt": by_litgpt}
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "litgpt", "llamafactory", "unsloth", "liger-kernel")


def versions_here():
    "What is installed of what matters."
    from importlib import metadata
    found = {}
    for name in PACKAGES:
        try: found[name] = metadata.version(name)
        except metadata.PackageNotFoundError: pass
    return found


def answer(job, work):
    "Do a job by a function of (job, watch); what was measured, or why not."
    watch, began = Watch(job), time.perf_counter()
    random.seed(job["seed"])
    try:
        work(job, watch)
        found = {**watch.figures(job["warm_steps"]), "whole_seconds": round(time.perf_counter() - began, 1),
                 "versions": versions_here()}
        if job["peer"] == "litgpt": found |= lit_facts(job, watch)
        else: found |= watch.facts() | {"heldout_loss": heldout_of(watch.model, job)}
        return found | ({"error": e} if (e := wrong(found, job)) else {})
    except CannotRun as e: return {"cannot_run": str(e)}
    except Exception as e:  # whatever goes wrong with one must not stop the others
        traceback.print_exc()
        return {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:400]}


def wrong(found, job):
    "What shows that nothing was learned, or None."
    losses, norms = found["losses"], found["grad_norms"]
    if not all(x == x and abs(x) < float("inf") for x in losses): return "the loss is not finite"
    if not all(0 < n < float("inf") for n in norms) or (job["norms"] and not norms): return f"gradient norms: {norms[:5]}"
    few = max(1, len(losses) // 4)
    if job["strict"] and not sum(losses[-few:]) < sum(losses[:few]): return f"the loss did not fall: {losses[0]} to {losses[-1]}"


def limited(job):
    "Let torch have no more of the GPU than a smaller card would leave it."
    if job["device"] != "cuda" or not job["vram_gb"]: return
    if job["peer"] == "unsloth":
        try: import unsloth  # noqa: F401 -- before torch and transformers, which it changes
        except Exception: pass  # `by_unsloth` says it
    from vram_matrix import hold_to
    hold_to(job["vram_gb"])


def main(job_file, answer_file, work=None):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    job = json.loads(Path(job_file).read_text())
    limited(job)
    found = answer(job, work or PEERS[job["peer"]])
    part = Path(f"{answer_file}.part")
    part.write_text(json.dumps(found))
    os.replace(part, answer_file)


if __name__ == "__main__": main(*sys.argv[1:])
