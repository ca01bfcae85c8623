"""TextVQA's metric equals the reference evaluator: a committed table from the reference, and the reference itself
when it can be had.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluate.metrics import answer_scores, normalize, soft_score

TABLE = json.loads((Path(__file__).parent / "reference_metrics.json").read_text())

# Characters on which normalizers disagree: everything that the rules mention, spaces of all sorts, digits and cases
# outside of ASCII.
ALPHABET = " \t\n\r\x0b\x1c\u00a0\u2003.,;:/[]\"{}()=+\\_-><@`!?'’´&%$#*~|0123456789٣²¼aAbeEhInostTİıßΣςǅﬁé日"
_WORDS = """
    a an the A THE none zero one Two ten eleven dont Dont don't somebody'd somebodyd've yall'd've Im id've ow's'at let's
    its it's St. 3.5 .5 5. 1,000 1.000 7-up co-op a/b U.S.A. http://x.y @home 10% $5 ' 's s' o'clock youd've - -- . ..
    ...
"""
WORDS = _WORDS.split()


@pytest.mark.parametrize("text, expected", TABLE["normalize"], ids=range(len(TABLE["normalize"])))
def test_normalize_equals_the_committed_reference_outputs(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize("case", TABLE["scores"], ids=range(len(TABLE["scores"])))
def test_soft_score_equals_the_committed_reference_outputs_to_the_last_bit(case: dict) -> None:
    assert soft_score(case["prediction"], case["answers"]) == case["score"]


def test_leave_one_out_by_hand() -> None:
    """Three of ten said it: seven humans see three others (1.0), three see two others (2/3): 0.9 in total."""
    assert soft_score("Stop.", ["stop"] * 3 + ["go"] * 7) == pytest.approx(0.9)
    assert soft_score("stop", ["stop"] + ["go"] * 9) == pytest.approx(0.3)
    assert soft_score("nothing", ["stop"] * 10) == 0.0


def test_other_than_ten_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 answers"):
        answer_scores(["x"] * 9)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The reference evaluator itself, from the clone of MMF that CAPTUNE_MMF names."""
    clone = os.environ.get("CAPTUNE_MMF", "")
    if not clone:
        pytest.skip("CAPTUNE_MMF does not name a clone of facebookresearch/mmf: no reference to compare with")
    path = tmp_path_factory.mktemp("reference") / "m4c_evaluators.py"
    show = ["git", "-C", clone, "show", "HEAD:mmf/utils/m4c_evaluators.py"]
    path.write_text(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    spec = importlib.util.spec_from_file_location("m4c_evaluators", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXTS = st.one_of(
    st.text(ALPHABET, max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.text(max_size=30),
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(ALPHABET, max_size=4)), max_size=90).map("".join),
)


def test_normalize_equals_the_reference_on_drawn_inputs(reference: ModuleType) -> None:
    processor = reference.EvalAIAnswerProcessor()
    for word in (*processor.CONTRACTIONS, *processor.CONTRACTIONS.values(), *processor.NUMBER_MAP):
        assert normalize(word) == processor(word)

    @settings(max_examples=800, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert normalize(text) == processor(text)

    check()


def test_accuracy_equals_the_reference_on_drawn_questions(reference: ModuleType) -> None:
    """Equal floats, not close ones: the sums run in the reference's order."""
    random_ = random.Random(0)
    evaluator = reference.TextVQAAccuracyEvaluator()
    for _ in range(200):
        pool = [" ".join(random_.choices(WORDS, k=random_.randint(0, 3))) for _ in range(random_.randint(1, 10))]
        answers = random_.choices(pool, k=10)
        prediction = random_.choice([*pool, "other"])
        expected = evaluator.eval_pred_list([{"pred_answer": prediction, "gt_answers": answers}])
        assert soft_score(prediction, answers) == expected, (prediction, answers)
        assert answer_scores(answers) == evaluator._compute_answer_scores(answers)
