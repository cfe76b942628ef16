"""`pruned`: optimised inside a block, exactly what it was outside."""

from __future__ import annotations

import pytest

import hawk_compile
from hawk_compile.errors import ConfigError
from tests import zoo
from tests.runtime.models import fresh, generate, picture, plain
from tests.runtime.test_optimize import state


def kept(model: object) -> int:
    return hawk_compile.report(model).kept_visual_tokens.item()


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_plain_model_is_plain_again(name: str) -> None:
    model = zoo.build(name, layers=2)
    generate(model, picture(name, 2), 1)  # a model with mRoPE remembers the offset of this prompt
    before = state(model)
    with hawk_compile.pruned(model, ratio=0.5, backend="eager") as inside:
        assert inside is model
        generate(model, picture(name), 2)
        visual = hawk_compile.report(model).visual_tokens.item()
        assert kept(model) == -(-visual // 2)
    assert state(model) == before
    assert generate(model, picture(name), 2).sequences.equal(generate(plain(name), picture(name), 2).sequences)


def test_earlier_settings_come_back_and_blocks_nest() -> None:
    model = fresh("llava", 0.75)
    model(**picture("llava"))
    before = state(model)
    with hawk_compile.pruned(model, hawk_compile.HawkConfig(ratio=0.5, backend="eager")):
        model(**picture("llava"))
        assert kept(model) == 16
        with hawk_compile.pruned(model, ratio=0.25, backend="eager"):
            model(**picture("llava"))
            assert kept(model) == 24
        assert kept(model) == 16
    assert state(model) == before and kept(model) == 8
    model(**picture("llava"))
    assert kept(model) == 8
    assert model._hawk_runtime.compilations == 1  # one graph has served all


def test_after_an_error() -> None:
    model = zoo.build("llava", layers=2)
    before = state(model)
    with pytest.raises(ZeroDivisionError), hawk_compile.pruned(model, ratio=0.5, backend="eager"):
        raise ZeroDivisionError
    assert state(model) == before
    with pytest.raises(ConfigError, match="ratio is the fraction"), hawk_compile.pruned(model, ratio=5):
        pass
    assert state(model) == before
    with hawk_compile.pruned(model, ratio=0.5, backend="eager"):
        hawk_compile.restore(model)
    assert state(model) == before
