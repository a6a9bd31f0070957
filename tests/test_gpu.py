"What only a GPU can show: the prediction of a real shape beside torch's own count, and a training step on CUDA."
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from qlora_nb.config import has_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="no NVIDIA GPU")]
SCRIPT = ROOT / "benchmarks" / "vram_matrix.py"


@pytest.mark.parametrize("kind", ["phi-3-mini 1x512", "phi-3-mini 1x512 generation"])
def test_tensors_of_a_real_shape_are_predicted_within_5_percent(tmp_path, kind):
    out = tmp_path / "one.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--configs", kind, "--out", str(out)], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr + out.with_suffix(".log").read_text()
    result = json.loads(out.read_text())["results"][kind]
    assert abs(result["error_percent"]["allocated"]) <= 5, result["measured"]
    measured = result["measured"]
    assert measured["allocated_peak_bytes"] <= measured["reserved_peak_bytes"] < measured["process_peak_bytes"]


@pytest.mark.parametrize("kind", ["PagedAdamW32bit", "PagedAdamW8bit"])
@pytest.mark.parametrize("loaded_on", ["cpu", "cuda"])
def test_a_loaded_state_pages_again(kind, loaded_on, tmp_path):
    "As the Trainer loads it in one process and in several: the next step is the same, and in memory that can page."
    import bitsandbytes as bnb
    import torch
    from qlora_nb.checkpoint import page_again
    torch.manual_seed(0)
    start, gradients = torch.randn(512, 512), torch.randn(3, 512, 512)
    def optimizer_of(weight): return getattr(bnb.optim, kind)([weight], lr=1e-2)
    def step(weight, optimizer, gradient):
        weight.grad = gradient.cuda()
        optimizer.step()
    weight = torch.nn.Parameter(start.cuda())
    optimizer = optimizer_of(weight)
    for g in gradients[:2]: step(weight, optimizer, g)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=loaded_on, weights_only=True))
    page_again(resumed)
    assert all(resumed.state[again][name].is_paged for name in ("state1", "state2"))
    step(weight, optimizer, gradients[2]); step(again, resumed, gradients[2])
    assert torch.equal(weight, again)


def test_a_training_step_moves_the_adapter_and_nothing_else():
    import torch
    from qlora_nb.adapter import add_adapter
    from qlora_nb.config import TrainSection
    from qlora_nb.model import load_base
    model = add_adapter(load_base("tiny"), TrainSection()).train()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(4, model.config.vocab_size, (2, 64), device="cuda")
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16): loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
