"""The private names of torch and transformers that we use: each is there, takes what we give and does what we need.

A new release that changes one fails here, by its name. No other file than compat's may use one.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import json
import linecache
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft as lora
import pytest
import torch
from accelerate import hooks as accelerate_hooks
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationMixin, LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, StaticIndexedLayer
from transformers.utils import output_capturing

from hawk_compile.compat import accelerate, dynamo, exporters, guards, models, modes, peft, quantisers
from hawk_compile.kernels import compat as kernels
from hawk_compile.passes import compat as passes
from hawk_compile.versions import SINCE, lacking
from tests import zoo

ROOT = Path(__file__).parents[1]
HOMES = {"hawk_compile/compat", "passes/compat.py", "kernels/compat.py", "hawk_compile/serving/vllm/compat"}
OWN = {"_hawk_runtime", "_hawk_part"}
"""Attributes that we put on others' objects ourselves."""
PARTS = ("_token_id", "_token_index", "_features", "_norm", "_proj", "_seconds", "_like", "_hooks", "_hooks_", "_")
"""Ends of names, and separators."""


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_operators_use() -> None:
    kernels.check(torch.tensor(2).item() == 2)
    with pytest.raises(RuntimeError):
        kernels.check(False)


def test_what_tells_branches_of_code_from_what_operators_ask() -> None:
    """A condition on a size: by a branch, and by an operator that works out shapes."""
    asked = []

    def take(gm: fx.GraphModule, _: Any) -> Any:
        env = next(node.meta["example_value"].node.shape_env for node in gm.graph.nodes if node.op == "placeholder")
        asked.extend((passes.asked_by_code(guard), str(guard.sloc.maybe_user_loc)) for guard in env.guards)
        return gm.forward

    def branch(values: torch.Tensor) -> torch.Tensor:
        if values.shape[0] > 5:
            values = values.reshape(-1, 4)
        return values

    torch.compile(branch, backend=take, dynamic=True, fullgraph=True)(torch.zeros(8, 2))
    assert {code for code, place in asked if "shape[0] > 5" in place} == {True}
    assert {code for code, place in asked if "reshape" in place} == {False}


def test_what_passes_use() -> None:
    leaves, _ = passes.tree_flatten({"a": [1, 2], "b": 3})
    assert leaves == [1, 2, 3]
    operator = torch.ops.aten.add_.Tensor
    assert isinstance(operator, passes.OpOverload) and isinstance(torch.ops.aten.add_, passes.OpOverloadPacket)
    assert passes.schema_of(operator).is_mutable and not passes.schema_of(torch.ops.aten.add.Tensor).is_mutable
    whole = torch.zeros(4)
    assert passes.storage_of(whole) == passes.storage_of(whole[1:]) != passes.storage_of(torch.zeros(4))
    inside: list[int] = []
    torch.vmap(lambda row: (inside.append(passes.storage_of(row)), row)[1])(whole.view(2, 2))
    assert inside == [passes.storage_of(whole)]
    passes.assert_async(torch.tensor(True), "never")
    with passes.enable_python_dispatcher():
        assert torch.ones(2).sum() == 2
    assert parameters(passes.all_reduce)[:3] == ["self", "reduceOp", "group"]
    assert callable(passes.invoke_subgraph)


def test_names_of_operators_in_graphs() -> None:
    """ATen's, or functions of torch; graphs of torch.export keep their guards where we look for them."""
    for name in (*passes.ASSERTIONS, *passes.CHECK_NAMES, passes.TO_COPY, passes.UNSAFE_VIEW, passes.ATEN_SOFTMAX):
        assert hasattr(torch.ops.aten, name) or hasattr(torch, name), name

    class Small(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values.to(torch.float64)

    program = torch.export.export(Small(), (torch.ones(3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    targets = [node.target for node in program.run_decompositions().graph.nodes]
    operators = {target.overloadpacket.__name__ for target in targets if isinstance(target, passes.OpOverload)}
    assert passes.TO_COPY in operators
    value = next(node for node in program.graph.nodes if node.op == "placeholder").meta["val"]
    assert isinstance(value, passes.FakeTensor)
    assert hasattr(program.module(), passes.GUARDS)


def test_settings_of_torch_compile_hold_inside_and_in_this_thread_alone() -> None:
    seen: list[Any] = []

    def graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append([node.target for node in gm.graph.nodes])
        return gm

    @torch.compile(backend=graph, fullgraph=True)
    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.ones(int(values.sum().item()))

    names = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops", "specialize_float")
    with (
        dynamo.dynamo_settings(**dict.fromkeys(names, True), recompile_limit=2, accumulated_recompile_limit=64),
        dynamo.shape_settings(use_duck_shape=False),
    ):
        assert total(torch.tensor([1, 2])).shape == (3,)
    assert "item" in seen[0]


def test_guards_say_what_they_ask_and_where() -> None:
    """A filter may leave out any of them."""
    seen: dict[tuple[str, str], guards.Guard] = {}

    def keep(given: list[guards.Guard]) -> list[bool]:
        seen.update({(guard.guard_type, guards.place_of(guard)): guard for guard in given})
        return [guard.guard_type != guards.NO_HOOKS for guard in given]

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
            self.second.weight, self.factor, self.shape = self.first.weight, 3, (1, 2)

        def forward(self, values: Any) -> Any:
            values = values.view(self.shape) if not hasattr(self, "gate") else values
            return self.second(self.first(values)) * self.factor

    model = Tied()
    options = {guards.GUARD_FILTER: keep}
    compiled = torch.compile(lambda *args: args[0](args[1]), backend="eager", fullgraph=True, options=options)
    compiled(model.forward, torch.ones(1, 2))
    first, second = (f"{guards.OWNER}._modules['{name}']" for name in ("first", "second"))
    assert seen[guards.CLASS, first].value is model.first
    assert guards.CHILD.match(first.removeprefix(guards.OWNER))[1] == "first"  # type: ignore[index]
    weight = f"{first}._parameters['weight']"
    assert seen[guards.TENSOR, weight].value is model.first.weight
    assert guards.HELD.fullmatch(weight.removeprefix(first)).groups() == ("_parameters", "weight")  # type: ignore[union-attr]
    pair = next(guard for (kind, _), guard in seen.items() if kind == guards.ONE)
    assert {guards.place_of(pair), guards.twin_of(pair)} == {weight, f"{second}._parameters['weight']"}
    assert any((kind, f"{guards.OWNER}.factor") in seen for kind in guards.VALUE)
    assert {kind for kind, place in seen if place == f"{guards.OWNER}.shape"} <= {*guards.VALUE, *guards.OF_ANY_VALUE}
    assert guards.attribute_of(seen[guards.WHETHER, guards.OWNER]) == "gate"
    lacking_one = [guard for (kind, place), guard in seen.items() if kind == guards.NO_ATTRIBUTE and place == first]
    assert all(guards.attribute_of(guard) not in vars(model.first) for guard in lacking_one)
    assert lacking_one
    without = [guard for (kind, _), guard in seen.items() if kind == guards.NO_KEY]
    assert all(guards.key_of(guard) not in guard.value for guard in without)  # type: ignore[operator]
    assert any(kind == guards.NO_HOOKS for kind, _ in seen)


def test_tensors_are_told_from_others_all_at_once() -> None:
    known = [torch.nn.Parameter(torch.ones(2, 3)), torch.ones(4)]
    fit = guards.as_they_are(known)
    assert fit(*known)
    assert fit(torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(4))
    others = [
        torch.ones(2, 3), torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2, 3).half()),
        torch.nn.Parameter(torch.ones(2, 3), requires_grad=False), torch.nn.Parameter(torch.ones(3, 2).T), None,
    ]  # fmt: skip
    assert not any(fit(other, known[1]) for other in others)
    assert not guards.as_they_are([torch.ones(2), torch.ones(2)])(*[known[1][:2]] * 2)
    assert guards.as_they_are([])()


def test_backends_errors_and_trees_of_torch_compile() -> None:
    assert callable(dynamo.lookup_backend("eager")) and callable(dynamo.lookup_backend("inductor"))
    assert dynamo.tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]
    for error in (dynamo.Unsupported, dynamo.UserError, dynamo.ShortenTraceback, dynamo.FailOnRecompileLimitHit):
        assert issubclass(error, Exception)
    assert issubclass(dynamo.Unsupported, dynamo.TorchDynamoException)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise ValueError("by us")

    with pytest.raises(dynamo.ShortenTraceback) as caught:
        torch.compile(lambda values: values + 1, backend=backend)(torch.ones(2))
    assert isinstance(caught.value.inner_exception, ValueError)

    def handing_on(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise dynamo.handed_on(KeyError("by us"))

    with pytest.raises(KeyError) as handed:
        torch.compile(lambda values: values + 1, backend=handing_on)(torch.ones(2))
    assert str(handed.value) == "'by us'" and not isinstance(handed.value.__context__, dynamo.ShortenTraceback)
    assert not dynamo.tells_all()
    with dynamo.dynamo_settings(verbose=True):
        assert dynamo.tells_all()
    weights = torch.ones(3)
    dynamo.mark_static(weights)


def test_what_torch_compile_was_told_to_leave_uncompiled() -> None:
    assert dynamo.compiles_all()
    for stance in ("force_eager", "eager_on_recompile", "eager_then_compile"):
        with torch.compiler.set_stance(stance):
            assert not dynamo.compiles_all()
    with torch.compiler.set_stance("default", force_backend="eager"):
        assert not dynamo.compiles_all()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert dynamo.compiles_all()


def test_which_stance_is_in_force() -> None:
    outer = torch.compiler.set_stance("force_eager")
    assert dynamo.is_in_force(outer)
    with torch.compiler.set_stance("default"):
        assert not dynamo.is_in_force(outer)
    assert dynamo.is_in_force(outer)
    outer.__exit__(None, None, None)
    assert not dynamo.is_in_force(outer)


def test_whether_torch_compile_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(values: torch.Tensor) -> torch.Tensor:
        return values * 2

    assert dynamo.is_compiled(torch.compile(double)) and not dynamo.is_compiled(double)
    assert not dynamo.is_switched_off()
    with dynamo.dynamo_settings(disable=True):
        assert dynamo.is_switched_off()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert torch.compile(double) is double
    monkeypatch.undo()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match=dynamo.REFUSED_TO_COMPILE):
        torch.compile(double, backend="eager")(torch.ones(2))


def test_texts_of_generated_code_go_with_the_code() -> None:
    """What Dynamo writes and what a compiler writes anew; a traceback keeps its own, and what others write stays."""
    names: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        gm.recompile()
        assert "sin" in gm.code
        names.append(type(gm).forward.__code__.co_filename)
        return gm.forward

    def sine(values: torch.Tensor) -> torch.Tensor:
        return values.sin()

    graph = fx.symbolic_trace(sine)
    before = {*dynamo.source_texts}
    with dynamo.texts_going_with_code():
        function = dynamo.compile_and_forget(sine, backend=backend, dynamic=False)
        function(torch.ones(2))
        graph.recompile()
        gone = fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
    written = type(gone).forward.__code__.co_filename
    assert {written, *names} <= dynamo.source_texts.keys() - before
    with pytest.raises(AttributeError) as caught:
        graph.forward("no tensor")
    name = type(graph).forward.__code__.co_filename
    del graph, gone
    gc.collect()
    assert "sin()" in str(traceback.extract_tb(caught.tb)[-1].line) and name in linecache.cache
    assert written not in dynamo.source_texts
    del caught, function
    gc.collect()
    assert dynamo.source_texts.keys() <= before
    later = fx.symbolic_trace(sine)
    name = type(later).forward.__code__.co_filename
    del later
    gc.collect()
    assert name in dynamo.source_texts


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


seen: list[str] = []


def test_dispatch_modes_see_what_a_graph_runs_and_bar_no_second_call() -> None:
    compiled: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled.append(list(modes.dispatch_modes()))
        return gm.forward

    def sine(values: torch.Tensor) -> torch.Tensor:
        return values.sin()

    function = torch.compile(sine, backend=backend, fullgraph=True)
    function(torch.ones(2))
    seen.clear()
    with Watching() as mode, DebugMode() as debug, FakeTensorMode() as fake:
        assert modes.dispatch_modes() == [debug, mode, fake] or {*modes.dispatch_modes()} == {debug, mode, fake}
        assert [modes.bars_graphs(each) for each in (mode, debug, fake)] == [True, False, False]
        assert [modes.is_tracer(each) for each in (mode, debug, fake)] == [False, False, True]
        assert not modes.has_values(torch.ones(2))
    with Watching() as mode, modes.graphs_let_in([mode]):
        for _ in range(2):
            function(torch.ones(2))
    assert seen.count("aten.sin.default") == 2 and compiled == [[]]
    assert modes.bars_graphs(mode)
    assert modes.has_values(torch.ones(2)) and not modes.has_values(torch.ones(2, device="meta"))


def test_function_modes_can_be_set_aside() -> None:
    with torch.device("cpu"), WatchingFunctions() as mode:
        device = modes.function_modes()[0]
        assert modes.function_modes() == [device, mode]
        assert modes.sets_devices(device) and not modes.sets_devices(mode)
        seen.clear()
        with modes.inside_function_modes([device]):
            torch.sin(torch.tensor(1.0))
            assert not seen
            with modes.inside_function_modes([device, mode]):
                torch.sin(torch.tensor(1.0))
        assert "sin" in seen and modes.function_modes() == [device, mode]


def test_hooks_of_a_module_and_of_all_modules() -> None:
    linear, calls = torch.nn.Linear(2, 2), []
    handles = [
        linear.register_forward_hook(print), linear.register_forward_pre_hook(print),
        linear.register_full_backward_hook(print), linear.register_full_backward_pre_hook(print),
    ]  # fmt: skip
    assert modes.hooks_of(linear) == [print] * 4
    for handle in handles:
        handle.remove()
    assert modes.hooks_of(linear) == modes.global_hooks() == []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    assert len(modes.global_hooks()) == 1
    with modes.without_global_hooks():
        linear(torch.ones(2))
    assert not calls
    linear(torch.ones(2))
    handle.remove()
    assert calls == [1] and modes.global_hooks() == []


traced: list[str] = []


def note_trace(context: Any) -> None:
    traced.append(type(context).__name__)
    if len(traced) == 1:
        raise KeyboardInterrupt  # no Exception


def test_what_is_called_while_dynamo_traces() -> None:
    """At each trace and at no call; what it raises comes out as it is, and the next call is traced anew."""

    def double(values: torch.Tensor) -> torch.Tensor:
        dynamo.while_traced(note_trace)
        return values * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    with pytest.raises(KeyboardInterrupt):
        compiled(torch.ones(2))
    assert [compiled(torch.ones(2)).tolist() for _ in range(2)] == [[2, 2], [2, 2]]
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert traced == ["ComptimeContext"] * 2


def test_whether_a_transform_of_torch_func_runs() -> None:
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(dynamo.is_transformed()), row)[1])(torch.ones(2))
    torch.func.grad(lambda value: (seen.append(dynamo.is_transformed()), value)[1])(torch.ones(()))
    assert seen == [True, True] and not dynamo.is_transformed()


def test_whether_a_distributed_data_parallel_runs(tmp_path: Path) -> None:
    seen: list[bool] = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    module = torch.nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: seen.append(dynamo.is_in_ddp()))
    try:
        torch.nn.parallel.DistributedDataParallel(module)(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [True] and not dynamo.is_in_ddp()


def test_where_hooks_of_accelerate_lie() -> None:
    """A chain of them, one that places and one that brings weights, and a model's own."""
    module = torch.nn.Linear(2, 2)
    plain = module.forward
    hooks = [accelerate_hooks.AlignDevicesHook("cuda:0"), accelerate_hooks.ModelHook()]
    vars(hooks[0])["init_hook"] = lambda module: module  # there is no such device
    add, remove = accelerate_hooks.add_hook_to_module, accelerate_hooks.remove_hook_from_module
    for hook in hooks:
        add(module, hook, append=True)
    assert accelerate.hooks_on(module) == hooks and accelerate.HOOK in vars(module)
    assert vars(module)[accelerate.FORWARD] == plain and accelerate.hooked_module(module.forward) is module
    assert accelerate.hooked_module(plain) is None and accelerate.hooked_module(None) is None
    assert [accelerate.only_places(hook) for hook in hooks] == [True, False]
    assert [accelerate.device_of_hook(hook) for hook in hooks] == [torch.device("cuda:0"), None]
    assert not any(map(accelerate.brings_weights, hooks))
    remove(module)
    assert module.forward == plain and not accelerate.hooks_on(module)
    add(module, accelerate_hooks.AlignDevicesHook(torch.device("cpu"), offload=True))
    assert accelerate.brings_weights(*accelerate.hooks_on(module)) and module.weight.is_meta


def test_what_peft_hands_to_modules_by_hooks() -> None:
    model = lora.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora.LoraConfig(target_modules=["0"]))
    layer, seen = model.base_model.model[0], []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(peft.argument_in_hooks(layer)))
    before = peft.hooks_ever_put()
    model.eval()(torch.ones(1, 2), adapter_names=["default"])
    assert seen == ["adapter_names"] and peft.argument_in_hooks(layer) is None and peft.hooks_ever_put() > before


def test_how_peft_reads_a_weight_can_be_followed() -> None:
    from peft.utils.integrations import dequantize_module_weight

    peft.let_weights_be_read()
    layer = torch.nn.Linear(2, 3)
    doubled = torch.compile(lambda: 2 * dequantize_module_weight(layer), backend="eager", fullgraph=True)
    assert torch.equal(doubled(), 2 * layer.weight)
    assert dequantize_module_weight(layer) is layer.weight


def test_layers_of_compressed_tensors() -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config = library.QuantizationConfig(config_groups={"W8A8": ["Linear"]}, ignore=["1"])
    library.apply_quantization_config(model, config)
    assert [quantisers.keeps_compressed(layer) for layer in model] == [True, False]


def test_layers_of_quanto() -> None:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    for activations in (None, library.qint8):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        assert not quantisers.quantises_outputs(model[0])
        library.quantize(model, weights=library.qint8, activations=activations)
        assert quantisers.quantises_outputs(model[0]) == (activations is not None)


def test_layers_of_bitsandbytes_pack_their_weights_as_in_a_call() -> None:
    """Nothing on CPUs for which they do not; what is packed is not packed again, and is saved as it was."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = library.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu").eval()
    weight, asked = layer.weight.data.clone(), layer.support_avx512bf16_for_cpu
    assert asked in (True, False)
    for packs in (False, True):
        layer.support_avx512bf16_for_cpu = packs
        quantisers.pack_weight(layer)
        assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == packs
    assert "packing_format_for_cpu" in inspect.getsource(library.nn.Linear4bit.forward)
    packed = layer.weight.data
    assert packed.shape != weight.shape
    quantisers.pack_weight(layer)
    assert layer.weight.data is packed or torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.state_dict()["weight"], weight)


def test_what_generate_settles_its_settings_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """From all that may give them, before anything else of it runs."""
    monkeypatch.setattr(GenerationMixin, models.SETTLE, getattr(GenerationMixin, models.SETTLE))
    model, seen = zoo.build("llava", layers=1), []
    models.let_generate_ask(lambda settings: seen.append(settings.max_new_tokens))
    inputs = zoo.text_only("llava", model)
    model.generation_config.max_new_tokens = 2
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 2
    model.generate(**inputs, max_new_tokens=1)
    assert seen == [2, 1]



def test_what_is_asked_of_sizes() -> None:
    """Two sizes that are equal have symbols of their own, as they came."""
    taken: list[Any] = []

    def take(gm: fx.GraphModule, _: Any) -> Any:
        fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        taken.extend(fake for fake in fakes if isinstance(fake, torch.Tensor))
        return gm.forward

    def add(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one + other if one.shape[0] > 3 else one

    with dynamo.shape_settings(use_duck_shape=False):
        torch.compile(add, backend=take, dynamic=True)(torch.ones(5), torch.ones(5))
    (came, now), (other_came, other_now) = (dynamo.size_as_it_came(fake.shape[0]) for fake in taken)
    assert came != other_came and now == other_now
    ranges, conditions = dynamo.what_is_asked_of_sizes(taken[0])
    assert {str(came), str(other_came)} <= ranges.keys()
    assert any(condition.free_symbols == {came, other_came} for condition in conditions)


def test_switches_of_torch() -> None:
    before = json.loads(modes.switches_of_torch())
    assert {"num_threads", "default_dtype", "deterministic_algorithms"} <= before.keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert json.loads(modes.switches_of_torch()) != before
    with torch.no_grad():
        assert json.loads(modes.switches_of_torch()) != before
    assert json.loads(modes.switches_of_torch()) == before


def test_packages_that_take_flat_tensors() -> None:
    """`tests/saved` runs them."""
    compile_fx_aot = importlib.import_module("torch._inductor.compile_fx").compile_fx_aot
    assert parameters(compile_fx_aot)[:2] == ["model_", "example_inputs_"]
    assert "config_patches" in parameters(compile_fx_aot)
    package_aoti = importlib.import_module("torch._inductor.package").package_aoti
    assert parameters(package_aoti)[:2] == ["archive_file", "aoti_files"]
    assert callable(dynamo.AOTIModelPackageLoader.run)
    assert torch._inductor.config.cpp.dynamic_threads is False


def test_packages_of_aotinductor() -> None:
    """That they hold what they should is tested by exports; compiling one takes its time."""
    assert parameters(torch._inductor.aoti_compile_and_package)[0] == "exported_program"
    assert {"package_path", "inductor_configs"} <= {*parameters(torch._inductor.aoti_compile_and_package)}
    assert parameters(torch._inductor.aoti_load_package)[0] == "path"


@pytest.mark.parametrize(("name", "takes"), [
    (models.PREPARE_CACHE, ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size",
                            "max_cache_length"]),
    (models.PREPARE_POSITIONS, ["self", "inputs_tensor", "model_kwargs"]),
    (models.PREPARE_ENCODERS, ["self", "model_kwargs"]),
    (models.PREFILL, ["self", "input_ids", "generation_config", "model_kwargs"]),
    (models.UPLOAD, ["self", "working_dir"]),
    (models.CANDIDATES, ["self", "generation_config", "input_ids", "inputs_tensor"]),
])  # fmt: skip
def test_methods_by_which_generate_prepares(name: str, takes: list[str]) -> None:
    assert parameters(getattr(PreTrainedModel, name, None) or getattr(GenerationMixin, name))[: len(takes)] == takes


def test_generate_says_how_long_a_mask_was_that_it_left_out() -> None:
    model, ids = zoo.build("llava", layers=1), torch.full((1, 5), 60)
    for mask in (None, torch.tensor([[0, 1, 1, 1, 1]])):
        found = model.generate(ids, attention_mask=mask, custom_generate=lambda model, *args, **kwargs: kwargs)
        assert models.mask_length_of(found["generation_config"], found) == 5


def test_what_data_parallel_copies_a_module_by() -> None:
    module = torch.nn.Linear(2, 2)
    assert type(getattr(module, models.REPLICATE)()) is torch.nn.Linear
    assert models.REPLICATE in inspect.getsource(torch.nn.parallel.replicate)


def test_a_module_holds_its_parts_where_we_look() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert getattr(module, models.MODULES) == {"0": module[0]}
    assert set(getattr(module[0], models.PARAMETERS)) == {"weight", "bias"}
    assert {"running_mean", "running_var"} <= set(getattr(module[0], models.BUFFERS))
    held = {name for name, value in vars(module[0]).items() if models.is_tensors_or_hooks(name)}
    assert {"_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= held
    others = {name: value for name, value in vars(module[0]).items() if name not in held}
    assert not any(isinstance(value, dict) and value for value in others.values())


def test_models_and_their_configurations() -> None:
    model: Any = zoo.build("llava", layers=1)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert {"llava", "qwen2_vl"} <= models.image_text_types()
    config = model.config.get_text_config()
    assert models.attention_of(config) == "sdpa"
    models.set_attention(config, "eager")
    assert models.attention_of(config) == "eager" == model.config.get_text_config()._attn_implementation
    before = models.let_configs_answer(lambda own: "asked" if own == "eager" else None)
    assert models.attention_of(config) == "asked"
    models.set_attention(config, "sdpa")
    assert models.attention_of(config) == "sdpa"
    models.set_attention(config, "eager")
    models.put_answer(before)
    assert models.attention_of(config) == "eager"
    models.set_attention(config, "sdpa")
    assert models.attention_of(config) == "sdpa" and models.supports_sdpa(model.base_model.get_decoder())
    assert models.compile_settings_of(model).to_dict()["fullgraph"] is not None
    assert models.device_mesh_of(model) is None and (model.tp_size or 1) == 1
    inputs = zoo.inputs("llava", model, rows=[zoo.sizes("llava")[0]])
    assert "mm_encoder_outputs" in models.run_encoders_of(model, inputs)
    assert hasattr(zoo.build("qwen2_audio", layers=1).base_model.audio_tower, models.AUDIO_LENGTHS)


def test_what_recorders_of_hidden_states_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_capturing, "is_torchdynamo_compiling", output_capturing.is_torchdynamo_compiling)
    collector = output_capturing.CompileableContextVar("tried")
    for captured in (True, False):
        asked_now = output_capturing.is_torchdynamo_compiling
        assert models.let_recorders_ask(lambda answer=captured: answer) is asked_now
        token = collector.set({"hidden_states": []})
        assert (collector.global_var is not None) == captured
        collector.reset(token)


def test_sizes_in_texts_of_captured_code() -> None:
    """A sentence fixes no size where that is asked for, in this thread and inside; elsewhere it does. A name or a key
    does anywhere."""
    named = len(f"{dynamo.WORD} rows")

    def of_a_sentence(values: torch.Tensor) -> torch.Tensor:
        return values * len(f"{values.shape[0]} rows")

    def of_a_name(values: torch.Tensor) -> torch.Tensor:
        return values * len(f"rows_{values.shape[0]}")

    def of_a_number(values: torch.Tensor) -> torch.Tensor:
        return values * len(f"{values.shape[0]}")

    def lengths(function: Any) -> list[int]:
        compiled = torch.compile(function, backend="eager", dynamic=True, fullgraph=True, isolate_recompiles=True)
        return [int(compiled(torch.ones(rows))[0]) for rows in (3, 12)]

    with dynamo.sizes_named_in_texts():
        assert lengths(of_a_sentence) == [named, named]
        assert lengths(of_a_name) == [6, 7]
        assert lengths(of_a_number) == [1, 2]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lengths, of_a_sentence).result() == [6, 7]
    assert lengths(of_a_sentence) == [6, 7]


def test_files_that_are_not_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert models.file_of(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert models.file_of(str(tmp_path), "chat_template.json") is None
    assert models.file_of("nobody/has-this-one", "config.json") is None


def test_tables_of_the_exporters() -> None:
    from transformers import masking_utils
    from transformers.exporters import exporter_executorch, exporter_onnx, utils  # noqa: F401

    assert hasattr(masking_utils, exporters.VMAP) and hasattr(masking_utils, exporters.INDEXING)
    assert {exporters.VMAP, exporters.COUNTS} <= {name for _, name, _ in utils._PATCHES["onnx"]}
    assert any(getattr(fix, "__name__", "") == exporters.SORT_FIX for fix in utils._FX_NODE_FIXES["onnx"])
    before, vmap = utils._PATCHES["dynamo"], getattr(masking_utils, exporters.VMAP)
    with exporters.own_vision_attention():
        kept = utils._PATCHES["dynamo"]
        assert 0 < len(kept) < len(before) and not any("VisionAttention" in str(patch[0]) for patch in kept)
        assert utils.precompute_export_inputs is not exporters.precompute()
    assert utils.precompute_export_inputs is exporters.precompute()
    assert utils._PATCHES["dynamo"] is before
    with exporters.traced_portably():
        assert getattr(masking_utils, exporters.VMAP) is not vmap
    with exporters.translated_sort(len):
        assert exporter_onnx._ONNX_TRANSLATION_TABLE[torch.ops.aten.sort.stable] is len
    assert exporter_onnx._ONNX_TRANSLATION_TABLE.get(torch.ops.aten.sort.stable) is not len


def private_names(path: Path) -> list[str]:
    """Attributes, imports and strings that are names with an underscore, other than of Python or of self."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [part for name in (*modules, *(each.name for each in node.names)) for part in name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [] if node.value in PARTS else [node.value]
        else:
            continue
        lines = [name for name in names if name.startswith("_") and not name.startswith("__") and name not in OWN]
        found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in lines]
    return found


def test_no_other_file_uses_a_private_name() -> None:
    links = ("hawk_compile/passes", "hawk_compile/kernels")
    files = [path for room in ("hawk_compile", "passes", "kernels") for path in sorted((ROOT / room).rglob("*.py"))]
    others = [path for path in files if not str(path.relative_to(ROOT)).startswith((*links, *HOMES))]
    assert [name for path in others for name in private_names(path)] == []


@pytest.mark.parametrize(
    ("file", "mixer", "shapes", "states"),
    [
        ("qwen3_5", "torch_chunk_gated_delta_rule", [(2, 70, 2, 8)] * 3 + [(2, 70, 2)] * 2, (2, 2, 8, 8)),
        ("glm5_next", "chunk_kimi_delta_attention", [(2, 70, 2, 8)] * 4 + [(2, 70, 2)], (2, 2, 8, 8)),
        ("nemotron_h", "mamba2_chunk_scan", [(2, 70, 2, 8), (2, 70, 2), (2,), *[(2, 70, 1, 4)] * 2], (2, 2, 8, 4)),
    ],
)  # fmt: skip
def test_chunked_mixers(file: str, mixer: str, shapes: list[tuple[int, ...]], states: tuple[int, ...]) -> None:
    """Functions of a modeling file, found under these names, of [B, S, ...]: results are tokens and a state."""
    module = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    function, kind = getattr(module, mixer), models.MIXERS[mixer]
    names = list(inspect.signature(inspect.unwrap(function)).parameters)
    arguments = dict(zip(names, (-torch.rand(shape) for shape in shapes), strict=False))
    sizes = {"chunk_size": 64} if "chunk_size" in names else {}
    tokens, state = function(**arguments, **sizes, **{kind.asks: True})
    assert tokens.shape == shapes[2 if file != "nemotron_h" else 0] and state.shape == states
    assert any(name.startswith("initial_state") for name in names)
    without = function(**arguments, **sizes)
    assert without.shape == tokens.shape if kind.alone else without[0].shape == tokens.shape and without[1] is None


@pytest.mark.parametrize("file", ["jamba", "falcon_mamba", "mamba", "zamba"])
def test_mixers_token_by_token(file: str) -> None:
    """Functions of [B, D, S] without a state to begin with: another takes it, and the same arguments for one token."""
    module = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    mixer = models.MIXERS["mamba_selective_scan"]
    function, one = (inspect.unwrap(getattr(module, name)) for name in ("mamba_selective_scan", mixer.step))
    along = [torch.rand(2, 8, 5)] * 2
    states = [-torch.rand(8, 4), torch.rand(2, 4, 5), torch.rand(2, 4, 5), torch.rand(8)]
    tokens, state = function(*along, *states, **{mixer.asks: True}, **mixer.fixed)
    assert function(*along, *states, **mixer.fixed).equal(tokens) and tokens.shape == (2, 8, 5)
    assert state.shape == (2, 8, 4) and tokens.shape[mixer.tokens] == 5
    taken, whole = (list(inspect.signature(each).parameters) for each in (one, function))
    assert taken[0] == "state" and {mixer.renamed.get(name, name) for name in taken[1:]} <= {*whole}


def test_what_caches_hold_beside_keys_and_values() -> None:
    holders = {DynamicIndexedLayer: "indexer_keys", StaticIndexedLayer: "indexer_keys"}
    sparse = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    holders |= {sparse.MiniMaxM3VLSparseCacheLayer: "idx_keys", sparse.MiniMaxM3VLSparseStaticCacheLayer: "idx_keys"}
    for kind, name in holders.items():
        layer = kind(max_cache_len=9)
        getattr(layer, models.EXTRA_KEYS[name])(torch.ones(1, 1, 3, 4) if name == "idx_keys" else torch.ones(1, 3, 4))
        assert getattr(layer, name).shape[-2] >= 3
    if not lacking("qwen4_exp", *SINCE["qwen4_exp"]):
        assert hasattr(DynamicIndexedLayer(), models.EXTRA_POSITIONS)


def test_a_scan_is_a_loop_along_the_first_dimension() -> None:
    values = torch.arange(6.0).view(3, 2)
    last, sums = dynamo.scan(lambda before, row: (before + row, (before + row).clone()), torch.zeros(2), values)
    assert torch.equal(sums, values.cumsum(0)) and torch.equal(last, values.sum(0))


def test_a_view_without_elements_is_made_by_its_sizes() -> None:
    """A part of heads that is 0 wide; one that is wider is left."""

    class Views(torch.nn.Module):
        def forward(self, values: Any) -> Any:
            rows = values.shape[0]
            return values[:, :, :0].view(rows, 1, 2, 0), values.view(rows, 1, 2, 3)

    program = torch.export.export(Views(), (torch.ones(4, 2, 3),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    module, aten = program.module(check_guards=False), torch.ops.aten
    views = module.graph.find_nodes(op="call_function", target=aten.view.default)
    assert [exporters.make_empty_views(module, node) for node in views] == [True, False]
    module.recompile()
    empty, whole = module(torch.ones(5, 2, 3))
    assert empty.shape == (5, 1, 2, 0) and empty.dtype == torch.float32 and whole.shape == (5, 1, 2, 3)


def test_complex_numbers_get_another_dimension_as_pairs() -> None:
    graph = fx.Graph()
    numbers = graph.placeholder("numbers")
    wider = graph.call_function(torch.ops.aten.unsqueeze.default, (numbers, -2))
    graph.output(wider)
    given = torch.randn(3, 4, dtype=torch.complex64)
    numbers.meta["val"], wider.meta["val"] = given, given.unsqueeze(-2)
    module = fx.GraphModule(torch.nn.Module(), graph)
    assert exporters.unsqueeze_pairs(module, wider)
    module.recompile()
    assert torch.equal(module(given), given.unsqueeze(-2))
    kept = next(node for node in module.graph.nodes if node.target is torch.ops.aten.unsqueeze.default)
    assert not kept.meta["val"].is_complex() and not exporters.unsqueeze_pairs(module, kept)
