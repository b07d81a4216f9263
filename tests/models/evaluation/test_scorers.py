"""Scorers from outside: a fake judge is asked once, and a bad one is refused with a reason."""

import pytest

from models.evaluation.predictions import Prediction
from models.evaluation.scorers import Scorer, load_scorer
from models.evaluation.scoring import judge, score

JUDGES = '''
calls = []

def judge(predictions):
    calls.append([p.id for p in predictions])
    return ["yes" in p.prediction and bool(p.question) for p in predictions]

class Lazy:
    name = "lazy judge v1"
    def judge(self, predictions):
        return [True] * len(predictions)

class Demanding:
    name = "demanding"
    def __init__(self, key):
        self.key = key
    def judge(self, predictions):
        return []

lazy = Lazy()

def short(predictions):
    return [True]

def unsure(predictions):
    return ["maybe"] * len(predictions)

number = 3
'''


@pytest.fixture()
def judges(tmp_path, monkeypatch):
    (tmp_path / "fake_judges.py").write_text(JUDGES)
    (tmp_path / "broken_judge.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("fake_judges", "broken_judge"):
        __import__("sys").modules.pop(name, None)


def predictions():
    return [
        Prediction(id=str(i), task="t", kind="neutral", answer="no", prediction=text, question="Is it?")
        for i, text in enumerate(["yes sir", "no", "oh yes"])
    ]


def test_a_function_judges_everything_at_once(judges):
    import fake_judges

    scorer = load_scorer("fake_judges:judge")
    assert isinstance(scorer, Scorer) and scorer.name == "fake_judges:judge"
    s = score(predictions(), scorer=scorer, bootstrap_samples=10)
    assert s["scorer"] == "fake_judges:judge"
    assert s["accuracy"].value == pytest.approx(2 / 3)  # the judge's verdicts
    assert s["lenient_accuracy"].value == pytest.approx(1 / 3)  # the rule's, beside them
    assert fake_judges.calls == [["0", "1", "2"]]


@pytest.mark.parametrize("spec", ["fake_judges:lazy", "fake_judges:Lazy"])
def test_objects_and_their_classes_are_scorers(judges, spec):
    scorer = load_scorer(spec)
    assert scorer.name == "lazy judge v1" and judge(predictions(), scorer=scorer).all()


def test_built_in_rules_go_by_name():
    assert load_scorer("lenient") == "lenient" and load_scorer("strict") == "strict"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt", r"expected one of lenient, strict, mmau, listen, or MODULE:FUNCTION, got 'gpt'"),
        ("fake_judges:", "or MODULE:FUNCTION, got"),
        ("no_such_judge:judge", "cannot import 'no_such_judge': ModuleNotFoundError"),
        ("broken_judge:judge", "cannot import 'broken_judge': ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("fake_judges:jugde", "module 'fake_judges' has no 'jugde'"),
        ("fake_judges:number", "expected a function of predictions, or an object with `name` and `judge`, got int"),
        ("fake_judges:Demanding", "cannot be made without arguments: .*key"),
    ],
)
def test_a_bad_scorer_is_named(judges, spec, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(spec)


def test_verdicts_are_checked(judges):
    with pytest.raises(ValueError, match="scorer fake_judges:short: expected 3 verdicts, got 1"):
        judge(predictions(), scorer=load_scorer("fake_judges:short"))
    with pytest.raises(ValueError, match="scorer fake_judges:unsure: expected True or False for '0', got 'maybe'"):
        judge(predictions(), scorer=load_scorer("fake_judges:unsure"))
