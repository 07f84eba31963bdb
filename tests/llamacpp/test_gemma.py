"""Another family: sliding windows, and a SentencePiece vocabulary whose unknown characters are bytes."""

from __future__ import annotations

import pytest
from gguf_files import write_gemma2

from eft_kernels.integrations.llama_cpp import EmulatedModel, Model

WINDOW = 16


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, exact):
    folder = tmp_path_factory.mktemp("gemma")
    paths = [write_gemma2(folder / f"{seed}.gguf", seed, window=WINDOW) for seed in range(3)]
    # small passes, which would also make the cache of a window small
    with EmulatedModel(*paths, n_batch=8, **exact) as model:
        yield model


def test_bytes_that_span_tokens(gemma, monkeypatch):
    text = "the king é€😀"
    ids = gemma.tokenize(text)
    assert ids[0] == 2 and gemma.text(ids) == " " + text  # SentencePiece puts a space before a text
    assert len(ids) > len(text) + 1 - len("the king") + 2  # nine bytes for the last three characters
    monkeypatch.setattr(gemma, "tokens", lambda prompt, **_: (i for i in ids))
    pieces = list(gemma.stream(""))
    assert pieces[-3:] == ["é", "€", "😀"] and "".join(pieces) == " " + text


def test_a_vocabulary_without_bytes_is_refused(tmp_path, exact):
    model = Model(write_gemma2(tmp_path / "no-bytes.gguf", 0, bytes_too=False), **exact)
    with pytest.raises(ValueError, match="its vocabulary lacks bytes; give token ids"):
        model.tokenize("é")
    assert model.read([2, 5]).shape == (1, model.n_vocab)


@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
def test_speculation_beyond_the_window(gemma, draft_tokens):
    """Rejected drafts push nothing out of a window, also where its cache is full (llama.cpp's has 256 places at least);
    weights near tuned's alone, so that some are accepted."""
    prompt = [2] + [10 + 7 * i % 300 for i in range(300)]
    accepted = drafted = 0
    for seed in range(2):
        settings = dict(seed=seed, max_new_tokens=60, weights=[0.1, 1.0, -0.1], top_k=3, logit_bias={1: float("-inf")})
        plain = gemma.generate(prompt, **settings)
        fast = gemma.generate(prompt, draft_tokens=draft_tokens, **settings)
        assert fast.ids == plain.ids and len(plain.ids) == 60
        accepted += int(fast.speculation.accepted)
        drafted += int(fast.speculation.drafted)
    assert 20 < accepted < drafted - 10


def test_the_window_matters(gemma):
    """A text that lost what its window holds goes on otherwise: the test above would see it."""
    ids = [2] + [10 + i for i in range(2 * WINDOW)]
    model = gemma.models[0]
    model.reset()
    whole = model.read(ids).clone()
    for changed, apart in ((2 * WINDOW - 3, True), (1, True)):
        model.reset()
        other = model.read([*ids[:changed], 99, *ids[changed + 1 :]])
        assert bool((other - whole).abs().max() > 1e-3) is apart
