"""Text match: judges of pictures and texts, against transformers' own scores and pictures whose captions are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from inkdrop.cli import main
from inkdrop.data.arrays import Arrays
from inkdrop.errors import BadArgument
from inkdrop.eval_jobs import score_bundle
from inkdrop.evals.interval import wilson
from inkdrop.evals.matches import clip, scenes
from inkdrop.evals.text_match import Match, text_match
from inkdrop.find import Part
from inkdrop.measures import Measures
from inkdrop.recipe import open_data
from inkdrop.screen import Screen
from runs import digits, untrained

pytestmark = pytest.mark.long

WORDS = ["a", "red", "green", "blue", "square", "of", "night"]
TEXTS = ["a red square", "a square of night", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP of both parts, as transformers saves it."""
    library, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    names = ["<start>", "<end>", "<unk>", *WORDS]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        "<start> $A <end>", None, [("<start>", 0), ("<end>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    small["projection_dim"] = 12
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = library.CLIPTextConfig(**small, **ends, vocab_size=len(names), max_position_embeddings=8)
    vision = library.CLIPVisionConfig(**small, image_size=28, patch_size=14)
    torch.manual_seed(5)
    config = library.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    where = tmp_path_factory.mktemp("clip")
    library.CLIPModel(config).save_pretrained(where)
    library.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(where)
    means = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.25, 0.5]}
    (where / "preprocessor_config.json").write_text(json.dumps(means))
    return where


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    values = torch.randint(0, 256, (count, 3, 28, 28), generator=torch.Generator().manual_seed(seed))
    return values / 127.5 - 1


def test_clips_score_is_the_cosine_that_transformers_gives(folder: Path) -> None:
    """At the model's own size; one text is longer than the encoder reads, and is cut as transformers cuts it."""
    import transformers

    x, texts = pictures(4), [*TEXTS, "a red square of night a blue square of night"]
    got = clip(
        Arrays(((x + 1) * 127.5).round().to(torch.uint8), title="x", source="made here"), model=str(folder)
    ).score(x, texts)
    net, words = (
        transformers.CLIPModel.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    about = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    given = words(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        found = net(pixel_values=((x + 1) / 2 - mean) / std, **given)
    want = found.logits_per_image.diagonal() / math.exp(net.logit_scale.item())
    assert_close(got, want.double(), rtol=1e-4, atol=1e-5)
    assert got.std() > 1e-3, "the texts make a difference"


def test_a_clip_without_texts_is_refused(folder: Path, tmp_path: Path) -> None:
    import transformers

    transformers.CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(BadArgument, match="has no text encoder; need a whole CLIP"):
        clip(Arrays(torch.zeros(2, 3, 28, 28), title="x", source="made here"), model=str(tmp_path))


def test_drawn_scenes_show_their_captions_and_not_anothers() -> None:
    """The judge is exact for drawn scenes: all right by their own captions, few by the next one's."""
    test = open_data(Part("shapes", {"count": 60}), "test")
    x, texts = test.take(range(40))[0], list(test.texts[:40])
    wrong = scenes(test).score(x, [*texts[1:], texts[0]])
    got = text_match(scenes(test), scenes(test).score(x, texts), test)
    assert got["samples"]["value"] == got["real"]["value"] == 1
    assert (got["samples"]["low"], got["samples"]["high"]) == wilson(40, 40)
    assert got["others"]["value"] < 0.2
    assert wrong.mean() < 0.2


def test_a_model_that_reads_no_text_has_no_match() -> None:
    bundle = untrained(digits(), (1, 8, 8), tuple("0123456789"))
    measures = Measures(Part("pixels"), match=Part("scenes"))
    with Screen() as screen, pytest.raises(BadArgument, match="a model that reads no text"):
        score_bundle(bundle, 4, 0, None, screen, measures)


class Told(Arrays):
    """Pictures, some with captions."""

    texts = ("one", None, "two", "one", "", "one")


def test_others_are_always_of_another_caption_and_only_told_pictures_count() -> None:
    data = Told(
        torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2).mul(40).to(torch.uint8), title="x", source="made here"
    )
    seen = []

    def score(x: torch.Tensor, texts: list[str]) -> torch.Tensor:
        rows = ((x[:, 0, 0, 0] + 1) * 127.5 / 40).round().int().tolist()
        seen.extend(zip(rows, texts, strict=True))
        return torch.tensor(
            [float(data.texts[row] == text) + 0.25 * row for row, text in zip(rows, texts, strict=True)]
        )

    made = torch.tensor([0.5, 1.5, 1.0, 3.0], dtype=torch.float64)
    got = text_match(Match("mine", "1", "a score", score), made, data)
    assert {row for row, _ in seen} == {0, 2, 3, 5}
    assert [data.texts[row] == text for row, text in seen] == [True] * 4 + [False] * 4
    assert got["real"]["value"] - got["others"]["value"] == pytest.approx(1)
    t, se = 3.182446305, float(made.std()) / 2  # Student's 97.5 % quantile of 3 degrees of freedom
    assert (got["samples"]["low"], got["samples"]["high"]) == pytest.approx((1.5 - t * se, 1.5 + t * se))
    with pytest.raises(BadArgument, match="need two that differ"):
        text_match(Match("mine", "1", "a score", score), made[:2], _alike(data))


def _alike(data: Told) -> Told:
    data.texts = ("one",) * 6
    return data


def test_eval_matches_samples_with_the_texts_they_were_told(tmp_path: Path, monkeypatch, capsys) -> None:
    """An untrained model of scenes: a figure beside the real one, in the table and in the JSON; not without texts."""
    monkeypatch.setenv("INKDROP_CACHE", str(tmp_path / "cache"))
    small = [
        "--set=net.width=4",
        "--set=net.multipliers=1",
        "--set=net.blocks=1",
        "--set=net.cross=[0]",
        "--set=net.head_width=4",
    ]
    data = ["--set=data.count=60", "--set=train.batch=4", "--max-steps=2"]
    command = ["train", "shapes_text", *small, *data, "--out", str(tmp_path / "run")]
    told = ["eval", str(tmp_path / "run"), "-n", "12", "--steps", "2", "--features", "pixels", "--match", "scenes"]
    for words in (command, [*told, "--out", str(tmp_path / "figures.json")]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert not end.value.code, capsys.readouterr().err
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())["match"]
    assert (figures["name"], figures["samples"]["n"]) == ("scenes", 12)
    assert figures["samples"]["value"] < 0.5 < figures["real"]["value"] == 1
    assert "match by scenes" in shown
    for refused, why in [(["--set=match.model=x"], "unknown name 'model'"), (["--nll"], "no effect on likelihood")]:
        with pytest.raises(SystemExit):
            main([*told, *refused])
        assert why in capsys.readouterr().err
