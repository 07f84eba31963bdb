"""Every decoder class that transformers has, in each setting, against full forwards without a cache.

tests/families.py makes the models and says what is compared; docs/models.md is its table.
"""

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")

from tests import families  # noqa: E402

DOCUMENTED = families.DOC.read_text() if families.DOC.exists() else ""
HERE = f"transformers {transformers.__version__}." in DOCUMENTED  # the table is of this version


@pytest.mark.parametrize("name", families.cases())
def test_a_text_is_right_or_refused(name):
    case = families.cases()[name]
    try:
        models = families.make(case.model_type, **case.changes)
    except ImportError as e:
        pytest.skip(f"needs {families.missing(e)}")
    except Exception as e:
        if HERE:
            raise
        pytest.skip(f"the recipe of a tiny config is of another transformers: {e!r}")
    out = families.sweep(case, models)
    assert not {k: v for k, v in out.items() if v.startswith(("wrong", "raised"))}
    if HERE:
        line, refused = families.row(name, case, out)
        assert line in DOCUMENTED
        assert all(why in DOCUMENTED for why in refused)


@pytest.mark.skipif(not HERE, reason="docs/models.md is of another transformers")
def test_the_table_names_every_class_once():
    lines = [line.split(" | ")[0][2:] for line in DOCUMENTED.splitlines() if line.startswith("| ")][1:]
    assert lines == list(families.cases())


def test_the_comparison_sees_a_wrong_text():
    """A forward that reads one column too few, a token that is another and a drift of the logits are each found."""
    case = families.Case("llama")
    models = families.make("llama")
    oracles = [families.Oracle(m) for m in models]
    got = families.emulated(models, case.prompts, case.steps, True, 0, "coupled")
    judge = lambda prompts=case.prompts: families.wrong_rows(got, prompts, oracles, (1, 1, -1), True, True)  # noqa: E731
    assert judge() == []
    assert len(judge([p[1:] if len(p) > 2 else p for p in case.prompts])) == 2
    got.logits[4][1] += 0.1 * got.logits[4][1].std() * (got.logits[4][1] > 0)
    assert [f.partition(":")[0] for f in judge()] == ["row 1 step 4"]
    got = families.emulated(models, case.prompts, case.steps, True, 0, "coupled")
    got.sequences[2, -1] = (got.sequences[2, -1] + 1) % families.TEXT
    assert [f.partition(":")[0] for f in judge()] == ["row 2"]
