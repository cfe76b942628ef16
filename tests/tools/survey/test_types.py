"""Every type of tests/architectures, held to the plain model; what the shipped survey says of it is so."""


import pytest

from hawk_compile.tools.survey.checks import CHECKS, survey
from hawk_compile.tools.survey.table import read_types, standing
from hawk_compile.tools.survey.tiny import read
from tests import timm_at_hand
from tests.tiny import FOLDER

QUICK = ("vipllava", "mllama")
TYPES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)
def test_a_type_is_as_the_shipped_survey_says(name: str) -> None:
    """Right, or refused by the same words; never wrong, never pruned without a word."""
    shipped = read_types().surveys[name]
    found = survey(read(FOLDER / f"{name}.json"), CHECKS)
    if (reason := timm_at_hand.reason()) and "timm" in (found.trouble or ""):
        pytest.skip(reason)
    assert (standing(found), found.layer) == (standing(shipped), shipped.layer), found.trouble
    assert found.refusal == shipped.refusal
    assert all(outcome.status != "wrong" for outcome in found.outcomes.values()), found.trouble


def test_the_shipped_survey_knows_each_type() -> None:
    surveys = read_types().surveys
    assert sorted(surveys) == TYPES
    tiny = {name: read(FOLDER / f"{name}.json") for name in TYPES}
    assert {name: each.notes for name, each in surveys.items()} == {name: each.notes for name, each in tiny.items()}
    assert all(each.notes for each in tiny.values() if each.name != each.model_type), "a variant says what it is"
