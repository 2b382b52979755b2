"""Codecs: shift and scale, folders, and latents that are encoded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from inkdrop import codec as module
from inkdrop.codec import CARD, WEIGHTS, Codec, codec_of, encoded, load_codec, measure, save_codec
from inkdrop.core.ask import Ask
from inkdrop.core.cond import Cond
from inkdrop.core.dataset import Data
from inkdrop.core.level import Level
from inkdrop.errors import BadArgument, BadCheckpoint, BadData, BadShape
from inkdrop.find import Part
from inkdrop.train.latents import Latents

PART = Part("autoencoder", {"latent": 2, "width": 4, "multipliers": (1, 2), "blocks": 1})
SHAPE = (1, 8, 6)


def made(shift: Any = (0.5, -2.0), scale: Any = (0.25, 4.0), seed: int = 0, part: Part = PART) -> Codec:
    """A codec with noise on every parameter, in eval mode."""
    codec = Codec(part, SHAPE, shift, scale, {"about": "a test"})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in codec.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return codec.eval().requires_grad_(False)


class Pictures:
    """Random images with a class and a caption each; how often they were read is counted."""

    levels, source, classes = None, "random images", ("a", "b", "c")

    def __init__(self, count: int = 150, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.fingerprint = shape, f"pictures {count} {seed}"
        self.x = torch.rand(count, *shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
        self.texts = tuple(f"picture {i}" for i in range(count))

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Cond | None]:
        return self.x[list(rows)], Cond(label=torch.tensor([row % 3 for row in rows]))

    def name(self, row: int) -> str:
        return f"picture-{row}.png"


# ---- shift and scale ------------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled_and_back() -> None:
    codec, x = made(), Pictures().x[:3]
    mean = codec.autoencoder.encode(x).mean
    z = codec.encode(x)
    assert_close(z, torch.stack([(mean[:, 0] - 0.5) * 0.25, (mean[:, 1] + 2.0) * 4.0], dim=1))
    assert_close(codec.decode(z), codec.autoencoder.decode(mean), rtol=1e-5, atol=1e-6)
    assert torch.equal(codec.encode(x), z)  # nothing is sampled
    assert codec.latent_shape == (2, 4, 3)
    one = made(0.5, 0.25)
    assert_close(one.encode(x), (mean - 0.5) * 0.25)


def test_it_answers_the_last_question_of_a_sampling() -> None:
    codec, z = made(), torch.randn(2, 2, 4, 3)
    codec.autoencoder.decoder.head[-1].weight *= 20
    clean = Level(*(torch.tensor(f, dtype=torch.float64) for f in (1.0, 0.0, 0.0)))
    belief = codec(Ask(z, clean, None, of="decode"))
    whole = codec.decode(z)
    assert whole.abs().max() > 1  # so that the clipping shows
    assert torch.equal(belief.x0, whole.clamp(-1, 1))
    assert belief.eps.shape == whole.shape
    assert not belief.eps.any()


def test_tiles_bound_what_is_decoded_at_once() -> None:
    codec, z = made(), torch.randn(1, 2, 40, 12)
    codec.tile = 16
    sizes: list[tuple[int, ...]] = []
    codec.autoencoder.decoder.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[-2:])))
    assert codec.decode(z).shape == (1, 1, 80, 24)
    codec.autoencoder.encoder.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[-2:])))
    assert codec.encode(torch.randn(1, 1, 80, 24)).shape == z.shape
    assert sizes == [(16, 12)] * 3 + [(32, 24)] * 3


@pytest.mark.parametrize(
    ("shift", "scale", "said"),
    [
        (0.0, 0.0, "scale"),
        (0.0, -1.0, "scale"),
        ([0.0] * 3, 1.0, "shift"),
        (float("nan"), 1.0, "shift"),
        (0.0, [1.0, float("inf")], "scale"),
    ],
)
def test_bad_numbers_are_refused(shift: Any, scale: Any, said: str) -> None:
    with pytest.raises(BadArgument, match=f"codec {said}"):
        Codec(PART, SHAPE, shift, scale)


def test_the_measure_is_mean_and_deviation_of_the_latents() -> None:
    codec, data = made(0.0, 1.0), Pictures(700)
    shift, scale = measure(codec.autoencoder, data)
    z = codec.encode(data.x).double().transpose(0, 1).flatten(1)
    assert_close(torch.tensor(shift), z.mean(1).float(), rtol=1e-5, atol=1e-6)
    assert_close(1 / torch.tensor(scale), z.std(1, correction=0).float(), rtol=1e-5, atol=1e-6)
    assert measure(codec.autoencoder, data) == (shift, scale)
    unit = Codec(PART, SHAPE, shift, scale, net=codec.autoencoder)
    fresh = unit.encode(Pictures(700, seed=1).x)  # R25: other images of the same kind have unit deviation
    assert float(fresh.std()) == pytest.approx(1, abs=0.05)
    assert fresh.mean().abs() < 0.05
    part = measure(codec.autoencoder, data, most=80)
    assert part != (shift, scale)
    assert part[1] == pytest.approx(scale, rel=0.3)


def test_a_channel_that_says_nothing_is_refused() -> None:
    codec = made()
    codec.autoencoder.quant.weight[1] = 0
    with pytest.raises(BadData, match="channel 1 of the latents has a deviation of"):
        measure(codec.autoencoder, Pictures())


# ---- folders --------------------------------------------------------------------------------------------------


def test_a_save_loads(tmp_path: Path) -> None:
    codec, x = made(), Pictures().x[:2]
    save_codec(codec, tmp_path / "ae")
    again = load_codec(tmp_path / "ae")
    assert {p.name for p in (tmp_path / "ae").iterdir()} == {CARD, WEIGHTS}
    assert torch.equal(again.encode(x), codec.encode(x))
    z = codec.encode(x)
    assert torch.equal(again.decode(z), codec.decode(z))
    assert (again.card, again.hash, again.shape) == ({"about": "a test"}, codec.hash, SHAPE)
    assert not any(p.requires_grad for p in again.parameters())
    fresh = codec_of(json.loads(json.dumps(codec.record())))
    assert not torch.equal(fresh.encode(x), codec.encode(x))
    fresh.load_state_dict(codec.state_dict())
    assert torch.equal(fresh.eval().encode(x), codec.encode(x))
    with pytest.raises(BadArgument, match="exists already"):
        save_codec(codec, tmp_path / "ae")


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    save_codec(made(), tmp_path / "ae")
    for name in (CARD, WEIGHTS):
        path = tmp_path / "ae" / name
        whole = path.read_bytes()
        at = whole.index(b"test") if name == CARD else len(whole) - 3
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadCheckpoint, match=f"{name}: is corrupt"):
            load_codec(tmp_path / "ae")
        path.write_bytes(whole)
    load_codec(tmp_path / "ae")
    (tmp_path / "ae" / WEIGHTS).unlink()
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        load_codec(tmp_path / "ae")
    with pytest.raises(BadCheckpoint, match="inkdrop autoencoder"):
        load_codec(tmp_path)


def test_nothing_unsound_is_saved(tmp_path: Path) -> None:
    codec = made()
    codec.autoencoder.encoder.stem.bias[0] = torch.nan
    with pytest.raises(BadArgument, match="not finite"):
        save_codec(codec, tmp_path / "ae")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "os:system"}, "outside inkdrop"),
        ({"knobs": {"latent": "os:system"}}, "outside inkdrop"),
        ({"name": "autoencodr"}, "did you mean"),
        ({"knobs": {"colour": 1}}, "colour"),
        ({"pixels": [1, 8]}, "need"),
        ({"pixels": [1, 2**20, 2**20]}, "positive sizes"),
        ({"pixels": None}, "cannot be read"),
    ],
)
def test_a_bad_record_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadCheckpoint, match=said) as caught:
        codec_of({**made().record(), **change})
    assert "\n" not in str(caught.value)


def test_the_hash_is_of_all_that_is_computed() -> None:
    codec = made()
    known = {codec.hash}
    assert made().hash in known
    others = [
        made(shift=0.0),
        made(scale=1.0),
        made(seed=1),
        made(part=Part("autoencoder", {**PART.knobs, "dropout": 0.1})),
    ]
    spoilt = made()
    spoilt.autoencoder.decoder.head[-1].bias[0] += 1e-6
    assert len({*known, *(other.hash for other in [*others, spoilt])}) == 6


# ---- latents --------------------------------------------------------------------------------------------------


def test_latents_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIXELS", 48 * 32)  # 32 images at a time, and a rest
    codec, data = made(), Pictures()
    latents = Latents(data, codec, tmp_path)
    assert isinstance(latents, Data)
    assert (len(latents), latents.shape, latents.classes, latents.levels) == (150, (2, 4, 3), ("a", "b", "c"), None)
    assert (latents.texts, latents.name(7)) == (data.texts, "picture-7.png")
    rows = [149, 3, 77]
    z, cond = latents.take(rows)
    assert_close(z, codec.encode(data.x[rows]), rtol=1e-5, atol=1e-6)
    assert cond is not None
    assert cond.label is not None
    assert cond.label.tolist() == [149 % 3, 0, 77 % 3]
    for bad in ([150], [-1]):
        with pytest.raises(BadArgument, match="rows"):
            latents.take(bad)
    with pytest.raises(BadShape, match="but the autoencoder takes"):
        Latents(Pictures(shape=(1, 6, 6)), codec, tmp_path)


def test_latents_are_encoded_once_and_again_where_anything_changed(tmp_path: Path) -> None:
    codec, data = made(), Pictures()
    calls: list[int] = []

    def count(one: Codec) -> Codec:
        one.autoencoder.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
        return one

    def encoded(one: Codec, of: Pictures = data) -> int:
        calls.clear()
        Latents(of, count(one), tmp_path)
        return len(calls)

    assert encoded(codec) > 0
    first = Latents(data, codec, tmp_path)
    assert encoded(made()) == 0  # another module, the same numbers
    assert torch.equal(Latents(data, made(), tmp_path).take(range(150))[0], first.take(range(150))[0])
    assert encoded(made(scale=1.0)) > 0
    assert encoded(made(seed=2)) > 0
    assert encoded(made(), Pictures(seed=4)) > 0
    prints = {Latents(d, c, tmp_path).fingerprint for d in (data, Pictures(seed=4)) for c in (codec, made(seed=2))}
    assert len(prints) == 4
    assert data.fingerprint not in prints


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    codec, data = made(), Pictures()
    whole = Latents(data, codec, tmp_path).take(range(150))[0]
    [file] = tmp_path.glob("latents-*/latents.npy")
    good = file.read_bytes()
    for bad in (good[:-1], good[:-4] + b"\0\0\1\1", b"", good[:9]):
        file.write_bytes(bad)
        assert torch.equal(Latents(data, codec, tmp_path).take(range(150))[0], whole)
        assert file.read_bytes() == good
    [card] = tmp_path.glob("latents-*/latents.json")
    card.write_text("[]")
    assert torch.equal(Latents(data, codec, tmp_path).take(range(150))[0], whole)


def test_nothing_is_left_of_an_encoding_that_failed(tmp_path: Path) -> None:
    codec, data = made(), Pictures()
    data.x[140] = torch.nan
    with pytest.raises(BadData, match="not finite"):
        Latents(data, codec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_houses_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "cache"))
    Latents(Pictures(), made())
    assert len(list((tmp_path / "cache").glob("latents-*/latents.npy"))) == 1
    monkeypatch.setenv("INKDROP_CACHE", "/proc/nowhere")
    with pytest.raises(BadArgument, match="cannot be written"):
        Latents(Pictures(), made())


def test_the_cache_is_mapped_and_says_what_it_is_and_reads_no_image_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIXELS", 48 * 32)
    codec, data = made(), Pictures()
    latents = Latents(data, codec, tmp_path)
    [folder] = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["label.npy", "latents.json", "latents.npy"]
    stored = np.load(folder / "latents.npy", mmap_mode="r")
    assert (stored.shape, stored.dtype) == ((150, 2, 4, 3), np.float32)
    assert torch.equal(encoded(codec, data.x), torch.from_numpy(np.array(stored))), "asked in the same chunks: the same"
    card = json.loads((folder / "latents.json").read_text())
    assert (card["data"], card["codec"], card["dtype"], card["samples"]) == (
        data.fingerprint,
        codec.hash,
        "float32",
        150,
    )
    assert all(isinstance(kept, np.memmap) for kept in latents._kept.values())
    monkeypatch.setattr(Pictures, "take", None)
    z, cond = Latents(data, codec, tmp_path).take([4, 149])
    assert cond is not None
    assert cond.label is not None
    assert cond.label.tolist() == [1, 2]
    z.zero_()  # its own memory, not the file's
    assert torch.equal(Latents(data, codec, tmp_path).take([4])[0][0], torch.from_numpy(np.array(stored[4])))
