"""`collage convert`: files in, files out, whole or not there, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, assert_same_planes, planes_of
from safetensors.torch import load_file, save_file
from test_conversion import apart, halves, together
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import collage
from collage.harness.cli import main
from collage.harness.convert.models import Writer
from collage.strategies import STRATEGIES


class Net(nn.Module):
    """Two matrices with blocks of their own, a norm, a buffer, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.norm = nn.Embedding(64, 96), nn.Linear(96, 96), nn.LayerNorm(96)
        self.head = nn.Linear(96, 64, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("running_mean", torch.rand(96))


def run(model: nn.Module, opt: Any, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.grad_dtype)
        opt.step()


def made(strategy: str, steps: int = 3) -> tuple[nn.Module, Any]:
    model = Net()
    for p in model.parameters():
        p.data = p.data.to(STRATEGIES[strategy].dtype)
    opt = collage.AdamW(model.named_parameters(), lr=1e-3, strategy=strategy)
    run(model, opt, steps)
    return model, opt


def without_ties(model: nn.Module) -> dict[str, Tensor]:
    """As save_pretrained stores it."""
    return {name: x for name, x in model.state_dict().items() if name != "head.weight"}


def save(folder: Path, model: nn.Module, opt: Any) -> Path:
    folder.mkdir()
    save_file(without_ties(model), folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(opt.state_dict(), folder / "optimizer.pt")
    return folder


def convert(source: Path, out: Path, target: str, *more: str) -> Path:
    assert main(["convert", str(source), str(out), "--to", target, *more]) == 0
    return out


def loaded(folder: Path, strategy: str) -> tuple[nn.Module, Any]:
    """A model and its optimizer made of what a folder holds, as a user would."""
    model = Net()
    for p in model.parameters():
        p.data = p.data.to(STRATEGIES[strategy].dtype)
    assert not model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).unexpected_keys
    opt = collage.AdamW(model.named_parameters(), lr=1e-3, strategy=strategy)
    opt.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return model, opt


def full(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    return collage.high_precision_state_dict(model, opt)


# Between strategies


@pytest.mark.parametrize("strategy", ["fp32-master", "collage-exact", "collage-8bit", "collage-fp16", "fp32", "kahan"])
def test_what_it_writes_is_what_a_load_converts(tmp_path, strategy):
    """Bit for bit, weights and states; buffers as they were."""
    model, opt = made("collage-plus")
    ours, theirs = loaded(convert(save(tmp_path / "in", model, opt), tmp_path / "out", strategy), strategy)
    other = Net()
    for p in other.parameters():
        p.data = p.data.to(STRATEGIES[strategy].dtype)
    other.load_state_dict(model.state_dict())
    want = collage.AdamW(other.named_parameters(), lr=1e-3, strategy=strategy)
    want.load_state_dict(opt.state_dict(), convert=True)
    assert_same_planes(planes_of(theirs), planes_of(want))
    assert_same_bits("buffer", ours.running_mean, model.running_mean)
    run(ours, theirs, 1)


def test_there_and_back_is_the_run_bit_for_bit(tmp_path):
    """A master weight goes through float32, through TransformerEngine and Apex, and comes back with all of its bits."""
    model, opt = made("fp32-master")
    at = save(tmp_path / "in", model, opt)
    for k, target in enumerate(("torch", "te", "apex", "fp32", "fp32-master")):
        at = convert(at, tmp_path / str(k), target)
    back, theirs = loaded(at, "fp32-master")
    assert_same_planes(planes_of(theirs), planes_of(opt))
    run(model, opt, 2, seed=1)
    run(back, theirs, 2, seed=1)
    assert_same_planes(planes_of(theirs), planes_of(opt))


def test_a_model_alone_keeps_what_a_cast_cuts_off(tmp_path):
    """The state has the low components alone, and any optimizer here takes it."""
    weights = without_ties(Net())
    save_file(weights, tmp_path / "model.safetensors")
    out = convert(tmp_path / "model.safetensors", tmp_path / "out", "collage-exact")
    model, opt = loaded(out, "collage-exact")
    for name, x in full(model, opt).items():
        assert_same_bits(name, x, weights.get(name, weights["embed.weight"]))
    assert model.mid.weight.dtype == torch.bfloat16
    assert opt.param_groups[0]["lr"] == 1e-3
    assert not (convert(tmp_path / "model.safetensors", tmp_path / "plain", "torch-bf16") / "optimizer.pt").exists()


def test_float32_weights_beside_narrower_ones_stay(tmp_path):
    model = Net()
    for p in (model.embed.weight, model.mid.weight):
        p.data = p.data.bfloat16()
    opt = collage.AdamW(model.named_parameters(), strategy="collage-plus")
    run(model, opt, 2)
    out = convert(save(tmp_path / "in", model, opt), tmp_path / "out", "fp32-master")
    assert load_file(out / "model.safetensors")["norm.weight"].dtype == torch.float32
    other = Net()
    for p in (other.embed.weight, other.mid.weight):
        p.data = p.data.bfloat16()
    other.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    theirs = collage.AdamW(other.named_parameters(), strategy="fp32-master")
    theirs.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    assert_same_bits("moment", theirs.state[other.norm.weight]["exp_avg"], opt.state[model.norm.weight]["exp_avg"])


# From and to other optimizers


@pytest.mark.parametrize("target", ["torch", "torch-bf16"])
def test_it_leaves_for_torch(tmp_path, target):
    """A plain model and a state that torch.optim.AdamW goes on with."""
    model, opt = made("collage-plus")
    out = convert(save(tmp_path / "in", model, opt), tmp_path / "out", target)
    dtype = torch.float32 if target == "torch" else torch.bfloat16
    other = Net().to(dtype)
    other.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    theirs = torch.optim.AdamW(other.parameters())
    theirs.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    assert theirs.param_groups[0]["lr"] == 1e-3
    values = full(model, opt) if target == "torch" else model.state_dict()
    for (name, p), q in zip(other.named_parameters(), model.parameters(), strict=True):
        assert_same_bits(name, p.detach(), values[name])
        assert int(theirs.state[p]["step"]) == 3
        assert_same_bits(name, theirs.state[p]["exp_avg"], opt.state[q]["exp_avg"].to(dtype))
    run(other, theirs, 1)


@pytest.mark.parametrize("named", [True, False], ids=["named", "in order"])
def test_it_comes_from_torch(tmp_path, named):
    """A training loop's file with both, by name; without names in the order of the model's own state_dict."""
    model = Net()
    opt = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=1e-3)
    run(model, opt, 3)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "epoch": 1}, tmp_path / "last.pt")
    ours, theirs = loaded(convert(tmp_path / "last.pt", tmp_path / "out", "fp32-master"), "fp32-master")
    for name, x in full(ours, theirs).items():
        assert_same_bits(name, x, model.state_dict()[name])
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        assert_same_bits("moment", theirs.state[q]["exp_avg_sq"], opt.state[p]["exp_avg_sq"])


def test_it_comes_from_lightning_and_from_torchs_muon(tmp_path):
    model = nn.Linear(40, 128, bias=False)
    opt = torch.optim.Muon(model.named_parameters(), lr=1e-3)
    run(model, opt, 2)
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [opt.state_dict()]}, tmp_path / "last.ckpt")
    back = torch.load(convert(tmp_path / "last.ckpt", tmp_path / "out", "torch") / "optimizer.pt", weights_only=True)
    again = torch.optim.Muon(nn.Linear(40, 128, bias=False).parameters())
    again.load_state_dict(back)
    assert again.param_groups[0]["ns_steps"] == 5
    (state,) = again.state.values()
    assert_same_bits("buffer", state["momentum_buffer"], opt.state[model.weight]["momentum_buffer"])


def test_a_state_that_lacks_a_moment_is_refused(tmp_path, capsys):
    model = Net()
    opt = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    run(model, opt, 1)
    saved = opt.state_dict()
    del saved["state"][1]["exp_avg_sq"]
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "last.pt")
    assert main(["convert", str(tmp_path / "last.pt"), str(tmp_path / "out"), "--to", "collage-plus"]) == 2
    assert "has no exp_avg_sq, which others of its group have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("groups", [1, 2])
def test_it_comes_from_a_checkpoint_of_trainer(tmp_path, groups):
    """Its states have no names: the class in config.json says in which order they are, and Trainer which decay."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    named = dict(model.named_parameters())
    decayed = set(Trainer.get_decay_parameter_names(None, model)) if groups == 2 else set(named)
    parts = [[p for n, p in named.items() if n in decayed], [p for n, p in named.items() if n not in decayed]]
    opt = torch.optim.AdamW([{"params": part} for part in parts if part], lr=1e-3)
    run(model, opt, 2)
    model.save_pretrained(tmp_path / "in")
    torch.save(opt.state_dict(), tmp_path / "in" / "optimizer.pt")
    out = convert(tmp_path / "in", tmp_path / "out", "collage-exact")
    ours = LlamaForCausalLM.from_pretrained(out)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    state = torch.load(out / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        for k, name in zip(group["params"], group["param_names"], strict=True):
            assert_same_bits(name, state["state"][k]["exp_avg"], opt.state[named[name]]["exp_avg"].bfloat16())


def test_an_optimizer_that_is_wrapped_leaves_and_comes(tmp_path):
    model = Net().to(torch.bfloat16)
    opt = collage.wrap(torch.optim.NAdam, model.named_parameters(), lr=1e-3, strategy="collage-plus")
    run(model, opt, 3)
    out = convert(save(tmp_path / "in", model, opt), tmp_path / "out", "torch")
    other = Net()
    other.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    theirs = torch.optim.NAdam(other.named_parameters())
    theirs.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    run(other, theirs, 1)
    back = convert(save(tmp_path / "theirs", other, theirs), tmp_path / "back", "fp32-master")
    model.load_state_dict(load_file(back / "model.safetensors"), strict=False)
    again = collage.wrap(torch.optim.NAdam, model.named_parameters(), strategy="fp32-master")
    again.load_state_dict(torch.load(back / "optimizer.pt", weights_only=True))
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits("moment", again.base.state[q]["exp_avg"], theirs.state[p]["exp_avg"])
        assert_same_bits("master", again.state[q]["param_master"], p.detach())
    run(model, again, 1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_muon_leaves_and_comes(tmp_path, capsys):
    """Of matrices alone; beside AdamW's parameters it is two optimizers in torch, which is said."""
    model = nn.Linear(40, 128, bias=False).bfloat16()
    opt = collage.Muon([{"params": list(model.named_parameters()), "use_muon": True}], lr=1e-3)
    run(model, opt, 2)
    (tmp_path / "in").mkdir()
    save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    torch.save(opt.state_dict(), tmp_path / "in" / "optimizer.pt")
    out = convert(tmp_path / "in", tmp_path / "out", "torch")
    theirs = torch.optim.Muon(nn.Linear(40, 128, bias=False).parameters())
    theirs.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    (buffer,) = (state["momentum_buffer"] for state in theirs.state.values())
    assert_same_bits("buffer", buffer, opt.state[model.weight]["momentum_buffer"].float())
    back = torch.load(convert(out, tmp_path / "back", "fp32-master") / "optimizer.pt", weights_only=True)
    again = collage.Muon([{"params": list(model.named_parameters()), "use_muon": True}], strategy="fp32-master")
    again.load_state_dict(back)
    mixed = Net().bfloat16()
    opt = collage.Muon(mixed.named_parameters(), adamw={"lr": 3e-4})
    run(mixed, opt, 1)
    save(tmp_path / "mixed", mixed, opt)
    assert main(["convert", str(tmp_path / "mixed"), str(tmp_path / "no"), "--to", "torch"]) == 2
    assert "torch has no one optimizer that keeps exp_avg, exp_avg_sq, momentum_buffer" in capsys.readouterr().err


def test_remainders_of_transformer_engine(tmp_path):
    """Its pair makes our number, by its own arithmetic; cut ones are taken too."""
    model, opt = made("fp32-master")
    out = convert(save(tmp_path / "in", model, opt), tmp_path / "te", "te")
    weights, state = load_file(out / "model.safetensors"), torch.load(out / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    assert (group["step"], group["bias_correction"]) == (3, True)
    masters = full(model, opt)
    for k, name in zip(group["params"], group["param_names"], strict=True):
        assert set(state["state"][k]) == {"master_param", "exp_avg", "exp_avg_sq"}
        assert_same_bits(name, together(weights[name], state["state"][k]["master_param"]), masters[name])
        pair = apart(masters[name])
        assert_same_bits(name, weights[name], pair[0])
        weights[name], state["state"][k]["master_param"] = halves(masters[name])
    save_file(weights, out / "model.safetensors")
    torch.save(state, out / "optimizer.pt")
    back = loaded(convert(out, tmp_path / "back", "fp32-master", "--cut"), "fp32-master")
    assert_same_planes(planes_of(back[1]), planes_of(opt))


# Files


def test_a_sharded_model_stays_sharded(tmp_path):
    """Shards of the same tensors, an index, the configuration with the new dtype; one shard may hold a state's all."""
    model, opt = made("collage-plus")
    source, whole = tmp_path / "in", without_ties(model)
    source.mkdir()
    names = sorted(whole)
    files = [f"model-{k + 1:05d}-of-00003.safetensors" for k in range(3)]
    for k, file in enumerate(files):
        save_file({name: whole[name] for name in names[k::3]}, source / file)
    index = {"metadata": {}, "weight_map": {name: files[k % 3] for k, name in enumerate(names)}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text('{"model_type": "x", "dtype": "bfloat16"}')
    torch.save(opt.state_dict(), source / "optimizer.pt")
    out = convert(source, tmp_path / "out", "torch")
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == index["weight_map"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    found = {name: x for file in files for name, x in load_file(out / file).items()}
    assert written["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    for name, x in full(model, opt).items():
        assert_same_bits(name, found.get(name, x), x)


BIG = """
import sys, threading
from pathlib import Path
from collage.harness.cli import main
import collage.harness.convert.command
from collage.harness.convert import converting

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

small, large = zip(sys.argv[1:3], sys.argv[3:5])
assert main(["convert", *small, "--to", "collage-plus"]) == 0  # all that is imported once
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
assert main(["convert", *large, "--to", "collage-plus"]) == 0
done.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no RssAnon to look at")
def test_memory_is_that_of_a_tensor(tmp_path):
    """32 tensors of 4 MiB with 256 MiB of moments; what is held in memory, and not mapped from a file, stays below 64:
    a tensor, and what a piece of one takes in float64.
    """
    for folder, count, size in (("small", 1, 8), ("large", 32, 1024)):
        (tmp_path / folder).mkdir()
        names, x = [f"layer.{k}.weight" for k in range(count)], torch.randn(size, size)
        save_file({name: x + k for k, name in enumerate(names)}, tmp_path / folder / "model.safetensors")
        state = {k: {"step": torch.tensor(3.0), "exp_avg": x * k, "exp_avg_sq": (x * k).abs()} for k in range(count)}
        group = {**torch.optim.AdamW([nn.Parameter(x)]).defaults, "params": [*state], "param_names": names}
        torch.save({"state": state, "param_groups": [group]}, tmp_path / folder / "optimizer.pt")
    paths = [str(tmp_path / name) for name in ("small", "large", "small-out", "large-out")]
    command = [sys.executable, "-c", BIG, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 64, done.stdout


def test_nothing_is_overwritten_unless_asked(tmp_path, capsys):
    source = save(tmp_path / "in", *made("collage-plus"))
    out = convert(source, tmp_path / "out", "fp32")
    before = (out / "model.safetensors").read_bytes()
    assert main(["convert", str(source), str(out), "--to", "bf16"]) == 2
    assert "is there already; choose another OUT, or say --overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    convert(source, out, "bf16", "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("moment", [0, 2])
def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch, moment):
    source = save(tmp_path / "in", *made("collage-plus"))
    out = convert(source, tmp_path / "out", "fp32")
    before, count, write = (out / "model.safetensors").read_bytes(), [], Writer.write

    def fails(self: Writer, *args: Any) -> None:
        count.append(1)
        if len(count) > moment:
            raise OSError("No space left on device")
        write(self, *args)

    monkeypatch.setattr(Writer, "write", fails)
    assert main(["convert", str(source), str(out), "--to", "bf16", "--overwrite"]) == 2
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


KILLED = """
import sys, time
from collage.harness.cli import main
from collage.harness.convert import models
write = models.Writer.write
def slowly(self, *args):
    print("writing", flush=True)
    time.sleep(0.1)
    write(self, *args)
models.Writer.write = slowly
main(["convert", *sys.argv[1:]])
"""


def kill(source: Path, out: Path, seconds: float) -> None:
    """SIGKILL so long after the first tensor is written."""
    command = [sys.executable, "-c", KILLED, str(source), str(out), "--to", "torch", "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"writing"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    "seconds", [0.15, *(pytest.param(k / 30, marks=pytest.mark.slow) for k in range(20))], ids="{:.2f} s".format
)
def test_a_kill_leaves_what_was_there(tmp_path, seconds):
    """Until the end OUT is what it was; the next one begins anew."""
    source = save(tmp_path / "in", *made("collage-plus"))
    out = convert(source, tmp_path / "out", "bf16")
    before = (out / "model.safetensors").read_bytes()
    kill(source, out, seconds)
    left = (out / "model.safetensors").read_bytes()
    assert left == before or len(load_file(out / "model.safetensors")) == len(load_file(source / "model.safetensors"))
    convert(source, out, "torch", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# What cannot be


def nothing(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [str(folder / "empty"), "out", "--to", "fp32"]


def others(folder: Path) -> list[str]:
    """A model and the state of another, by name."""
    save_file({"a": torch.ones(3)}, folder / "in" / "model.safetensors")
    return [str(folder / "in"), "out", "--to", "fp32"]


def other_weights(folder: Path) -> list[str]:
    """The same names, and other weights."""
    weights = {name: x * 2.0**-12 for name, x in load_file(folder / "in" / "model.safetensors").items()}
    save_file(weights, folder / "in" / "model.safetensors")
    return [str(folder / "in"), "out", "--to", "fp32"]


def unnamed(folder: Path) -> list[str]:
    model = Net()
    opt = torch.optim.AdamW(model.parameters())
    run(model, opt, 1)
    torch.save(opt.state_dict(), folder / "in" / "optimizer.pt")
    return [str(folder / "in"), "out", "--to", "fp32"]


def misshapen(folder: Path) -> list[str]:
    weights = load_file(folder / "in" / "model.safetensors")
    save_file({**weights, "norm.weight": torch.ones(5).bfloat16()}, folder / "in" / "model.safetensors")
    return [str(folder / "in"), "out", "--to", "fp32"]


def damaged(folder: Path) -> list[str]:
    file = folder / "in" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return [str(folder / "in"), "out", "--to", "fp32"]


def no_state(folder: Path) -> list[str]:
    torch.save({"a": torch.ones(2)}, folder / "in" / "optimizer.pt")
    return [str(folder / "in"), "out", "--to", "fp32"]


def of_fp8(folder: Path) -> list[str]:
    model = Net().bfloat16()
    opt = collage.AdamW(collage.fp8.convert(model).named_parameters(), strategy="collage-fp8")
    run(model, opt, 1)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, folder / "fp8.pt")
    return [str(folder / "fp8.pt"), "out", "--to", "collage-plus"]


def codes_alone(folder: Path) -> list[str]:
    save_file(without_ties(collage.fp8.convert(Net())), folder / "in" / "model.safetensors")
    (folder / "in" / "optimizer.pt").unlink()
    return [str(folder / "in"), "out", "--to", "collage-plus"]


def run_of_fp8(folder: Path) -> list[str]:
    """As `collage train` leaves one."""
    model = collage.fp8.convert(Net().bfloat16())
    opt = collage.AdamW(model.named_parameters(), strategy="collage-fp8")
    run(model, opt, 1)
    (folder / "run").mkdir()
    save(folder / "run" / "checkpoint-1", model, opt)
    save_file({"embed.weight": model.embed.weight.float()}, folder / "run" / "weights.safetensors")
    return [str(folder / "run" / "checkpoint-1"), "out", "--to", "torch"]


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "strategy": (lambda f: [str(f / "in"), "out", "--to", "collage"], "--to: unknown 'collage'; .* te, apex"),
    "to fp8": (
        lambda f: [str(f / "in"), "out", "--to", "collage-fp8"],
        r"--to: 'collage-fp8' trains .*call it .*convert=True",
    ),
    "of fp8": (of_fp8, r"is of strategy 'collage-fp8', .* save collage.high_precision_state_dict\(model, opt\)"),
    "codes of fp8": (codes_alone, r"e4m3 codes, .*save_pretrained\(.*state_dict=collage.fp8.export\(model\)\)"),
    "run of fp8": (run_of_fp8, r"is of strategy 'collage-fp8', .*/run/weights.safetensors has float32 ones"),
    "nowhere": (lambda f: ["nowhere", "out", "--to", "fp32"], "nowhere: no such file or folder; want"),
    "no model": (nothing, "no model in this folder; looked for checkpoint-N folders, model.safetensors,"),
    "state alone": (
        lambda f: [str(f / "in" / "optimizer.pt"), "out", "--to", "fp32"], "an optimizer's state alone.*--optimizer",
    ),
    "itself": (lambda f: [str(f / "in"), str(f / "in"), "--to", "fp32"], "is IN, or IN lies in it; choose another OUT"),
    "others": (others, "of another model, by name. Only in the state: 'embed.weight', .*; only in .*: 'a'"),
    "other weights": (other_weights, "low components in the optimizer's state do not belong to these weights"),
    "unnamed": (unnamed, "has no names, and .* is sorted by name"),
    "misshapen": (misshapen, r"of 'norm.weight' has shape \(96,\), and the weight asks for \(5,\)"),
    "damaged": (damaged, "not a safetensors file, or damaged"),
    "no state": (no_state, "not an optimizer's state, which has 'state' and 'param_groups'"),
    "no moments": (
        lambda f: [str(f / "in" / "model.safetensors"), "out", "--to", "te"], "--to te: is Adam's, .* no moments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in", *made("collage-plus", steps=1))
    arguments, says = BAD[case]
    argv = arguments(tmp_path)
    assert main(["convert", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(says, error), error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# Runs of `collage train`


def test_a_run_goes_on_under_another_strategy(tmp_path, capsys):
    """Its checkpoint is whole there, with its settings; float32 masters go on to nearly the same loss."""
    options = ["--steps", "6", "--batch-size", "2", "--seq-len", "16", "--every", "2", "--eval-sequences", "2",
               "--save-every", "3", "--shadow", "0"]  # fmt: skip
    straight, other = tmp_path / "straight", tmp_path / "other"
    assert main(["train", "--strategy", "collage-plus", "--out", str(straight), *options]) == 0
    convert(straight / "checkpoint-3", other, "fp32-master")
    assert "--strategy fp32-master" in capsys.readouterr().out
    assert main(["train", "--strategy", "fp32-master", "--out", str(other), *options, "--resume"]) == 0
    assert "going on from checkpoint-3" in capsys.readouterr().out
    a, b = (json.loads((folder / "result.json").read_text())["val_loss"] for folder in (straight, other))
    assert abs(a - b) < 1e-3
    assert main(["train", "--strategy", "collage-plus", "--out", str(other), *options, "--resume"]) == 2
    assert "strategy: saved 'fp32-master', here 'collage-plus'" in capsys.readouterr().err
