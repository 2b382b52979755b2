"""What makes an update fast changes none of its numbers, or as little as is said."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from inkdrop.errors import BadArgument
from inkdrop.generate import sample
from inkdrop.nets import convolve as convolve_module
from inkdrop.nets.convolve import activated, normed
from inkdrop.parallel import ALONE, Ranks
from inkdrop.recipe import read
from inkdrop.train.loop import fit, resume
from inkdrop.train.speed import Tried, fastest, settled, table
from inkdrop.train.speed import _best as best_of
from inkdrop.train.trainer import Trainer
from runs import digits, log_of, points

FAULTS = """
import resource
import torch
from inkdrop.train.allocator import keeping_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = [faults() for _ in range(8)]
with keeping_memory():
    kept = [faults() for _ in range(40)]
after = [faults() for _ in range(2)]
print(min(usual), max(kept[-8:]), after[1])
"""  # of a large tensor, made and freed: in a process of its own, whose memory nothing else has cut up


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator can be told")
def test_freed_memory_is_kept_for_the_next_update_and_given_back_at_the_end():
    """The last eight of forty: glibc lays the first ones behind one another, until what it has freed is large enough.

    48 MiB are beyond every threshold that glibc sets by itself, and below that of trimming afterwards.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    pages = 48 * 2**20 // resource.getpagesize()
    usual, kept, after = (int(word) / pages for word in done.stdout.split())
    assert usual > 0.9, "by itself the C library gives large blocks back"
    assert kept < 0.1
    assert after > 0.9


@pytest.mark.parametrize(("curved", "scaled"), [(True, True), (True, False), (False, False)])
def test_a_norm_of_channels_last_in_half_precision_is_the_norm(curved, scaled):
    """Beside the plain formula in float64: the answer, its gradient by everything, and a gradient of that."""
    torch.manual_seed(0)
    start = [torch.randn(3, 16, 5, 6), *(0.3 * torch.randn(3, 16, 1, 1) for _ in range(2))]
    weights, up = [torch.randn(16) for _ in range(2)], torch.randn(3, 16, 5, 6)
    found = []
    for kind in (torch.float64, torch.bfloat16):
        h, scale, shift = (part.bfloat16().to(kind).requires_grad_() for part in start)
        given = (scale, shift) if scaled else (None, None)
        norm = torch.nn.GroupNorm(4, 16).to(torch.float64 if kind == torch.float64 else torch.float32)
        norm.load_state_dict(dict(zip(("weight", "bias"), weights, strict=True)))
        if kind == torch.float64:
            y = norm(h) * (1 + scale) + shift if scaled else norm(h)
            y = torch.nn.functional.silu(y) if curved else y
        else:
            last = h.contiguous(memory_format=torch.channels_last)
            y = activated(last, norm, *given) if curved else normed(last, norm)
            assert y.is_contiguous(memory_format=torch.channels_last)
        by = [h, *(given if scaled else ()), norm.weight, norm.bias]
        grads = torch.autograd.grad((y * up.to(kind)).sum(), by, create_graph=True)
        found.append([y, *grads, torch.autograd.grad(grads[0].square().sum(), h)[0]])
    for right, got in zip(*found, strict=True):
        assert (got.double() - right).norm() < 0.03 * right.norm()  # bfloat16 has 8 bits: 0.004 at each operation


def layouts(trainer: Trainer) -> set[tuple[bool, ...]]:
    """Whether each 3×3 kernel, its average and its moments have channels last."""
    kernels = [(i, p) for i, p in enumerate(trainer.denoiser.net.parameters()) if p.ndim == 4 and p.shape[-1] == 3]
    average = list(trainer.ema.net.parameters())
    rows = [
        (p, average[i], *(trainer.optimiser.state[p][name] for name in ("exp_avg", "exp_avg_sq"))) for i, p in kernels
    ]
    return {
        tuple(t.is_contiguous(memory_format=torch.channels_last) for t in row)
        for row in rows
        if min(row[0].shape[:2]) > 1
    }


def test_channels_last_changes_no_number_but_by_rounding_and_resumes_bit_for_bit(tmp_path):
    plain = Trainer(digits(batch=8, steps=6), None)
    last = Trainer(digits(batch=8, steps=6, channels_last=True), tmp_path)
    facts = [(plain.step(), last.step()) for _ in range(3)]
    for one, other in facts:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert layouts(last) == {(True,) * 4}
    folder = last.save()
    again = Trainer(digits(batch=8, steps=6, channels_last=True), tmp_path)
    again.load(folder)
    assert layouts(again) == {(True,) * 4}
    for _ in range(2):
        assert again.step() == last.step()
    for one, other in zip(last.denoiser.net.parameters(), again.denoiser.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_has_no_effect_is_refused():
    with pytest.raises(BadArgument, match="tf32"):
        Trainer(digits(tf32=True), None, device="cpu")
    with pytest.raises(BadArgument, match="channels_last"):
        Trainer(points(channels_last=True), None)
    with pytest.raises(BadArgument, match="speed"):
        fit(digits(), "never", speed="fast")


def test_the_fastest_way_agrees_with_float32_and_is_written_into_the_recipe(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("inkdrop.train.speed._best", lambda fine, own: fine[-1])  # not the recipe's own
    fit(digits(batch=4, steps=1), tmp_path / "run", speed="auto", heard=lambda kind, facts: told.append((kind, facts)))
    (facts,) = [facts for kind, facts in told if kind == "speed"]
    names = [each.name for each in facts["tried"]]
    assert names == ["float32", "float32 channels_last", "bfloat16", "bfloat16 channels_last"]
    assert read(tmp_path / "run" / "recipe.json").train == replace(digits(batch=4, steps=1).train, **facts["chosen"])
    for each in facts["tried"]:
        assert len(each.seconds) >= 2 or each.why
    assert facts["chosen"] == facts["tried"][-1].way != facts["tried"][0].way
    assert facts["tried"][1].off < 1e-4 < facts["tried"][2].off < 0.05


@pytest.mark.parametrize(("known", "kind"), [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"),
                                             ({"avx512_f": True, "amx_bf16": False}, "float32")])  # fmt: skip
def test_auto_is_bfloat16_where_the_processor_has_it_and_is_written_down(known, kind, tmp_path, monkeypatch):
    """The run is that of the precision itself, bit for bit, and goes on in it on another processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    fit(points(precision="auto"), tmp_path / "auto", device="cpu", max_steps=4)
    assert read(tmp_path / "auto" / "recipe.json").train.precision == kind
    other = {} if kind == "bfloat16" else {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other, raising=False)
    went_on = resume(tmp_path / "auto", device="cpu")
    itself = fit(points(precision=kind), tmp_path / "itself", device="cpu")
    assert went_on.recipe == itself.recipe
    for (name, weight), right in zip(
        went_on.denoiser.net.state_dict().items(), itself.denoiser.net.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, right), name


def test_auto_is_float32_where_one_rank_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    train, device = points(precision="auto").train, torch.device("cpu")
    assert settled(train, device, ALONE).precision == "bfloat16"
    assert settled(train, device, Another()).precision == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert settled(train, device, ALONE).precision == "float32", "older versions of torch do not know"


class Another(Ranks):
    """A rank beside one that lacks what is asked for."""

    def most(self, number: int) -> int:
        return max(number, 1)


@pytest.mark.parametrize(("seconds", "won"), [((2.0, 1.0), 1), ((1.02, 1.0), 0), ((1.0, 2.0), 0)])
def test_another_way_must_gain_more_than_noise(seconds, won):
    tried = [Tried({"precision": str(i)}, [each, each, 9.0]) for i, each in enumerate(seconds)]
    assert best_of(tried, tried[0]) is tried[won]


def test_a_way_whose_gradient_is_wrong_is_not_taken(monkeypatch):
    """The norm of channels last gets the wrong sign in half precision: found, said, and left out."""
    right = convolve_module._turned
    monkeypatch.setattr(convolve_module, "_turned", lambda *a, **k: -right(*a, **k))
    train, tried = fastest(Trainer(digits(batch=4, precision="bfloat16", channels_last=True), None), seconds=1.0)
    assert "gradient" in tried[0].why or "loss" in tried[0].why
    assert (train.precision, train.channels_last) != ("bfloat16", True)
    assert any("float32's" in line for line in table(tried))


def test_a_way_that_fails_is_listed_with_its_reason(monkeypatch):
    monkeypatch.setattr(convolve_module, "_turned", lambda *a, **k: torch.zeros(2) + torch.zeros(3))
    _, tried = fastest(Trainer(digits(batch=4), None), seconds=1.0)
    (broken,) = [each for each in tried if each.why]
    assert broken.name == "bfloat16 channels_last"
    assert "size of tensor" in broken.why


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_net_trains_the_same_and_is_saved_as_it_is_written(tmp_path):
    """Its kernels round otherwise, so that the losses of ten updates agree to 1e-4; the names of weights stay."""
    runs = [fit(digits(compile=on, steps=10, log_every=1), tmp_path / str(on), device="cpu") for on in (False, True)]
    plain, compiled = ([line["loss"] for line in log_of(tmp_path / str(on)) if "loss" in line] for on in (False, True))
    assert len(plain) == 10
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled != plain, "it was not compiled"
    assert [*runs[1].denoiser.net.state_dict()] == [*runs[0].denoiser.net.state_dict()]
    assert sample(runs[1], 2, seed=0).isfinite().all()
