"""Features by name: Inception's files, vision models of transformers, clips, and metrics by name."""

from __future__ import annotations

import hashlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from inkdrop.data.arrays import Arrays
from inkdrop.data.digits import digits
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, BadShape, MissingExtra, UnknownName
from inkdrop.evals import inception as room
from inkdrop.evals.clips import Clips
from inkdrop.evals.features import Features, Pixels, Reads, features_for
from inkdrop.evals.inception import WEIGHTS, Inception, weights_file
from inkdrop.evals.inception_net import InceptionNet
from inkdrop.evals.prdc import prdc
from inkdrop.evals.resize import clean, to_rgb
from inkdrop.evals.score import score
from inkdrop.evals.stream import subset
from inkdrop.evals.vision import Vision
from inkdrop.find import Part
from inkdrop.measures import Measures, measures_of


class Layers(nn.Module):
    """Stands for the layers of StyleGAN's TorchScript: means of 2,048 pieces of the 299 × 299 images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : 2048 * 130].unflatten(1, (2048, 130)).mean(2)


class Script(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def pictures(count: int, *shape: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


# ---- Inception ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer made, only read
        torch.jit.script(Script()).save(str(file))
    return file


def test_a_torchscript_gives_features_of_resized_images_and_no_score(script: Path) -> None:
    found = Inception((1, 8, 8), script)
    x = pictures(3, 1, 8, 8)
    assert found(x).shape == (3, 2048)
    assert_close(found(x), Layers()(found.prepared(x)), rtol=1e-6, atol=1e-6)
    assert found.prepared(x).shape == (3, 3, 299, 299)
    assert_close(found(x[1:2]), found(x)[1:2], rtol=1e-6, atol=1e-6)
    assert found(x[:0]).shape == (0, 2048)
    assert found.classes == ()
    with pytest.raises(BadArgument, match="state dict"):
        found.read(found(x))
    with pytest.raises(BadShape, match="need float"):
        found(pictures(3, 1, 9, 8))


def test_the_two_ranges_of_inception_are_those_of_their_programs(script: Path) -> None:
    """White is 255: (255 − 128)/128 in clean-fid, 255/127.5 − 1 in pytorch-fid; and the hash tells them apart."""
    white = torch.ones(1, 3, 16, 16)
    clean, legacy = (Inception((3, 16, 16), script, resize=kind) for kind in ("clean", "pytorch-fid"))
    assert_close(clean.prepared(white), torch.full((1, 3, 299, 299), 127 / 128))
    assert_close(legacy.prepared(white), torch.ones(1, 3, 299, 299))
    assert clean.hash != legacy.hash
    assert len(clean.hash) == 12
    assert isinstance(clean, Features)
    assert isinstance(clean, Reads)
    with pytest.raises(BadArgument, match="clean or pytorch-fid"):
        Inception((3, 16, 16), script, resize="bilinear")  # type: ignore[arg-type]


def test_images_are_rounded_to_8_bits_as_files_are() -> None:
    x = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0]).view(1, 1, 1, 5)
    assert to_rgb(x)[0, :, 0].tolist() == 3 * [[0, 0, 128, 191, 255]]
    rgba = pictures(2, 4, 3, 3)
    assert_close(to_rgb(rgba), to_rgb(rgba[:, :3]), rtol=0, atol=0)
    with pytest.raises(BadShape, match="1, 3 or 4"):
        to_rgb(pictures(1, 2, 3, 3))
    for shape in ((2, 8, 8), (2,), (3, 4, 8, 8)):
        with pytest.raises(BadShape, match="1, 3 or 4"):
            Inception(shape, Path("absent"))


def test_what_bicubic_overshoots_is_clipped() -> None:
    """Beside an edge from black to white it would leave [0, 255]; and nothing is rounded to whole numbers."""
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    found = clean(edge, 299)
    assert (float(found.min()), float(found.max())) == (0, 255)
    assert not torch.equal(found, found.round())


def test_files_that_are_no_weights_of_inception_are_refused(tmp_path: Path) -> None:
    for name, content in (("text.pth", b"hello"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(Path("a pickled object"), tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "empty.pth", "other.pth", "object.pth", "list.pth"):
        with pytest.raises(BadCheckpoint, match="not a state dict of it") as caught:
            Inception((3, 8, 8), tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match="SHA-256 .*, need 6726825d"):
        Inception((3, 8, 8), tmp_path / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Layers()).save(str(tmp_path / "foreign.pt"))
    with pytest.raises(BadCheckpoint, match="not StyleGAN's TorchScript"):
        Inception((3, 8, 8), tmp_path / "foreign.pt")


def test_where_weights_are_missing_the_message_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path))
    with pytest.raises(BadData, match=f"put https://.*/{WEIGHTS} .* into {tmp_path}/inception"):
        weights_file()
    with pytest.raises(BadData, match="is no file"):
        weights_file(str(tmp_path / "absent.pth"))
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    name = f"pt_inception-{digest[:8]}.pth"
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / name).write_bytes(content)
    monkeypatch.setattr(room, "WEIGHTS", name)
    monkeypatch.setattr(room, "_RELEASE", (tmp_path / "mirror").as_uri())
    assert weights_file(download=True).read_bytes() == content
    assert weights_file() == tmp_path / "inception" / name
    (tmp_path / "mirror" / name).write_bytes(b"other")
    (tmp_path / "inception" / name).unlink()
    with pytest.raises(BadData, match="has the sha256"):
        weights_file(download=True)


# ---- transformers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models, saved as transformers saves them."""
    library = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(5)
    clip = library.CLIPVisionConfig(**small, intermediate_size=32, projection_dim=12)
    kinds = {
        "dino": library.Dinov2Model(library.Dinov2Config(**small)),
        "clip": library.CLIPVisionModelWithProjection(clip),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in kinds}
    for name, model in kinds.items():
        model.save_pretrained(folders[name])
    (folders["clip"] / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.25, 0.5]})
    )
    return folders


def test_a_vision_model_gives_its_own_embedding(models: dict[str, Path]) -> None:
    """By hand: at its own size nothing is resized, so its input is the 8-bit image less the mean over the deviation."""
    library = pytest.importorskip("transformers")
    x = (pictures(3, 3, 28, 28) * 127.5 + 127.5).round() / 127.5 - 1
    dino, clip = Vision((3, 28, 28), str(models["dino"])), Vision((3, 28, 28), str(models["clip"]))
    assert (dino.dim, clip.dim) == (16, 12)

    def scaled(mean: list[float], std: list[float]) -> Tensor:
        return ((x + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        net = library.Dinov2Model.from_pretrained(models["dino"]).eval()
        given = net(pixel_values=scaled([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        assert_close(dino(x), given.pooler_output, rtol=1e-4, atol=1e-5)
        first, mean = (Vision((3, 28, 28), str(models["dino"]), pool=pool) for pool in ("first", "mean"))
        assert_close(first(x), given.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
        assert_close(mean(x), given.last_hidden_state[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
        net = library.CLIPVisionModelWithProjection.from_pretrained(models["clip"]).eval()
        embedded = net(pixel_values=scaled([0.5, 0.25, 0.125], [0.5, 0.25, 0.5])).image_embeds
    assert_close(clip(x), embedded / embedded.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert len({dino.hash, first.hash, mean.hash, clip.hash}) == 4
    assert dino(x[:0]).shape == (0, 16)
    assert Vision((1, 9, 7), str(models["dino"]))(pictures(2, 1, 9, 7)).shape == (2, 16)
    assert "torchvision" not in sys.modules


def test_the_hash_of_a_vision_model_is_of_weights_and_preprocessing(models: dict[str, Path], tmp_path: Path) -> None:
    for file in models["dino"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = Vision((3, 28, 28), str(models["dino"])).hash
    assert Vision((3, 28, 28), str(tmp_path)).hash == before, "where it lies does not matter"
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    shifted = Vision((3, 28, 28), str(tmp_path)).hash
    (tmp_path / "preprocessor_config.json").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    weights["layernorm.bias"] += 0.1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert len({before, shifted, Vision((3, 28, 28), str(tmp_path)).hash}) == 3


def test_a_folder_that_is_no_vision_model_is_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadCheckpoint, match="cannot be opened"):
        Vision((3, 8, 8), str(tmp_path))
    with pytest.raises(BadShape, match="1, 3 or 4"):
        Vision((2, 8, 8), str(models["dino"]))
    for text in ('{"image_mean": [1]}', '{"image_mean": 3}', "{"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        for file in models["dino"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(BadCheckpoint, match="preprocessor_config"):
            Vision((3, 8, 8), str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="inkdrop\\[text\\]"):
        Vision((3, 8, 8), str(models["dino"]))


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    """A ViT without its pooler has tokens, but no embedding of its own; nor has one that was never given a pooler."""
    library = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vit = library.ViTModel(library.ViTConfig(**small, intermediate_size=32), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(BadCheckpoint, match=r"lacks the weights pooler\.dense\.bias"):
        Vision((3, 28, 28), str(tmp_path / "vit"))
    one, two = (Vision((3, 28, 28), str(tmp_path / "vit"), pool="first") for _ in range(2))
    x = pictures(2, 3, 28, 28)
    assert_close(one(x), two(x), rtol=0, atol=0)

    kept = {name: value for name, value in vit.state_dict().items() if "layernorm" not in name}
    vit.save_pretrained(tmp_path / "part", state_dict=kept)
    with pytest.raises(BadCheckpoint, match="lacks the weights .*layernorm"):
        Vision((3, 28, 28), str(tmp_path / "part"), pool="first")

    masked = library.ViTMAEModel(library.ViTMAEConfig(**(small | {"patch_size": 4}), intermediate_size=32))
    for weight in masked.parameters():
        torch.nn.init.normal_(weight.data, std=0.3)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.raises(BadArgument, match="features.pool=first"):
        Vision((3, 28, 28), str(tmp_path / "masked"))
    with pytest.raises(BadArgument, match="other features each time"):
        Vision((3, 28, 28), str(tmp_path / "masked"), pool="mean")


# ---- clips -------------------------------------------------------------------------------------------------------


def test_clips_have_the_features_of_their_frames_and_of_their_change() -> None:
    x = pictures(4, 1, 5, 8, 8)
    clips, frames = Clips(Pixels((1, 8, 8)), (1, 5, 8, 8)), Pixels((1, 8, 8))
    found = clips(x)
    assert found.shape == (4, clips.dim) == (4, 128)
    each = torch.stack([frames(x[:, :, t]) for t in range(5)], dim=1)
    assert_close(found[:, :64], each.mean(1))
    assert_close(found[:, 64:], (each[:, 1:] - each[:, :-1]).abs().mean(1))
    shuffled = clips(x[:, :, [2, 0, 4, 1, 3]])
    assert_close(shuffled[:, :64], found[:, :64])
    assert not torch.allclose(shuffled[:, 64:], found[:, 64:])
    for shape in ((1, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(BadShape, match="at least 2 frames"):
            Clips(frames, shape)


# ---- by name -----------------------------------------------------------------------------------------------------


def test_features_are_found_by_name(script: Path) -> None:
    train, test = digits("train"), digits("test")
    assert features_for(train, test, Part("pixels")).name == "pixels"
    found = features_for(train, test, Part("inception", {"weights": str(script), "resize": "pytorch-fid"}))
    assert (found.name, found.dim) == ("inception", 2048)
    assert found.resize.startswith("bilinear")
    clips = Arrays(pictures(3, 3, 2, 8, 8), None, title="clips", source="made here", classes=())
    made = features_for(clips, clips, Part("inception", {"weights": str(script)}))
    assert (made.name, made.dim) == ("inception of frames", 4096)
    assert made(pictures(2, 3, 2, 8, 8)).shape == (2, 4096)
    with pytest.raises(UnknownName, match="pixels"):
        features_for(train, test, Part("pixel"))
    with pytest.raises(BadArgument, match="features.model"):
        features_for(train, test, Part("transformers"))


def test_features_of_ones_own_are_taken_if_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mine")
    module.good = lambda train, test, on_progress: Pixels(train.shape)  # type: ignore[attr-defined]
    module.bad = lambda train, test, on_progress: "pixels"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    assert features_for(digits("train"), digits("test"), Part("mine:good")).name == "pixels"
    with pytest.raises(BadArgument, match="gives str"):
        features_for(digits("train"), digits("test"), Part("mine:bad"))


def test_features_of_ones_own_judge_where_they_read_the_classes_of_the_data() -> None:
    """A judge that sees threes everywhere; one of other classes is not asked for these."""
    train, test = digits("train"), digits("test")

    class Mine(Pixels):
        classes = train.classes

        def read(self, features: Tensor) -> Tensor:
            return torch.eye(10)[torch.full((len(features),), 3)]

    x, cond = train.take(range(100))
    assert cond is not None
    got = score([x], train, test, Mine((1, 8, 8)), labels=cond.label, held_out=10)
    assert got["classes"]["agree"] == float((cond.label == 3).double().mean())
    assert got["classes_real"]["counts"]["3"] == 360
    Mine.classes = (*train.classes[:-1], "ten")
    assert score([x], train, test, Mine((1, 8, 8)), labels=cond.label, held_out=10)["classes"] is None


ALL = ("prdc", "cmmd", "energy", "sliced", "fid_limit")


def test_metrics_are_measured_by_name_beside_real_images() -> None:
    """Real images against themselves are best, noise is far off; every figure is plain JSON."""
    train, test = digits("train"), digits("test")
    noise = pictures(300, 1, 8, 8)
    parts = tuple(Part(name, {"k": 3} if name == "prdc" else {}) for name in ALL)
    got = score([noise], train, test, Pixels((1, 8, 8)), held_out=10, metrics=parts)["metrics"]
    json.dumps(got, allow_nan=False)
    assert tuple(got) == ALL
    assert got["prdc"]["knobs"] == {"k": 3}
    assert got["prdc"]["samples"]["k"] == 3
    real, floor = test.take(range(360))[0], train.take(subset(1437, 300, seed=0, draw=1))[0]
    for side, x in (("samples", noise), ("real", floor)):
        assert got["prdc"][side] == pytest.approx(prdc(real.flatten(1), x.flatten(1), k=3)._asdict())
    assert got["prdc"]["samples"]["precision"] == 0 < 0.5 < got["prdc"]["real"]["precision"]
    for name in ("cmmd", "energy", "sliced"):
        assert got[name]["samples"]["value"] > 4 * got[name]["real"]["value"]
    assert got["fid_limit"]["samples"]["limit"] > 4 * got["fid_limit"]["real"]["limit"]
    assert score([noise], train, test, Pixels((1, 8, 8)), held_out=10)["metrics"] == {}
    with pytest.raises(BadArgument, match="have no classes"):
        score([], train, test, Pixels((1, 8, 8)), metrics=[Part("inception_score")])
    with pytest.raises(UnknownName, match="prdc"):
        score([], train, test, Pixels((1, 8, 8)), metrics=[Part("prd")])


def test_what_is_measured_is_read_from_the_options() -> None:
    settings = ["prdc.k=3", "features.dim=32", "sampler.eta=0.5"]
    found, rest = measures_of("classifier", ["prdc", "energy"], settings)
    assert found.features == Part("classifier", {"dim": 32})
    assert found.metrics == (Part("prdc", {"k": 3}), Part("energy"))
    assert rest == ["sampler.eta=0.5"]
    assert measures_of(None, ["prdc"], ["prdc.k"])[1] == ["prdc.k"]  # no setting: refused by whoever reads the rest
    assert measures_of(None, (), ["sampler.eta=0.5"]) == (Measures(), ["sampler.eta=0.5"])
    judged, rest = measures_of(None, (), ["match.model=folder", "cfg.scale=2"], "clip")
    assert (judged, rest) == (Measures(match=Part("clip", {"model": "folder"})), ["cfg.scale=2"])
    with pytest.raises(BadArgument, match="of which match"):
        measures_of(None, (), ["match.model=folder"])
    with pytest.raises(UnknownName, match="scenes"):
        measures_of(None, (), (), "scene")
    refused: list[tuple[Any, Any, Any, type, str]] = [
        (None, ["prdc", "prdc"], [], BadArgument, "twice"),
        (None, ["prd"], [], UnknownName, "prdc"),
        (None, ["prdc"], ["prdc.n=3"], UnknownName, "knob"),
        (None, ["prdc"], ["prdc.k=few"], BadArgument, "prdc.k"),
        (None, [], ["features.dim=3"], BadArgument, "--features"),
        ("transformers", [], [], BadArgument, "features.model"),
        ("inception", [], ["features.resize=big"], BadArgument, "clean or pytorch-fid"),
        ("clip", [], [], BadArgument, "one of the guide"),
    ]
    for features, metrics, texts, error, text in refused:
        with pytest.raises(error, match=text):
            measures_of(features, metrics, texts)


def test_the_net_of_inception_does_not_couple_rows_and_takes_its_own_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = InceptionNet().eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    found, x = Inception((3, 40, 40), tmp_path / "weights.pth"), pictures(2, 3, 40, 40)
    assert_close(found(x)[1:], found(x[1:]), rtol=1e-4, atol=1e-5)
    assert len(found.classes) == 1008
    assert_close(found.read(found(x)).sum(1), torch.ones(2))
