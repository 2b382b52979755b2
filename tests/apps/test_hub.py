"""The exchange with diffusers from outside: folders that are not whole, the command line, the script, the pages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import check_hub
import pipelines
from inkdrop import cli_hub
from inkdrop.bundle import load
from inkdrop.codec import load_codec
from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadCheckpoint, InkdropError, MissingExtra
from inkdrop.generate import sample
from inkdrop.hub.config import Config
from inkdrop.hub.fetch import located, patterns
from inkdrop.hub.folder import read_component, read_json, read_tensors, write_component
from inkdrop.hub.weights import Pair, filled, layer, null_class, to_ours, to_theirs
from pipelines import quietly, silent

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.app

ONE: dict[str, Tensor] = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, -1.0])}
NAME = "diffusion_pytorch_model"


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """A BadCheckpoint of one line with all of these in it."""
    with pytest.raises(BadCheckpoint) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# ---- folders -------------------------------------------------------------------------------------------------


def test_a_component_is_written_and_read_back(tmp_path: Path) -> None:
    """And its file is one that every reader of safetensors takes for torch's."""
    write_component(tmp_path / "one", {"_class_name": "Net", "width": 3}, ONE)
    config, tensors = read_component(tmp_path / "one")
    assert config == {"_class_name": "Net", "width": 3}
    assert tensors.keys() == ONE.keys()
    assert all(torch.equal(value, ONE[key]) for key, value in tensors.items())
    with (tmp_path / "one" / f"{NAME}.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}
    with pytest.raises(BadArgument, match="exists already"):
        write_component(tmp_path / "one", {}, ONE)
    with pytest.raises(BadArgument, match=r"a\.bias is not finite"):
        write_component(tmp_path / "two", {}, {"a.bias": torch.tensor([torch.inf])})


def test_half_precision_becomes_float32_unless_asked(tmp_path: Path) -> None:
    stored = {"w": torch.tensor([1.5, 2.25], dtype=torch.bfloat16), "n": torch.tensor([3])}
    save_file(stored, tmp_path / f"{NAME}.safetensors")
    read = read_tensors(tmp_path)
    assert read["w"].dtype == torch.float32
    assert read["w"].tolist() == [1.5, 2.25]
    assert read["n"].dtype == torch.int64
    assert read_tensors(tmp_path, dtype=None)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path) -> None:
    """It would run: this one writes a file when it is loaded."""

    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "config.json").write_text("{}")
    torch.save({"trap": Trap()}, tmp_path / name)
    with refused(f"has its weights as {name} alone, a pickle", "safe_serialization=True"):
        read_component(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_that_is_not_whole_says_what_is_missing(tmp_path: Path) -> None:
    with refused("config.json: is missing"):
        read_component(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with refused(f"has no {NAME}.safetensors"):
        read_component(tmp_path)
    (tmp_path / f"{NAME}.safetensors.incomplete").write_bytes(b"1234")
    with refused("the download of", "was not finished"):
        read_component(tmp_path)
    with refused("no such folder"):
        read_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 40, 90])
def test_a_truncated_file_is_one_line(keep: int, tmp_path: Path) -> None:
    save_file(ONE, tmp_path / f"{NAME}.safetensors")
    content = (tmp_path / f"{NAME}.safetensors").read_bytes()
    (tmp_path / f"{NAME}.safetensors").write_bytes(content[:keep])
    with refused("is not whole, or no safetensors", "download it again"):
        read_tensors(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / f"{NAME}.safetensors").write_text(pointer)
    with refused("is a Git LFS pointer", "git lfs pull"):
        read_tensors(tmp_path)
    (tmp_path / "config.json").write_text(pointer)
    with refused("is a Git LFS pointer"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"[1]", "holds a list, need a JSON object"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": 1', "is no JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"{" + b" " * 2**24 + b"}", "need at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_that_is_none_is_one_line(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with refused("config.json", word):
        read_json(tmp_path / "config.json")


def test_infinity_is_read_for_diffusers_writes_it(tmp_path: Path) -> None:
    """lambda_min_clipped of DPMSolverMultistepScheduler."""
    (tmp_path / "s.json").write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json(tmp_path / "s.json") == {"lambda_min_clipped": float("-inf")}
    with refused("beta_end is -inf"):
        Config({"beta_end": float("-inf")}, "a scheduler").number("beta_end", 0.1)


def sharded(folder: Path, places: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_read_whole_and_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    first, second = f"{NAME}-00001-of-00002.safetensors", f"{NAME}-00002-of-00002.safetensors"
    places = {"a.weight": first, "a.bias": second}
    sharded(tmp_path / "in", places)
    save_file({"a.weight": ONE["a.weight"]}, tmp_path / "in" / first)
    with refused(second, "is missing, a part of the weights"):
        read_tensors(tmp_path / "in")
    save_file({"a.bias": ONE["a.bias"]}, tmp_path / "in" / second)
    assert read_tensors(tmp_path / "in").keys() == ONE.keys()
    save_file({"a.bias": ONE["a.bias"], "more": torch.ones(1)}, tmp_path / "in" / second)
    with refused(second, "does not agree with its index about more"):
        read_tensors(tmp_path / "in")
    save_file(ONE, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside.safetensors", "x.bin"):
        sharded(tmp_path / "in", {"a.weight": name})
        with refused("need a .safetensors file of its own folder"):
            read_tensors(tmp_path / "in")
    sharded(tmp_path / "in", {"a.weight": 3})
    with refused("has no weight_map from keys to files"):
        read_tensors(tmp_path / "in")


def test_the_variant_is_named_where_there_is_another(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / f"{NAME}.fp16.safetensors")
    assert read_tensors(tmp_path, variant="fp16").keys() == ONE.keys()
    with refused("but the variant fp16; try variant='fp16'"):
        read_tensors(tmp_path)
    (tmp_path / f"{NAME}.fp16.safetensors").rename(tmp_path / f"{NAME}.safetensors")
    with refused("leave variant out"):
        read_tensors(tmp_path, variant="fp16")
    with pytest.raises(BadArgument, match="need a plain word"):
        read_tensors(tmp_path, variant="../x")


# ---- weights -------------------------------------------------------------------------------------------------

PAIRS = [
    *layer("qkv", "to_q", "to_k", how="rows"),
    *layer("point", "proj", how="conv", bias=False),
    *null_class("label", "table"),
    Pair("own", ()),
]
THEIRS = {
    "to_q.weight": torch.arange(4.0).reshape(2, 2),
    "to_k.weight": torch.arange(4.0, 8.0).reshape(2, 2),
    "to_q.bias": torch.tensor([1.0, 2.0]),
    "to_k.bias": torch.tensor([3.0, 4.0]),
    "proj.weight": torch.arange(6.0).reshape(2, 3, 1, 1),
    "table.weight": torch.arange(8.0).reshape(4, 2),
}


class Small(nn.Module):
    """A net with the parameters of PAIRS."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 4)
        self.point = nn.Linear(3, 2, bias=False)
        self.label = nn.Module()
        self.label.table = nn.Embedding(3, 2)
        self.label.null = nn.Parameter(torch.ones(2))
        self.own = nn.Parameter(torch.ones(5))


def test_weights_go_there_and_back() -> None:
    ours = to_ours(PAIRS, THEIRS)
    assert ours["qkv.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ours["qkv.bias"].tolist() == [1, 2, 3, 4]
    assert ours["point.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert ours["label.table.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert ours["label.null"].tolist() == [6, 7]
    net = filled(Small, lambda _: PAIRS, THEIRS)
    assert net.own.tolist() == [0] * 5  # has no counterpart
    assert not net.training
    back = to_theirs(PAIRS, net.state_dict())
    assert back.keys() == THEIRS.keys()
    assert all(torch.equal(value, THEIRS[key]) for key, value in back.items())


def test_weights_that_do_not_fit_are_named() -> None:
    with refused("weights: to_k.weight is missing"):
        to_ours(PAIRS, {key: value for key, value in THEIRS.items() if key != "to_k.weight"})
    with refused("weights: extra left over"):
        to_ours(PAIRS, {**THEIRS, "extra": torch.ones(1)})
    with refused("weights: proj.weight has shape (2, 3, 3, 3), need (out, in, 1, 1)"):
        to_ours(PAIRS, {**THEIRS, "proj.weight": torch.ones(2, 3, 3, 3)})
    with refused("weights: to_q.weight, to_k.weight have shapes (2, 2), (3, 2), need the same"):
        to_ours(PAIRS, {**THEIRS, "to_k.weight": torch.ones(3, 2)})
    with refused("weights: table.weight has shape (1, 2), need at least 2 rows"):
        to_ours(PAIRS, {**THEIRS, "table.weight": torch.ones(1, 2)})
    with refused("weights: table.weight has shape (6, 2), its config needs (3, 2)"):
        filled(Small, lambda _: PAIRS, {**THEIRS, "table.weight": torch.ones(7, 2)})
    with refused("weights: nothing is given for our own"):
        filled(Small, lambda _: PAIRS[:-1], THEIRS)
    with refused("weights: our own has no counterpart there, and is not zero"):
        to_theirs(PAIRS, Small().state_dict())
    with refused("weights: our own left over"):
        to_theirs(PAIRS[:-1], Small().state_dict())
    with refused("weights: our qkv.weight is missing"):
        to_theirs(PAIRS, {})
    with refused("weights: our qkv.weight has shape (3, 2), need 2 equal parts"):
        to_theirs(PAIRS[:1], {"qkv.weight": torch.ones(3, 2)})


# ---- hub ids -------------------------------------------------------------------------------------------------


def test_what_is_fetched_is_json_text_and_safetensors() -> None:
    from fnmatch import fnmatch

    def fetched(name: str, variant: str | None = None) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns(variant))

    wanted = ["model_index.json", "unet/config.json", f"unet/{NAME}.safetensors", "text_encoder/model.safetensors"]
    wanted += [f"transformer/{NAME}-00001-of-00002.safetensors", f"{NAME}.safetensors", "tokenizer/merges.txt"]
    assert all(map(fetched, wanted))
    left = ["v1-5-pruned.safetensors", f"unet/{NAME}.bin", f"unet/{NAME}.fp16.safetensors", "unet/model.ckpt"]
    left += ["safety_checker/model.safetensors", "unet/model.onnx", f"{NAME}.bin", "README.md"]
    assert not any(map(fetched, left))
    assert fetched(f"unet/{NAME}.fp16.safetensors", "fp16")
    assert not fetched(f"unet/{NAME}.safetensors", "fp16")


def test_a_hub_id_without_the_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with refused("hub id google/ddpm-cifar10-32: cannot be had from here", "hf download", "give its path"):
        located("google/ddpm-cifar10-32")
    with refused("no such folder, and no hub id (owner/name)"):
        located("a/b/c")
    with refused("is a file; give the folder of a pipeline"):
        located(__file__)
    with pytest.raises(BadArgument, match="with a folder, need a hub id"):
        located(tmp_path, revision="main")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with refused("has no safetensors, and pickles are never read"):
        located("google/ddpm-cifar10-32")
    save_file(ONE, tmp_path / f"{NAME}.safetensors")
    assert located("google/ddpm-cifar10-32") == tmp_path
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r'pip install "inkdrop\[data\]"'):
        located("google/ddpm-cifar10-32")


# ---- the command line ----------------------------------------------------------------------------------------


def run(*args: str) -> str:
    """What a command of the group prints."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli_hub.hub, list(args), catch_exceptions=False, standalone_mode=False)
    return result.output


def test_a_pipeline_is_read_sampled_and_written_from_the_command_line(tmp_path: Path) -> None:
    with quietly():
        pipelines.ddim(timestep_spacing="trailing").save_pretrained(tmp_path / "theirs")
    printed = run("read", str(tmp_path / "theirs"), "--out", str(tmp_path / "made"))
    assert f"checkpoint: {tmp_path / 'made'}, a DDIMPipeline" in printed
    assert "note: clipping agrees with theirs at use_clipped_model_output=True" in printed
    bundle = load(tmp_path / "made")
    assert sample(bundle, 1, steps=2).shape == (1, 1, 8, 8)
    printed = run("write", str(tmp_path / "made"), "--out", str(tmp_path / "again"), "--sampler", "ddpm")
    assert "from diffusers import DDPMPipeline" in printed
    with quietly():
        back = silent(diffusers.DDPMPipeline.from_pretrained(tmp_path / "again"))
    assert pipelines.same_weights(back.unet, pipelines.pixels())
    run("read", str(tmp_path / "theirs"), "--out", str(tmp_path / "other"), "--sampler", "heun", "--steps", "7")
    assert (load(tmp_path / "other").plan.sampler.name, load(tmp_path / "other").plan.steps) == ("heun", 7)
    with pytest.raises(BadArgument, match="exists already"):
        run("read", str(tmp_path / "theirs"), "--out", str(tmp_path / "made"))
    with refused("heun is no sampler of theirs"):
        run("write", str(tmp_path / "other"), "--out", str(tmp_path / "no"))


def test_a_run_of_the_page_is_trained_and_written(tmp_path: Path) -> None:
    """A U-Net of classes becomes that of one class, which their pipeline runs as ours does."""
    from inkdrop.cli import main

    knobs = ["net=unet", "net.width=16", "net.multipliers=1,2", "net.norm_groups=8", "train.batch=4"]
    settings = [part for knob in knobs for part in ("--set", knob)]
    with pytest.raises(SystemExit) as end:
        main(["train", "digits", *settings, "--max-steps", "2", "--out", str(tmp_path / "mine")])
    assert not end.value.code
    how = ["--class", "3", "--sampler", "ddim", "--grid", "trailing", "--no-clip"]
    run("write", str(tmp_path / "mine"), *how, "--out", str(tmp_path / "three"))
    bundle = load(tmp_path / "mine")
    with quietly():
        theirs = silent(diffusers.DDIMPipeline.from_pretrained(tmp_path / "three"))
        wanted = check_hub.their_images(theirs, (2, 1, 8, 8), seed=0, steps=5)
    mine = sample(bundle, 2, seed=0, label=3, sampler="ddim", grid="trailing", steps=5, clip=False, guidance=1.0)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(mine.clamp(-1, 1), wanted, rtol=0, atol=1e-4)


def test_an_autoencoder_is_read_as_one_to_train_in(tmp_path: Path) -> None:
    with quietly():
        pipelines.vae().save_pretrained(tmp_path / "vae")
    assert "inkdrop train RECIPE --codec" in run("read", str(tmp_path / "vae"), "--out", str(tmp_path / "made"))
    codec = load_codec(tmp_path / "made")
    assert codec.latent_shape == (4, 8, 8)
    with pytest.raises(BadArgument, match="is an autoencoder alone, which is not sampled"):
        run("read", str(tmp_path / "vae"), "--out", str(tmp_path / "no"), "--steps", "3")


@pytest.mark.long
def test_what_cannot_be_sampled_is_not_written(tmp_path: Path) -> None:
    """A sampler, a grid and their steps are built, and run on nothing, before the checkpoint is there."""
    with quietly():
        pipelines.ddim(timestep_spacing="trailing").save_pretrained(tmp_path / "theirs")
    for how, words in (
        (("--sampler", "foo"), "samplers: unknown name 'foo'"),
        (("--grid", "foo"), "grids: unknown name 'foo'"),
        (("--sampler", "restart"), "which is one of the combinators"),
        (("--steps", "100000"), "steps: got 100000, need at most"),
    ):
        with pytest.raises(InkdropError, match=words):
            run("read", str(tmp_path / "theirs"), "--out", str(tmp_path / "made"), *how)
        assert not (tmp_path / "made").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """In a process of its own, without the network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    args = ["hub", "read", "google/ddpm-cifar10-32", "--out", str(tmp_path / "x")]
    code = f"from inkdrop.cli import main; main({args!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("inkdrop: hub id google/ddpm-cifar10-32: cannot be had from here")


# ---- the script ----------------------------------------------------------------------------------------------


def test_check_hub_passes_on_pipelines_of_every_kind_and_fails_on_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny folders; a model whose weights are changed on one side is told apart."""
    made = {"ddpm": pipelines.ddpm(), "ddim": pipelines.ddim(), "dit": pipelines.dit(), "stable": None}
    with quietly():
        made["stable"] = pipelines.stable(tmp_path)
        for name, pipeline in made.items():
            pipeline.save_pretrained(tmp_path / name)
    monkeypatch.setattr(check_hub, "PROMPT", "red")
    sources = [str(tmp_path / name) for name in made]
    with quietly():
        assert check_hub.main([*sources, "--steps", "5", "--count", "2", "--tolerance", "1e-4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["PASS", f"{source}:"] for source in sources]
        honest = check_hub.read
        monkeypatch.setattr(check_hub, "read", lambda *a, **k: changed(honest(*a, **k)))
        assert check_hub.main([sources[1], str(tmp_path / "none"), "--steps", "5"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FAIL", "FAIL"]
    assert "no such folder" in lines[1]


def changed(bundle: Any) -> Any:
    with torch.no_grad():
        bundle.denoiser.net.head[2].bias.add_(0.3)
    return bundle


# ---- the pages -----------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def session_of(page: str) -> dict[str, Any]:
    """The names that a page's blocks leave behind; each block must print what the page says."""
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    session: dict[str, Any] = {"__name__": page}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * text.count("\n", 0, block.start()) + block[1], page, "exec"), session)  # noqa: S102
        assert printed.getvalue() == (block[2] or ""), block[1]
    return session


def test_the_page_of_the_exchange_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with quietly():
        pipelines.ddim(clip_sample=False).save_pretrained("pipeline")
    session_of("hub.md")
    assert json.loads(Path("written/model_index.json").read_text())["_class_name"] == "DDIMPipeline"


def test_the_page_of_foreign_nets_runs_and_its_denoisers_say_what_the_formulas_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-diffusion: x0 is the net's answer, eps = (x − x0)/sigma. guided-diffusion: x0 = (x − sigma·eps)/alpha of the
    first half, the second half as a share."""
    monkeypatch.chdir(tmp_path)
    page = session_of("wrap.md")
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    karras, net = page["denoiser"], page["KDiffusionNet"]()
    for t in (0.2, 0.9):
        level = karras.schedule(t)
        belief = karras(Ask(x, level))
        sigma = level.sigma.float()
        torch.testing.assert_close(belief.x0, net(x, sigma.expand(3)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(belief.eps, (x - belief.x0) / sigma, rtol=1e-4, atol=1e-5)
    guided, net = page["guided"], page["net"]
    cond = Cond(label=torch.tensor([0, 1, 2])).null(torch.tensor([False, True, False]))
    for k in (0, 400, 999):
        level = guided.schedule((k + 1) / 1000)
        belief = guided(Ask(x, level, cond))
        said, raw = net(x, torch.full((3,), float(k)), y=torch.tensor([0, 3, 2])).chunk(2, dim=1)
        alpha, sigma = float(level.alpha), float(level.sigma)
        torch.testing.assert_close(belief.x0, (x - sigma * said) / alpha, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(belief.var_frac, (raw + 1) / 2, rtol=1e-6, atol=0)
