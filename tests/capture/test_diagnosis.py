"""What Dynamo cannot capture is said in terms of the model: its line, its module, why, and the remedy."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import hawk_compile
from hawk_compile.capture.dynamo import capture_lock
from hawk_compile.compat.dynamo import dynamo_settings
from hawk_compile.compile import backend
from hawk_compile.errors import AttentionNotFoundError, CaptureError, CompileError, InputError, ShapeError
from hawk_compile.runtime import compiled
from tests import zoo
from tests.runtime.models import picture

NAME = "llava"
LAYER = "model.language_model.layers.1"


def branches(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if hidden_states.sum() > 0:  # here
        hidden_states = hidden_states + 1
    return type(self).forward(self, hidden_states, *args, **kwargs)


def reads_a_value(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    scale = 2 if hidden_states.sum().item() > 0 else 1  # here
    return type(self).forward(self, scale * hidden_states, *args, **kwargs)


def breaks(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    torch._dynamo.graph_break()  # here
    return type(self).forward(self, hidden_states, *args, **kwargs)


def raises(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise ValueError("no such layer")  # here


def does_not_fit(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return hidden_states @ hidden_states[:, :3, :5]  # here


CASES = {
    branches: "Data-dependent branching",
    reads_a_value: "Could not guard on data-dependent expression",
    breaks: r"graph_break\(\)",
    raises: "no such layer",
    does_not_fit: "size",
}


def broken(forward: Callable[..., Any]) -> Any:
    """A model with that forward in its second decoder layer."""
    model = zoo.build(NAME, layers=2)
    layer = model.get_submodule(LAYER)
    layer.forward = forward.__get__(layer)
    return model


def line_of(function: Callable[..., Any]) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if "# here" in line)


def lines_shown(error: BaseException) -> int:
    return len("".join(traceback.format_exception(error)).splitlines())


@pytest.mark.parametrize("forward", CASES, ids=lambda function: function.__name__)
def test_the_line_of_the_model_is_named(forward: Callable[..., Any]) -> None:
    model = hawk_compile.optimize(broken(forward), ratio=0.5, backend="eager")
    with pytest.raises(CaptureError, match=CASES[forward]) as caught:
        model(**picture(NAME))
    message = str(caught.value)
    assert not isinstance(caught.value, AttentionNotFoundError)
    assert message.startswith("the forward of LlavaForConditionalGeneration cannot be captured as one graph")
    assert f"{__file__}:{line_of(forward)}, in {forward.__name__}: `" in message
    assert f"LlamaDecoderLayer {LAYER}" in message and "the first of" not in message
    assert "hawk_compile.restore(model)" in message
    assert "\n" not in message and len(message) < 800
    assert isinstance(caught.value.__context__, TorchDynamoException)
    assert lines_shown(caught.value) < 100


def test_a_line_of_a_class_names_the_first_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(NAME, layers=2)
    mlp = type(model.get_submodule(f"{LAYER}.mlp"))

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) if x.max() > 1 else self.gate_proj(x))

    monkeypatch.setattr(mlp, "forward", forward)
    hawk_compile.optimize(model, ratio=0.5, backend="eager")
    with pytest.raises(CaptureError, match=rf"LlamaMLP {LAYER.replace('1', '0')}\.mlp \(the first of 2\)"):
        model(**picture(NAME))


def test_the_model_runs_when_it_is_restored() -> None:
    model = hawk_compile.optimize(broken(branches), ratio=0.5, backend="eager")
    with dynamo_settings(verbose=True), pytest.raises(CaptureError) as caught:
        model(**picture(NAME))
    assert isinstance(caught.value.__cause__, TorchDynamoException), "TORCHDYNAMO_VERBOSE=1 shows Dynamo's part"
    with dynamo_settings(suppress_errors=True), pytest.raises(CaptureError):
        model(**picture(NAME))
    assert hawk_compile.restore(model)(**picture(NAME)).logits.isfinite().all()


class WithoutCompiler(RuntimeError):
    """As Inductor raises where there is no C++ compiler."""


@pytest.mark.parametrize(("inner", "raised", "match"), [
    (WithoutCompiler("no compiler\nlong\nstory"), CompileError,
     r"^the forward of Llava\w+ was captured, and its graph cannot be compiled \(WithoutCompiler: no compiler\): "
     r'.*TORCHDYNAMO_VERBOSE=1.*take backend="aot_eager", or call hawk_compile.restore\(model\)'),
    (torch.OutOfMemoryError("12 GiB"), torch.OutOfMemoryError, "^12 GiB$"),
    (ShapeError("not at the pruned length"), ShapeError, "^not at the pruned length$"),
])  # fmt: skip
def test_what_compiles_the_graph_fails(
    inner: Exception, raised: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(gm: Any, example_inputs: list[Any]) -> Any:
        raise inner

    model = hawk_compile.optimize(zoo.build(NAME, layers=1), ratio=0.5, backend="eager")
    with monkeypatch.context() as patched, pytest.raises(raised, match=match) as caught:
        patched.setattr(backend, "inner_compiler", lambda name: compiler)
        model(**picture(NAME))
    assert caught.value.__cause__ is None and lines_shown(caught.value) < 100
    assert model(**picture(NAME)).logits.isfinite().all()


def test_an_error_that_was_handled_before_is_not_taken_for_the_cause() -> None:
    model = hawk_compile.optimize(broken(breaks), ratio=0.5, backend="eager")
    try:
        raise InputError("of another call")
    except InputError:
        with pytest.raises(CaptureError, match="graph_break"):
            model(**picture(NAME))


def test_a_decode_step_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(gm: Any, example_inputs: list[Any]) -> Any:
        raise WithoutCompiler("no compiler")

    monkeypatch.setattr(compiled, "inner_compiler", lambda name: compiler)
    model = hawk_compile.optimize(zoo.build(NAME, layers=1), ratio=0.5, backend="eager", compile_decode=True)
    with pytest.raises(CompileError, match=r"^the decode step of Llava.*WithoutCompiler.*leave compile_decode out"):
        model.generate(**picture(NAME), max_new_tokens=3)
    assert not capture_lock._is_owned()


def test_inspect_names_the_line_too() -> None:
    with pytest.raises(CaptureError, match=f":{line_of(branches)}, in branches: .*{LAYER}"):
        hawk_compile.inspect(broken(branches), image_tokens=64, text_tokens=20)


def test_what_we_refuse_ourselves_stays_what_it_is() -> None:
    """An error of a pass, or one of ours before the capture, is no capture error."""
    model = hawk_compile.optimize(zoo.build(NAME, layers=1), ratio=0.5, backend="eager")
    with pytest.raises(InputError):
        model(**{**picture(NAME), "inputs_embeds": torch.zeros(1, 4, 64)})


@pytest.mark.parametrize(
    "forward", [pytest.param(branches, marks=pytest.mark.slow), reads_a_value], ids=["branches", "reads_a_value"]
)
def test_export_names_the_line_too(
    forward: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match="the component prefill cannot be captured") as caught:
        hawk_compile.export(broken(forward), picture(NAME), tmp_path / "out", ratio=0.5)
    message = str(caught.value)
    assert f"{__file__}:{line_of(forward)}, in {forward.__name__}: `" in message
    assert f"LlamaDecoderLayer model.{LAYER}" in message and "hawk_compile.optimize" in message
    assert lines_shown(caught.value) < 100 and not capfd.readouterr().err, "torch.export prints its graph"
    assert not list(tmp_path.iterdir())
