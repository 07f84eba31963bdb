"""The shipped family of models (examples/family): loads offline, and its published losses are those of its weights."""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILY = Path(__file__).resolve().parents[1] / "examples" / "family"
sys.path.insert(0, str(FAMILY))
import evaluate as family  # noqa: E402

RESULTS = json.loads((FAMILY / "results.json").read_text())


@pytest.fixture(scope="module")
def models():
    return family.load(FAMILY / "weights")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FAMILY / "weights" / "base", local_files_only=True)


def test_models_share_a_vocabulary(models):
    assert {model.config.vocab_size for model in models.values()} == {2048}
    assert {model.config.max_position_embeddings for model in models.values()} == {512}
    sizes = {name: model.num_parameters() for name, model in models.items()}
    assert sizes["ref"] == sizes["tuned-a"] == sizes["tuned-b"] < 0.5 * sizes["base"]
    assert sizes["base"] == sizes["large-a"] == sizes["large-b"]


def test_tokenizers_are_equal_and_round_trip(tokenizer):
    assert len({(FAMILY / "weights" / name / "tokenizer.json").read_bytes() for name in family.MODELS}) == 1
    assert len(tokenizer) == 2048 and None not in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for text in ["And it came to pass, that Emma smiled.", "caf\u00e9 \u2014 2 + 2\n\ttabs", "\U0001f600"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and max(ids) < 2048
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_size():
    assert sum(f.stat().st_size for f in (FAMILY / "weights").rglob("*")) < 25e6


@pytest.mark.parametrize("text", ["a", "b", "c"])
def test_published_losses_are_those_of_the_weights(models, tokenizer, text):
    measured = family.losses(models, family.heldout(tokenizer, text)[: family.SLICE])
    assert measured == pytest.approx(RESULTS["slice_of_seed_0"][text], abs=1e-3)


@pytest.mark.parametrize("style", ["a", "b"])
def test_emulation_beats_both_its_parts_in_every_seed(style):
    rows = RESULTS["styles"][style]["seeds"]
    assert len(rows) == len(RESULTS["seeds"]) == 3
    for row in rows:
        assert row["emulated"] < row["tuned"] and row["emulated"] < row["base"]
