"""`pruned`: optimised inside a block, exactly what it was outside."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import pytest

import hawk_compile
from hawk_compile.errors import ConfigError, UnsupportedCallError
from hawk_compile.runtime.state import put_aside
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


def test_blocks_that_do_not_end_in_order() -> None:
    model = zoo.build("llava", layers=1)
    before = state(model)
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    outer.enter_context(hawk_compile.pruned(model, ratio=0.5, backend="eager"))
    inner.enter_context(hawk_compile.pruned(model, ratio=0.25, backend="eager"))
    outer.close()
    model(**picture("llava"))
    assert kept(model) == 24  # the block that goes on still prunes, by its own settings
    inner.close()
    assert state(model) == before


def test_a_block_of_another_thread_is_refused() -> None:
    model, refused = zoo.build("llava", layers=1), []

    def enter() -> None:
        try:
            with hawk_compile.pruned(model, ratio=0.25, backend="eager"):
                pass
        except UnsupportedCallError as error:
            refused.append(str(error))

    with hawk_compile.pruned(model, ratio=0.5, backend="eager"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        model(**picture("llava"))
        assert kept(model) == 16
    assert len(refused) == 1 and "another thread or task is inside" in refused[0]
    with hawk_compile.pruned(model, ratio=0.25, backend="eager"):
        pass


def test_blocks_and_restore_keep_what_was_compiled_as_long_as_the_model_lives() -> None:
    model = zoo.build("llava", layers=1)
    for ratio in (0.5, 0.25):
        with hawk_compile.pruned(model, ratio=ratio, backend="eager"):
            model(**picture("llava"))
            assert model._hawk_runtime.compilations == 1
    hawk_compile.optimize(model, ratio=0.75, backend="eager")
    model(**picture("llava"))
    assert model._hawk_runtime.compilations == 1
    hawk_compile.restore(model)
    assert model in put_aside
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
