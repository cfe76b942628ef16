"""What a call is made inside of: modes see the operators of the pruned graph; what cannot be served is refused by its
name, before anything has run, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hawk_compile
from hawk_compile.compat.dynamo import compiles_all, is_in_force
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.surroundings import SWITCH, compiling
from tests.runtime.models import fresh, generate, new_tokens, picture, plain, pruned

NAME = "llava"


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((getattr(func, "__name__", str(func)), args))
        return func(*args, **(kwargs or {}))


@functools.cache
def inputs() -> dict[str, Tensor]:
    return picture(NAME)


@torch.no_grad()
def logits(model: Any, given: dict[str, Tensor] | None = None) -> Tensor:
    return model(**(given or inputs())).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DispatchLog, FunctionLog])
def test_modes_see_the_operators_of_the_pruned_graph(kind: Any) -> None:
    """At the first call and later; attention once for each layer, at the kept length, whatever the number of calls."""
    model, expected = fresh(NAME), logits(pruned(NAME))
    for _ in range(2):
        with kind() as log:
            assert torch.equal(logits(model), expected)
        attention = [args for name, args in log.calls if "scaled_dot_product" in name]
        lengths = [args[0].shape[2] for args in attention]
        assert lengths[-2:] == [expected.shape[1]] * 2, lengths
        assert torch.equal(logits(model), expected)
    prefill = model.__dict__[RUNTIME].prefill
    assert (prefill.compilations, prefill.watched.compilations) == (1, 1)
    assert hawk_compile.report(model).kept_tokens == expected.shape[1]


@torch.no_grad()
def test_flops_are_counted() -> None:
    """Those of the encoder, and of the decoder at the kept length; generate's steps too."""
    model, expected = pruned(NAME), logits(pruned(NAME))
    kept = expected.shape[1]
    counted = FlopCounterMode(display=False)
    with counted:
        logits(model)
    by_hand = FlopCounterMode(display=False)
    with by_hand:
        plain(NAME).model.get_image_features(inputs()["pixel_values"])
        plain(NAME)(inputs_embeds=torch.zeros(1, kept, 64))
    assert counted.get_total_flops() == by_hand.get_total_flops() > 0
    with DispatchLog() as log:
        assert torch.equal(logits(model), expected)
    assert any(name.startswith("hawk.score") for name, _ in log.calls)
    tokens = new_tokens(generate(model, inputs()), inputs())
    with FlopCounterMode(display=False):
        assert new_tokens(generate(model, inputs()), inputs()) == tokens


@pytest.mark.slow
def test_a_compiled_step_and_encoder_stay_compiled_behind_a_mode() -> None:
    model = fresh(NAME, compile_decode=True, compile_vision=True)
    with FlopCounterMode(display=False):
        tokens = new_tokens(generate(model, inputs()), inputs())
    runtime = model.__dict__[RUNTIME]
    assert not runtime.compiled_steps and not runtime.vision.modules
    for _ in range(2):
        assert new_tokens(generate(model, inputs()), inputs()) == tokens
    assert runtime.compiled_steps and runtime.vision.modules


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("cpu"),
    "default_device": default_device,
    "deterministic": deterministic,
    "debug": DebugMode,
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "force_backend": lambda: torch.compiler.set_stance("default", force_backend="aot_eager"),
    "suppress_errors": lambda: torch._dynamo.config.patch(suppress_errors=True),
    "recompile_limit": lambda: torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1),
    "anomaly": torch.autograd.detect_anomaly,
    "saved_tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    "profiler": torch.profiler.profile,
}
QUICK = ("force_eager",)
STANCES = ("force_eager", "eager_on_recompile")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in AROUND])  # fmt: skip
def test_what_changes_nothing(name: str) -> None:
    model, expected = fresh(NAME), logits(pruned(NAME))
    for _ in range(2):
        with AROUND[name]():
            assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    if name in STANCES:
        assert model.__dict__[RUNTIME].prefill.compilations == 1


@pytest.mark.slow
def test_switched_off_around_the_call_and_compiled_around_it() -> None:
    expected = logits(pruned(NAME))
    assert torch.equal(torch.compiler.disable(lambda: logits(fresh(NAME)))(), expected)
    around = torch.compile(lambda model, given: logits(model, given), backend="eager")
    assert torch.equal(around(fresh(NAME), inputs()), expected)
    assert torch.equal(logits(torch.compile(fresh(NAME), backend="eager")), expected)
    whole = torch.compile(lambda model, given: model(**given).logits, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="compiles its own prefill: leave fullgraph=True out"):
        whole(fresh(NAME), inputs())


class Wrapped(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits


def arguments() -> tuple[Tensor, Tensor]:
    return inputs()["input_ids"], inputs()["pixel_values"]


TRACERS: dict[str, Callable[[Any], Any]] = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, arguments()),
    "FakeTensorMode": lambda model: torch.export.export(model, arguments()),
    "ProxyTorchDispatchMode": lambda model: make_fx(model)(*arguments()),
    "torch.fx.symbolic_trace": torch.fx.symbolic_trace,
    "torch.func": lambda model: torch.vmap(model)(*(each[None] for each in arguments())),
}


@pytest.mark.parametrize("name", TRACERS)
def test_tracers_are_refused_by_name(name: str) -> None:
    """And the model prunes as before behind them."""
    with pytest.raises(UnsupportedCallError, match=rf"^{name}.* was asked of a pruned prefill.*hawk_compile\.export"):
        TRACERS[name](Wrapped(pruned(NAME)))
    assert logits(pruned(NAME)).shape[1] < inputs()["input_ids"].shape[1]


def test_prompts_without_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedCallError, match="the prompt is a Tensor on meta without the numbers"):
        pruned(NAME)(**{name: value.to("meta") for name, value in inputs().items()})


def test_switches_of_torch_compile_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are set at the call; where at optimize alone, what was not compiled then is now."""
    expected = logits(pruned(NAME))
    monkeypatch.setenv(SWITCH, "1")
    model = fresh(NAME)
    with pytest.raises(UnsupportedCallError, match=r"switched off \(TORCHDYNAMO_DISABLE=1 in the environment\)"):
        logits(model)
    monkeypatch.delenv(SWITCH)
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UnsupportedCallError, match=r"torch\._dynamo\.config\.disable, which TORCH_COMPILE_DISABLE"),
    ):
        logits(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_a_stance_that_forbids_new_graphs_is_named() -> None:
    model = fresh(NAME)
    refused = pytest.raises(UnsupportedCallError, match=r'set_stance\("fail_on_recompile"\) is on')
    with torch.compiler.set_stance("fail_on_recompile"), refused:
        logits(model)
    expected = logits(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(logits(model), expected)


def test_the_stance_is_put_back_by_the_last_of_several_calls() -> None:
    with torch.compiler.set_stance("force_eager"):
        first, second = compiling(), compiling()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert compiles_all()
        second.__exit__(None, None, None)
        assert not compiles_all()
    assert compiles_all()


@pytest.mark.parametrize("calls_again", [True, False])
def test_a_stance_that_is_set_beside_a_call_stays(calls_again: bool) -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        with compiling():
            later = torch.compiler.set_stance("force_eager")  # as another thread would
            if calls_again:
                with compiling():
                    assert compiles_all()
        assert is_in_force(later)
    assert compiles_all()


def test_a_mode_of_another_thread_makes_no_difference() -> None:
    results: list[Tensor] = []
    expected, compiled = logits(pruned(NAME)), pruned(NAME).__dict__[RUNTIME].prefill.compilations
    with DispatchLog() as log:
        thread = threading.Thread(target=lambda: results.append(logits(pruned(NAME))))
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)
    assert not log.calls and pruned(NAME).__dict__[RUNTIME].prefill.compilations == compiled
