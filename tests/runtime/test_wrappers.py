"""Modules that hold one model: what is asked of them is asked of the model inside, whichever came first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import hawk_compile
from hawk_compile.compat.models import REPLICATE
from hawk_compile.errors import HawkError, UnsupportedCallError, UnsupportedModelError
from tests import zoo
from tests.runtime.models import ROUNDING, conversation, fresh, generate, picture, plain
from tests.runtime.reference import Conversation
from tests.runtime.test_optimize import state

NAME, RATIO = "llava", 0.6


class Wrapper(nn.Module):
    """As users write them: the model under any name, something else beside it."""

    def __init__(self, **models: nn.Module):
        super().__init__()
        self.rest = nn.ModuleDict({"head": nn.Linear(2, 2), **models})

    def forward(self, **kwargs: Any) -> Any:
        return self.rest["vlm"](**kwargs)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group by itself."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0].log_softmax(-1)


@cache
def expected(name: str = NAME) -> Tensor:
    """Of the hand-written loop."""
    return conversation(name, picture(name)).logits.log_softmax(-1)


def check(module: Any, name: str = NAME) -> None:
    """It prunes as by hand, and the report of the module says so."""
    torch.testing.assert_close(log_probabilities(module, picture(name)), expected(name), **ROUNDING)
    assert hawk_compile.report(module).reason.startswith(f"ratio={RATIO} removes")


def is_whole(module: Any) -> bool:
    return log_probabilities(module, picture(NAME)).shape[0] == picture(NAME)["input_ids"].shape[1]


def settings() -> dict[str, Any]:
    return {"ratio": RATIO, "backend": "eager"}


def test_what_holds_one_model_is_asked_for_it() -> None:
    model = zoo.build(NAME, layers=2)
    before, wrapper = state(model), Wrapper(vlm=model)
    assert hawk_compile.optimize(wrapper, **settings()) is wrapper and not vars(wrapper).keys() - vars(Wrapper()).keys()
    check(wrapper)
    with hawk_compile.pruned(wrapper, ratio=0.9, backend="eager") as inside:
        assert inside is wrapper and is_whole(wrapper) is False
        assert hawk_compile.report(model).reason.startswith("ratio=0.9")
    check(torch.compile(wrapper, backend="eager"))
    check(nn.DataParallel(wrapper))  # on a machine without devices it runs the model itself
    assert hawk_compile.restore(wrapper) is wrapper and state(model) == before
    with pytest.raises(HawkError, match="report needs an optimised model"):
        hawk_compile.report(wrapper)


def test_which_model_is_meant() -> None:
    text, one, other = plain(NAME).model.language_model, zoo.build(NAME, layers=2), plain(NAME)
    assert hawk_compile.optimize(Wrapper(vlm=one, encoder=text), **settings()) and "forward" in vars(one)
    assert hawk_compile.optimize(Wrapper(vlm=one, again=one), **settings())
    with pytest.raises(UnsupportedModelError, match=r"got Wrapper, which holds 2: give model.rest.a or model.rest.b"):
        hawk_compile.optimize(Wrapper(a=one, b=other), **settings())
    with pytest.raises(UnsupportedModelError, match="got Wrapper, which holds none: give the model that"):
        hawk_compile.optimize(Wrapper(), **settings())
    with pytest.raises(UnsupportedModelError, match="LlamaModel takes no images"):
        hawk_compile.optimize(Wrapper(vlm=text), **settings())


def test_copies_for_other_devices_are_refused() -> None:
    """nn.DataParallel makes them of every module at every call; without such devices, of a model by hand."""
    model = fresh(NAME)
    parallel = nn.DataParallel(Wrapper(vlm=model))
    with pytest.raises(UnsupportedCallError, match=r"nn\.DataParallel copies an optimised model to several devices"):
        getattr(model, REPLICATE)()
    parallel.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"copies its model to 2 devices .* got device_ids=\[0, 1\]"):
        hawk_compile.optimize(parallel, ratio=RATIO)
    hawk_compile.restore(model)
    assert type(getattr(model, REPLICATE)()) is type(model)


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_does_not_cut_the_graph() -> None:
    """Its optimiser would, at every bucket of gradients: here, of a few parameters."""
    model = fresh(NAME)
    parallel = DistributedDataParallel(model, bucket_cap_mb=1e-3)
    asked = torch._dynamo.config.optimize_ddp
    check(parallel)
    check(model)
    assert torch._dynamo.config.optimize_ddp is asked
    hawk_compile.restore(parallel)
    assert is_whole(parallel)


@pytest.mark.slow
@pytest.mark.usefixtures("group")
def test_fully_shard() -> None:
    """Of the whole model it works, before optimize or behind; of its layers it is refused, by name."""
    model = fresh(NAME)
    fully_shard(model)
    assert type(model).__name__.startswith("FSDP")
    check(model)
    hawk_compile.restore(model)
    assert is_whole(model) and "forward" not in vars(model)
    before = state(model)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    with pytest.raises(UnsupportedModelError, match=r"model.model.language_model.layers.0 is sharded by FSDP"):
        hawk_compile.optimize(model, **settings())
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.usefixtures("group")
def test_layers_that_are_sharded_behind_optimize() -> None:
    model = fresh(NAME)
    check(model)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"model.model.language_model.layers.0 is sharded by FSDP"):
            model(**picture(NAME))
    assert is_whole(hawk_compile.restore(model))
    outer = FullyShardedDataParallel(zoo.build(NAME, layers=2), use_orig_params=True, device_id=torch.device("cpu"))
    check(hawk_compile.optimize(outer, **settings()))


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("first", ["optimize", "wrap"])
def test_optimised_before_or_behind(first: str) -> None:
    """DDP, a module around the model, torch.compile of it, in place too; called before too."""
    for wrap in (
        lambda model: DistributedDataParallel(model, bucket_cap_mb=1e-3), lambda model: Wrapper(vlm=model),
        lambda model: torch.compile(model, backend="eager"), compiled_in_place,
    ):  # fmt: skip
        model = zoo.build(NAME, layers=2)
        if first == "optimize":
            hawk_compile.optimize(model, **settings())
            module = wrap(model)
        else:
            module = wrap(model)
            assert is_whole(module)
            assert hawk_compile.optimize(module, **settings()) is module
        check(module)
        out = generate(model, picture(NAME), 4)
        assert hawk_compile.report(out).reason.startswith("ratio=0.6 removes")
        hawk_compile.restore(module)
        assert is_whole(module)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


class ValueHead(nn.Module):
    """As trl's: a value for each token, of the last hidden states."""

    def __init__(self, model: Any):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(model.config.get_text_config().hidden_size, 1)

    def forward(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = self.pretrained_model(**kwargs, output_hidden_states=True)
        return out.logits, self.v_head(out.hidden_states[-1])

    def generate(self, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(**kwargs)


@pytest.mark.slow
def test_a_value_for_each_token_that_is_kept() -> None:
    inputs = picture(NAME)
    wrapper = hawk_compile.optimize(ValueHead(zoo.build(NAME, layers=2)), **settings())
    with torch.no_grad():
        logits, values = wrapper(**inputs)
    torch.testing.assert_close(logits[0].log_softmax(-1), expected(), **ROUNDING)
    by_hand = conversation(NAME, inputs)
    hidden: list[Tensor] = []
    norm = by_hand.decoder.norm
    hook = norm.register_forward_hook(lambda module, args, output: hidden.append(output))
    by_hand = conversation(NAME, inputs)
    hook.remove()
    torch.testing.assert_close(values, wrapper.v_head(hidden[-1]), **ROUNDING)
    out = generate(wrapper, inputs, 4)
    assert out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == by_hand.greedy(4)


@pytest.mark.slow
def test_other_weights_for_a_call_and_other_modes() -> None:
    """torch.func.functional_call, inference_mode, autocast: what the model itself gives by them."""
    model, inputs = fresh(NAME), picture(NAME)
    check(model)
    torch.manual_seed(0)
    other = zoo.build(NAME, layers=2)
    with torch.no_grad():
        for parameter in other.model.language_model.layers.parameters():
            parameter.mul_(1.5)
        by_hand = Conversation(other, RATIO).prompt(inputs)
        out = torch.func.functional_call(model, dict(other.named_parameters()), (), inputs)
    torch.testing.assert_close(out.logits[0].log_softmax(-1), by_hand.log_softmax(-1), **ROUNDING)
    check(model)
    with torch.inference_mode():
        check(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            log_probabilities(model, inputs).float(), expected().float(), atol=0.3, rtol=0.1)
    check(model)


def test_tools_of_a_module_that_holds_a_model_are_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    wrapper, processor = Wrapper(vlm=plain(NAME)), None
    tools: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: hawk_compile.evaluate(wrapper, processor, "demo"),
        "calibrate": lambda: hawk_compile.calibrate(wrapper, processor, "demo"),
        "export": lambda: hawk_compile.export(wrapper, picture(NAME), tmp_path / "out", format="onnx", ratio=RATIO),
    }
    for name, tool in tools.items():
        with pytest.raises(HawkError, match=r"^model must be a transformers\.PreTrainedModel, got Wrapper: give the"):
            tool()
        assert not list(tmp_path.iterdir()), name
    with pytest.raises(HawkError, match=r"^give a checkpoint folder, a config\.json, a config or a model, got Wrapper"):
        hawk_compile.inspect(wrapper)  # type: ignore[arg-type]


def test_what_traces_is_refused() -> None:
    model, inputs = fresh(NAME), picture(NAME)
    pixels = inputs.pop("pixel_values")
    with pytest.raises(UnsupportedCallError, match=r"torch.func \(vmap, grad, jvp\) was asked of a pruned prefill"):
        torch.vmap(lambda images: model(**inputs, pixel_values=images).logits)(pixels[None])
    with pytest.raises(UnsupportedCallError, match=r"torch.func \(vmap, grad, jvp\) was asked of a pruned prefill"):
        torch.func.grad(lambda images: model(**inputs, pixel_values=images).logits.sum())(pixels)
    with pytest.raises(UnsupportedCallError, match=r"torch\.jit\.trace was asked of a pruned prefill"):
        torch.jit.trace(lambda images: model(**inputs, pixel_values=images).logits, pixels)
    with pytest.raises(UnsupportedCallError, match=r"torch\.export was asked of a pruned prefill"):
        torch.export.export(model, (), {**inputs, "pixel_values": pixels})
