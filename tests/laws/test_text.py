"""Texts: tokens are those of an independent tokenizer, embeddings are transformers' own, and padding changes nothing.

The encoders are CLIP and T5 made small, with random weights and vocabularies of a few words.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from inkdrop.core.cond import Cond
from inkdrop.errors import BadArgument, BadCheckpoint, BadShape, InkdropWarning
from inkdrop.find import Part
from inkdrop.nets.text import Text, TextBlock
from inkdrop.reader import Bpe, bpe, pretrained, reader_of

COLOURS = ("red", "green", "blue", "yellow", "orange")
CAPTIONS = [f"a {size} {a} circle above a {b} square" for size in ("small", "large") for a in COLOURS for b in COLOURS]


@cache
def tokenizer(vocabulary=300, length=16):
    return bpe(CAPTIONS, {}, vocabulary=vocabulary, length=length)


# ---- byte pairs --------------------------------------------------------------------------------------------------


def by_hand(text, record):
    """The tokens of a text by the merges of a tokenizer.json, one after the other in their order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the bytes
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in shown)}
    vocabulary, merges = record["model"]["vocab"], [tuple(pair) for pair in record["model"]["merges"]]
    out = [vocabulary["[begin]"]]
    for word in text.lower().split():
        parts = [letters[byte] for byte in f" {word}".encode()]
        for pair in merges:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = ["".join(pair)]
                i += 1
        out += [vocabulary[part] for part in parts]
    return [*out, vocabulary["[end]"]]


def test_tokens_are_those_of_the_merges_applied_by_hand() -> None:
    reader = tokenizer()
    record = json.loads(reader.files()["tokenizer.json"])
    assert reader.vocabulary == len(record["model"]["vocab"]) == 300
    assert (reader.features, reader.length) == (0, 16)
    for text in [*CAPTIONS[:9], "A Large\tRED  circle", "reddish squares", "größe 円", ""]:
        [tokens], [mask] = reader([text])
        assert tokens.tolist() == by_hand(text, record)
        assert mask.all()
    assert len(by_hand("a small red circle", record)) < len("a small red circle")  # words are merged


@given(st.text(alphabet="abcxyz éßñ日本🎈<>[]|·-1", max_size=12))
def test_every_text_can_be_read_and_comes_back(text: str) -> None:
    reader = tokenizer(length=128)
    [tokens], [mask] = reader([text])
    assert tokens[0] != tokens[-1]
    assert reader.text_of(tokens) == " ".join(text.split())
    assert mask.all()
    assert ((tokens >= 0) & (tokens < reader.vocabulary)).all()


def test_special_tokens_mean_nothing_in_a_text() -> None:
    reader = tokenizer()
    [tokens], _ = reader(["[pad][end] red"])
    ends = {int(t) for t in reader([""])[0][0]}
    assert len(ends) == 2
    assert not ends & set(tokens[1:-1].tolist())
    assert 0 not in tokens[1:-1]  # [pad]
    assert reader.text_of(tokens) == "[pad][end] red"


def test_texts_are_read_alike_in_any_company_and_padded_to_the_longest() -> None:
    reader = tokenizer()
    texts = ["a red circle", "", CAPTIONS[3], "a blue square above"]
    tokens, mask = reader(texts)
    assert tokens.dtype == torch.int64
    assert mask.dtype == torch.bool
    for row, seen, text in zip(tokens, mask, texts, strict=True):
        [alone], _ = reader([text])
        assert torch.equal(row[seen], alone)
        assert (row[~seen] == 0).all()
        assert seen.tolist() == sorted(seen.tolist(), reverse=True)
    assert mask.any(1).all()
    assert mask.all(1).any()
    empty, none = reader([])
    assert empty.shape[0] == none.shape[0] == 0


def test_a_long_text_is_cut_with_a_warning_and_keeps_its_end() -> None:
    reader = tokenizer(length=6)
    whole = tokenizer(length=64)([CAPTIONS[0]])[0][0]
    assert len(whole) > 6
    with pytest.warns(InkdropWarning, match=rf"has {len(whole)} tokens; only the first 6 are read"):
        [tokens], [mask] = reader([CAPTIONS[0]])
    assert tokens.tolist() == [*whole[:5].tolist(), int(whole[-1])]
    assert mask.all()


@pytest.mark.long
def test_the_same_captions_make_the_same_file_and_the_file_the_same_reader() -> None:
    reader = tokenizer()
    files = reader.files()
    assert list(files) == ["tokenizer.json"]
    code = (
        "import hashlib, json, sys; from inkdrop.reader import bpe;"
        "made = bpe(json.loads(sys.stdin.read()), {}, vocabulary=300, length=16).files()['tokenizer.json'];"
        "print(hashlib.sha256(made).hexdigest())"
    )
    import hashlib

    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(CAPTIONS), capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(files["tokenizer.json"]).hexdigest(), done.stderr
    part = Part("bpe", {"vocabulary": 300, "length": 16})
    again = reader_of(part, files=files)
    for a, b in zip(again(CAPTIONS), reader(CAPTIONS), strict=True):
        assert torch.equal(a, b)
    assert again.files() == files
    trained = reader_of(part, CAPTIONS)
    assert trained.files() == files


def test_bad_readers_are_refused_in_one_line() -> None:
    good = tokenizer().files()["tokenizer.json"]
    for error, said, call in [
        (BadArgument, "vocabulary 259", lambda: bpe(CAPTIONS, {}, vocabulary=259)),
        (BadArgument, "length 1", lambda: bpe(CAPTIONS, {}, length=1)),
        (BadArgument, "no captions", lambda: bpe([], {})),
        (BadCheckpoint, "got vocab.txt, need tokenizer.json", lambda: bpe([], {"vocab.txt": b""})),
        (BadCheckpoint, "is no tokenizer", lambda: Bpe(good[:-40], 16)),
        (BadCheckpoint, "is no tokenizer", lambda: Bpe(b"\xff", 16)),
        (BadCheckpoint, "has no tokens", lambda: Bpe(good.replace(b"[pad]", b"[PAD]"), 16)),
    ]:
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- pretrained encoders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a small CLIP and a small T5, and the same CLIP as a part of a pipeline."""
    import tokenizers
    import transformers

    root = tmp_path_factory.mktemp("encoders")
    words = sorted({word for text in CAPTIONS for word in text.split()})
    torch.manual_seed(0)

    def fast(special, template, ends, **names):
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[2]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        ids = [(name, vocabulary[name]) for name in ends]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=special[2], **names)

    size = {"vocab_size": len(words) + 3}
    clip = transformers.CLIPTextConfig(
        **size, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8,
        max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    ends = ("<start>", "<end>")
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    words_of_clip = fast([*ends, "<unk>"], "<start> $A <end>", ends, **names)
    t5 = transformers.T5Config(
        **size, d_model=20, d_kv=5, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    words_of_t5 = fast(["<pad>", "</s>", "<unk>"], "$A </s>", ("</s>",), eos_token="</s>", pad_token="<pad>")
    made = {"clip": (transformers.CLIPTextModel(clip), words_of_clip)}
    made["t5"] = (transformers.T5EncoderModel(t5), words_of_t5)
    for name, (model, reader) in made.items():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(root / name)
        reader.save_pretrained(root / name)
    made["clip"][0].save_pretrained(root / "pipeline" / "text_encoder")
    made["clip"][1].save_pretrained(root / "pipeline" / "tokenizer")
    return root


TEXTS = ["a small red circle", "", "a large blue circle above a green square"]
LENGTH = 12


def theirs(folder, texts):
    """The embeddings of a whole batch, by transformers alone, and where they are looked at."""
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    kind = transformers.CLIPTextModel if folder.name == "clip" else transformers.T5EncoderModel
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        if folder.name == "clip":  # Stable Diffusion gives no mask, and looks at all 77 places
            return model(ids.input_ids).last_hidden_state, torch.ones_like(ids.input_ids, dtype=torch.bool)
        return model(**ids).last_hidden_state, ids.attention_mask.bool()


@pytest.mark.long
@pytest.mark.parametrize("name", ["clip", "t5"])
@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_embeddings_are_transformers_own(folders, name, cache) -> None:
    reader = pretrained((), {}, model=str(folders / name), length=LENGTH, cache=cache)
    assert (reader.vocabulary, reader.features, reader.length) == (0, {"clip": 24, "t5": 20}[name], LENGTH)
    want, seen = theirs(folders / name, TEXTS)
    for _ in range(2):  # the second time from what was kept
        got, mask = reader(TEXTS)
        assert got.dtype == torch.float32
        assert torch.equal(mask, seen[:, : mask.shape[1]])
        assert not seen[:, mask.shape[1] :].any()
        # sums of some tens of float32 terms, in another order
        assert_close(got[mask], want[:, : mask.shape[1]][mask], rtol=1e-4, atol=1e-5)
        assert (got[~mask] == 0).all()
        assert not torch.allclose(got[0, 2], got[2, 2])


@pytest.mark.long
def test_a_text_is_embedded_once_and_alone(folders, monkeypatch) -> None:
    from inkdrop.pretrained import Pretrained

    told, own = [], Pretrained._encoded
    monkeypatch.setattr(Pretrained, "_encoded", lambda self, text, heard: told.append(text) or own(self, text, heard))
    knobs = {"model": str(folders / "clip"), "length": 9}
    reader = pretrained((), {}, **knobs)
    rows, _ = reader([*TEXTS[:2], *TEXTS[:2]])
    assert told == TEXTS[:2]
    again = pretrained((), {}, **knobs)  # from disk
    assert torch.equal(again(TEXTS[:2])[0], rows[:2])
    assert told == TEXTS[:2]
    with pytest.warns(InkdropWarning, match="has 10 tokens; only the first 9 are read"):
        both, _ = again([TEXTS[0], TEXTS[2]])
    assert told == TEXTS
    assert torch.equal(both[0], rows[0])
    memory = pretrained((), {}, **knobs, cache="memory")
    assert torch.equal(memory(TEXTS[:2])[0], rows[:2])
    assert told == [*TEXTS, *TEXTS[:2]]


@pytest.mark.long
def test_a_damaged_file_of_the_cache_is_made_anew(folders, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path))
    knobs = {"model": str(folders / "t5"), "length": 9}
    rows, _ = pretrained((), {}, **knobs)(TEXTS[:2])
    kept = sorted((tmp_path / "text").rglob("*.safetensors"))
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(pretrained((), {}, **knobs)(TEXTS[:2])[0], rows)
    assert torch.equal(pretrained((), {}, **knobs)(TEXTS[:2])[0], rows)


@pytest.mark.long
def test_a_checkpoint_knows_its_encoder_again(folders, tmp_path) -> None:
    import shutil

    place = tmp_path / "encoder"
    shutil.copytree(folders / "clip", place)
    part = Part("pretrained", {"model": str(place), "length": LENGTH, "cache": "memory"})
    reader = reader_of(part)
    files = reader.files()
    assert list(files) == ["reader.json"]
    record = json.loads(files["reader.json"])
    assert record["features"] == 24
    assert record["folder"] == str(place)
    again = reader_of(part, files=files)
    assert again.files() == files
    assert torch.equal(again(TEXTS)[0], reader(TEXTS)[0])
    moved = tmp_path / "elsewhere"
    place.rename(moved)
    gone = reader_of(part, files=files)  # a checkpoint can be loaded without its encoder, until it must read
    assert gone.features == 24
    with pytest.raises(BadArgument, match="no such folder, and not to be had from the hub"):
        gone(TEXTS)
    found = reader_of(Part("pretrained", {**part.knobs, "model": str(moved)}), files=files)
    assert torch.equal(found(TEXTS)[0], reader(TEXTS)[0])
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    changed = reader_of(Part("pretrained", {**part.knobs, "model": str(moved)}), files=files)
    with pytest.raises(BadCheckpoint, match="is not the one that this model was trained with"):
        changed(TEXTS)
    for wrong in (b"{", b"{}", b'{"features": 0, "sha256": "x", "folder": "y"}'):
        with pytest.raises(BadCheckpoint, match="does not say which text encoder"):
            reader_of(part, files={"reader.json": wrong})


@pytest.mark.long
def test_an_encoder_in_a_pipeline_is_the_same_encoder(folders) -> None:
    knobs = {"length": LENGTH, "cache": "memory"}
    pipeline, alone = (pretrained((), {}, model=str(folders / n), **knobs) for n in ("pipeline", "clip"))
    assert torch.equal(pipeline(TEXTS)[0], alone(TEXTS)[0])


@pytest.mark.long
def test_what_is_no_text_encoder_is_refused_in_one_line(folders, tmp_path) -> None:
    import shutil

    pickled = tmp_path / "pickled"
    shutil.copytree(folders / "clip", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    for said, call in [
        ("got no model", lambda: pretrained((), {})),
        ("length: got 0", lambda: pretrained((), {}, model=str(folders / "clip"), length=0)),
        ("reads at most 20 tokens", lambda: pretrained((), {}, model=str(folders / "clip"), length=21)),
        ("is a bert, need one of clip", lambda: pretrained((), {}, model=str(other))),
        ("cannot be read", lambda: pretrained((), {}, model=str(tmp_path))),
        ("cannot be opened", lambda: pretrained((), {}, model=str(pickled), length=9, cache="memory")(TEXTS)),
    ]:
        with pytest.raises(BadArgument, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("name", ["clip", "pipeline"])
def test_a_hub_id_is_fetched_without_pickles(folders, monkeypatch, name) -> None:
    import fnmatch

    import huggingface_hub

    there = ["model.safetensors", "pytorch_model.bin", "config.json", "unet/config.json", "vocab.txt", "model.ckpt"]
    parts = ["text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"]
    listed = [*there, *parts, "tokenizer/merges.txt"] if name == "pipeline" else there
    asked = []

    def one(model, path):
        if path not in listed:
            raise OSError("404")

    def snapshot(model, allow_patterns, ignore_patterns=()):
        def fits(path, patterns):
            return any(fnmatch.fnmatch(path, p) for p in patterns)

        asked.extend(p for p in listed if fits(p, allow_patterns) and not fits(p, ignore_patterns))
        return str(folders / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    reader = pretrained((), {}, model="somebody/encoder", length=LENGTH, cache="memory")
    want = ["config.json", "model.safetensors", "vocab.txt"]
    assert sorted(asked) == (sorted([*parts[:2], "tokenizer/merges.txt"]) if name == "pipeline" else want)
    assert torch.equal(reader(TEXTS)[0], pretrained((), {}, model=str(folders / "clip"), length=LENGTH)(TEXTS)[0])

    def offline(*args, **knobs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BadArgument, match=r"no such folder, and not to be had from the hub \(no network\); give"):
        pretrained((), {}, model="somebody/encoder")


def test_a_missing_library_is_named_with_its_pip_line(monkeypatch) -> None:
    from inkdrop.errors import MissingExtra

    for name, call in [
        ("tokenizers", lambda: bpe(CAPTIONS, {})),
        ("transformers", lambda: pretrained((), {}, model=".")),
    ]:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtra, match=rf'needs {name}.*pip install "inkdrop\[text\]"'):
            call()


# ---- the text encoder of a net -----------------------------------------------------------------------------------

WIDTH, VOCABULARY, PLACES = 16, 11, 7


def encoder(seed=0, dtype=torch.float64, **knobs):
    """A text encoder with noise on every parameter."""
    given_ = knobs if "features" in knobs else {"vocabulary": VOCABULARY, **knobs}
    made = Text(WIDTH, **{"length": PLACES, "depth": 2, "heads": 2, **given_}).to(dtype)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=noise, dtype=dtype))
    return made.eval()


def texts(rows=4, places=5, seed=0):
    """Tokens and a mask of rows with 2, 3, ... places."""
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows, places), generator=made)
    return tokens, torch.arange(places) < (2 + torch.arange(rows) % (places - 1))[:, None]


def said(words):
    """What a net can see: the tokens where it looks, and the mean."""
    return [row[seen] for row, seen in zip(words.tokens, words.mask, strict=True)], words.pooled


def same(a, b, **how):
    (rows, pooled), (other, mean) = said(a), said(b)
    for one, two in zip(rows, other, strict=True):
        assert_close(one, two, **how)
    assert_close(pooled, mean, **how)


EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64


def test_padding_never_changes_what_is_read() -> None:
    net, (tokens, mask) = encoder(), texts()
    words = net(Cond(text=tokens, text_mask=mask), 4)
    junk = torch.where(mask, tokens, (tokens + 3) % VOCABULARY)
    same(net(Cond(text=junk, text_mask=mask), 4), words, **EXACT)
    longer = torch.cat([tokens, torch.full((4, 2), 9)], dim=1)
    wide = torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    same(net(Cond(text=longer, text_mask=wide), 4), words, **EXACT)
    for i in range(4):  # and neither does company
        own = Cond(text=tokens[i : i + 1, mask[i]])
        assert own.text_mask is not None
        assert own.text_mask.all()
        alone = net(own, 1)
        assert_close(alone.tokens[0], words.tokens[i][mask[i]], **EXACT)
        assert_close(alone.pooled[0], words.tokens[i][mask[i]].mean(0), **EXACT)
    assert not torch.allclose(net(Cond(text=tokens), 4).pooled, words.pooled)  # a mask is heard


def test_places_and_order_are_heard() -> None:
    net, (tokens, _) = encoder(), texts()
    turned = net(Cond(text=tokens.flip(1)), 4)
    assert not torch.allclose(turned.pooled, net(Cond(text=tokens), 4).pooled)


@pytest.mark.parametrize("count", [1, 3, PLACES])
@pytest.mark.parametrize("kind", ["tokens", "embeddings"])
def test_null_rows_are_the_learned_null_whatever_they_say(kind: str, count: int) -> None:
    net = encoder(null_length=count, **({} if kind == "tokens" else {"features": 5}))
    tokens, mask = texts()
    text = tokens if kind == "tokens" else torch.randn(4, 5, 5, dtype=torch.float64)
    none = torch.tensor([False, True, False, True])
    whole, mixed = net(Cond(text=text, text_mask=mask), 4), net(Cond(text=text, text_mask=mask).null(none), 4)
    silent = net(None, 4)
    assert silent.tokens.shape == (4, count, WIDTH)
    assert_close(silent.pooled, net.null.mean(0).expand(4, -1))
    same(net(Cond(label=torch.zeros(4, dtype=torch.int64)), 4), silent, **EXACT)
    same(net(Cond(text=text, text_mask=mask).null(), 4), silent, **EXACT)
    for row in range(4):
        same(*(type(w)(*(part[row : row + 1] for part in w)) for w in (mixed, silent if none[row] else whole)), **EXACT)
    blank = mask & ~none[:, None]  # a null row may have nothing to look at, and the gradient stays finite
    net.zero_grad()
    words = net(Cond(text=text, text_mask=blank).null(none), 4)
    same(words, mixed, **EXACT)
    words.pooled.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_given_embeddings_are_mapped_linearly_or_taken_as_they_are() -> None:
    embedded = torch.randn(4, 5, 6, dtype=torch.float64)
    mask = texts()[1]
    net = encoder(features=6)
    words = net(Cond(text=embedded, text_mask=mask), 4)
    want = torch.einsum("blf,wf->blw", embedded, net.linear.weight) + net.linear.bias
    assert_close(words.tokens[mask], want[mask], **EXACT)
    assert_close(words.pooled, torch.stack([row[seen].mean(0) for row, seen in zip(want, mask, strict=True)]), **EXACT)
    taken = encoder(features=WIDTH)
    wide = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    assert [name for name, _ in taken.named_parameters()] == ["null"]
    assert torch.equal(taken(Cond(text=wide, text_mask=mask), 4).tokens[mask], wide[mask])
    assert encoder(features=6, dtype=torch.float32)(Cond(text=embedded), 4).tokens.dtype == torch.float32


@pytest.mark.parametrize(
    "knobs", [{}, {"null_length": 3, "depth": 1}, {"depth": 0}, {"features": 6}, {"features": WIDTH}]
)
def test_the_gradient_reaches_every_parameter(knobs) -> None:
    net = encoder(**knobs).train()
    tokens, _ = texts(places=PLACES)
    text = torch.randn(4, PLACES, knobs["features"], dtype=torch.float64) if "features" in knobs else tokens
    cond = Cond(text=text).null(torch.tensor([True, False, False, False]))
    words = net(cond, 4)
    made = torch.Generator().manual_seed(3)
    ends = [
        (part * torch.randn(part.shape, generator=made, dtype=part.dtype)).sum()
        for part in (words.tokens, words.pooled)
    ]
    sum(ends).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]
    if "table" in dict(net.named_children()):
        used = set(tokens[1:].flatten().tolist())
        assert set(net.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == used


def test_a_block_is_its_formula() -> None:
    """Written out head by head and row by row, with nothing of `attend`."""
    torch.manual_seed(1)
    block = TextBlock(WIDTH, 4).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    h, mask = torch.randn(3, 6, WIDTH, dtype=torch.float64), torch.arange(6) < torch.tensor([[2], [6], [4]])

    def normed(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def dense(x, layer):
        return x @ layer.weight.T + layer.bias

    got = block(h, mask)
    for b in range(3):
        q, k, v = dense(normed(h[b], block.norm1), block.qkv).split(WIDTH, dim=1)
        heads = []
        for i in range(4):
            part = slice(4 * i, 4 * i + 4)
            scores = (q[:, part] @ k[mask[b]][:, part].T / 2).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ v[mask[b]][:, part])
        x = h[b] + dense(torch.cat(heads, dim=1), block.out)
        inner = dense(normed(x, block.norm2), block.linear1)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        assert_close(got[b], x + dense(inner, block.linear2), rtol=1e-9, atol=1e-9)


def test_the_encoder_is_table_places_blocks_and_norm() -> None:
    net, (tokens, mask) = encoder(), texts()
    h = net.table.weight[tokens] + net.place[:5]
    for block in net.blocks:
        h = block(h, mask)
    assert_close(net(Cond(text=tokens, text_mask=mask), 4).tokens[mask], net.norm(h)[mask], **EXACT)


def test_half_precision_reads_the_same() -> None:
    net, (tokens, mask) = encoder(dtype=torch.float32), texts()
    whole = net(Cond(text=tokens, text_mask=mask), 4)
    half = net.bfloat16()(Cond(text=tokens, text_mask=mask), 4)
    assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16
    # eight bits: 0.4 % an operation, some ten of them deep
    assert (half.pooled.float() - whole.pooled).norm() < 0.05 * whole.pooled.norm()


class Flat(torch.nn.Module):
    """The encoder with its condition as tensors, as exporters need it."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens, mask, none):
        return tuple(self.net(Cond(text=tokens, text_mask=mask, nulls={"text": none}), tokens.shape[0]))


@pytest.mark.long
def test_an_export_reads_the_same() -> None:
    net, (tokens, mask) = Flat(encoder(null_length=2)), texts()
    none = torch.tensor([False, True, False, False])
    exported = torch.export.export(net, (tokens, mask, none)).module()
    for asked in ((tokens, mask, none), (tokens.flip(0), mask.flip(0), none.flip(0))):
        for got, want in zip(exported(*asked), net(*asked), strict=True):
            assert_close(got, want, **EXACT)


def test_what_cannot_be_read_is_refused_in_one_line() -> None:
    net, mapped, (tokens, mask) = encoder(), encoder(features=6), texts()
    embedded = torch.zeros(4, 5, 6, dtype=torch.float64)
    for error, told, call in [
        (BadShape, r"need tokens \(B, L\), L at most 7", lambda: net(Cond(text=embedded), 4)),
        (BadShape, "L at most 7", lambda: net(Cond(text=tokens.repeat(1, 2)), 4)),
        (BadShape, r"need embeddings \(B, L, 6\)", lambda: mapped(Cond(text=tokens), 4)),
        (BadShape, "got embeddings of 5 numbers, need 6", lambda: mapped(Cond(text=embedded[..., :5]), 4)),
        (BadArgument, "got token 11, need 0 to 10", lambda: net(Cond(text=torch.full((4, 2), 11)), 4)),
        (BadArgument, "got token -1, need 0 to 10", lambda: net(Cond(text=torch.full((4, 2), -1)), 4)),
        (
            BadArgument,
            "without any place",
            lambda: net(Cond(text=tokens, text_mask=mask & (mask.sum(1) > 2)[:, None]), 4),
        ),
        (BadArgument, "vocabulary 0 and features 0", lambda: Text(16)),
        (BadArgument, "vocabulary 5 and features 5", lambda: Text(16, vocabulary=5, features=5)),
        (BadArgument, "depth -1", lambda: Text(16, vocabulary=5, depth=-1)),
        (BadArgument, "3 heads", lambda: Text(16, vocabulary=5, heads=3)),
        (BadArgument, "null_length: got 0", lambda: Text(16, vocabulary=5, null_length=0)),
        (BadArgument, "null_length: got 8, need 1 to 7", lambda: Text(16, vocabulary=5, length=7, null_length=8)),
    ]:
        with pytest.raises(error, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_page_counts_its_parameters_and_its_example_runs() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "nets" / "text.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        vocabulary, length, width, depth, count = (int(number.replace(",", "")) for number in row)
        net = Text(width, vocabulary=vocabulary, length=length, depth=depth)
        assert sum(p.numel() for p in net.parameters()) == count
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    left: dict[str, torch.Tensor] = {}
    exec(compile(code, "docs/nets/text.md", "exec"), left)  # noqa: S102, the page is our own
    assert left["tokens"].shape == left["mask"].shape == (2, 5)
    assert left["y"].shape == (2, 3, 32, 32)
