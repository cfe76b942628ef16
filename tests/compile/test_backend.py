"""The lower door: `torch.compile(model, backend="hawk", options=...)`."""

import copy
import functools
import pickle
import re
import subprocess
import sys
import traceback
import warnings

import pytest
import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig

import hawk_compile
from hawk_compile.compile.backend import compile_graph, hawk, inner_compiler
from hawk_compile.compile.pipeline import PassOptions
from hawk_compile.errors import (
    AttentionNotFoundError,
    ConfigError,
    GraphError,
    MergeNotFoundError,
    UnsupportedCallError,
)
from tests import zoo
from tests.passes import graphs
from tests.zoo import rows

OPTIONS = {"ratio": 0.6, "backend": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """What Dynamo has learnt of a class's forward in other tests (limits, sizes that changed) must not decide here."""
    torch._dynamo.reset()


@functools.cache
def optimized(name):
    """As `optimize` makes a model where, as in the graph alone, no id says which text behind the image votes."""
    ids = {"vision_end_token_id": -1, "end_of_turn_token_id": ()}
    return hawk_compile.optimize(zoo.build(name, layers=1), **OPTIONS, head_weights="uniform", **ids)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def behind_the_door(model, **settings):
    """The logits of a compiled model, as a function of its inputs."""
    options = {**OPTIONS, **settings.pop("options", {})}
    compiled = torch.compile(model, backend="hawk", options=options, isolate_recompiles=True, **settings)
    # A test process compiles more models than Dynamo allows one, and beyond its limit it would run them as they are.
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}

    def logits(inputs):
        with torch.no_grad(), torch._dynamo.config.patch(**limits):
            return compiled(**inputs).logits

    return logits


def through_the_door(model, inputs, **settings):
    return behind_the_door(model, **settings)(inputs)


def test_the_backend_is_known_without_importing_the_package():
    code = (
        "import sys, torch; assert 'hawk' in torch._dynamo.list_backends(exclude_tags=()); "
        "assert 'hawk_compile' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_a_model_given_pixels_and_no_positions():
    """The graph counts positions itself; its sizes are numbers at first, and symbols once they have changed."""
    model = optimized("llava")
    pruned = behind_the_door(zoo.build("llava", layers=1), dynamic=None)
    for size in zoo.sizes("llava")[:2]:
        inputs = zoo.inputs("llava", model, rows=[size])
        expected = logits_of(model, inputs)
        assert torch.equal(pruned(inputs), expected)
        assert expected.shape[1] < inputs["input_ids"].shape[1]


def test_a_length_that_is_a_number_is_told_with_the_remedy():
    """Branches on it leave nothing in the graph."""
    inputs = zoo.inputs("llava", zoo.build("llava", layers=1), rows=[zoo.sizes("llava")[0]])
    for dynamic in (None, False):
        with pytest.warns(UserWarning, match=r"without dynamic=True.*: give torch.compile dynamic=True"):
            behind_the_door(zoo.build("llava", layers=1), dynamic=dynamic)(inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a pruned prompt was captured")
        behind_the_door(zoo.build("llava", layers=1), dynamic=True)(inputs)


@pytest.mark.slow
def test_a_model_given_encoded_images_and_positions():
    name = "qwen2_5_vl"
    model = zoo.build(name, layers=1)
    inputs = rows.encoded(model, zoo.inputs(name, model, rows=[zoo.sizes(name)[2]]))
    copied = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
    expected = logits_of(optimized(name), copied)
    torch.testing.assert_close(through_the_door(model, inputs, dynamic=True), expected, atol=1e-5, rtol=1e-5)


def encoded(model, *given):
    """A prompt of a "llava" with its images encoded, which leaves no encoder to be traced."""
    return rows.encoded(model, zoo.inputs("llava", model, rows=given))


@pytest.mark.slow
def test_a_batch_with_equal_visual_counts():
    """With 9 tokens behind the image S = V = 32, which Dynamo gives one symbol."""
    model = zoo.build("llava", layers=1)
    inputs = encoded(model, zoo.Row(images=((1, 1),)), zoo.Row(images=((1, 1),), after=9))
    expected = logits_of(optimized("llava"), {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})
    result = through_the_door(model, inputs, dynamic=True)
    torch.testing.assert_close(result[:, -expected.shape[1] :][1], expected[1], atol=1e-5, rtol=1e-5)


def test_generate_of_a_model_that_is_compiled_in_place_is_refused_with_the_remedy():
    """At its first graph, or at that of its steps where a call has compiled the prefill before."""
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    model.compile(backend="hawk", options=OPTIONS, dynamic=True)
    refused = pytest.raises(UnsupportedCallError, match=r"\(model\.compile, or .* call hawk_compile\.optimize")
    with refused:
        model.generate(**inputs, max_new_tokens=3)
    with torch.no_grad():
        model(**inputs)
    with refused:
        model.generate(**inputs, max_new_tokens=3)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@torch.no_grad()
def test_nothing_goes_on_behind_a_prompt_that_the_graph_alone_has_pruned(attention):
    """Its cache says how many tokens are left, by which the model as it is, a compiled one and generate would count
    positions."""
    model = zoo.build("llava", layers=2)
    model.set_attn_implementation(attention)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    pruned = torch.compile(model, backend="hawk", options=OPTIONS, dynamic=True)
    cache = pruned(**inputs).past_key_values
    assert cache.get_seq_length() < inputs["input_ids"].shape[1]
    refused = pytest.raises(UnsupportedCallError, match=r"holds a prompt that .* has pruned, .* hawk_compile\.optimize")
    copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache
    for step, each in zip((model, pruned, torch.compile(model, backend="eager")), copies, strict=True):
        with refused:
            step(input_ids=torch.tensor([[5]]), past_key_values=each)


@pytest.mark.slow
def test_generate_within_a_compiled_function_is_refused_behind_the_prompt():
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    compiled = torch.compile(lambda: model.generate(**inputs, max_new_tokens=3), backend="hawk", options=OPTIONS)
    with pytest.raises(UnsupportedCallError, match=r"holds a prompt that .* has pruned, .* hawk_compile\.optimize"):
        compiled()


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_held_back_where_nothing_was_removed():
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    step = torch.tensor([[5]])
    whole = torch.compile(model, backend="hawk", options={**OPTIONS, "ratio": 0.0}, dynamic=True)
    found = whole(input_ids=step, past_key_values=whole(**inputs).past_key_values).logits
    expected = model(input_ids=step, past_key_values=model(**inputs).past_key_values).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["hawk", hawk])
def test_generate_of_what_was_compiled_is_refused_with_the_remedy(backend):
    """torch hands it on to the model inside, which would run unpruned. Other backends' modules go on as ever."""
    model = zoo.build("llava", layers=1)
    compiled = torch.compile(model, backend=backend, options=OPTIONS)
    with pytest.raises(UnsupportedCallError, match=r"neither compiled nor pruned: call hawk_compile\.optimize"):
        compiled.generate(**zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))]))
    other = torch.compile(model, backend="eager")
    assert other.generate == model.generate
    other.generate = len
    assert model.generate is len
    del other.generate
    assert other.generate == model.generate and not hasattr(torch.compile(nn.Linear(2, 2), backend="hawk"), "chat")


@pytest.mark.parametrize("backend", ["hawk", hawk])
@pytest.mark.parametrize("given", ["argument", "settings", "model"])
@pytest.mark.parametrize("optimised", [False, True])
def test_a_compile_config_of_generate_is_refused_with_the_remedy(backend, given, optimised):
    """On a CPU generate would pass over it, and answer unpruned; an optimised model by settings that are not these.
    Others' backends are passed over as ever. Nothing has run."""
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    if optimised:
        hawk_compile.optimize(model, **OPTIONS)
    asked = CompileConfig(backend=backend, options=OPTIONS)
    ways = {"argument": {"compile_config": asked}, "settings": {"generation_config": GenerationConfig()}, "model": {}}
    ways["settings"]["generation_config"].compile_config = asked
    model.generation_config.compile_config = asked if given == "model" else None
    model.base_model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    refused = r"compile_config=.* call hawk_compile\.optimize\(model, ratio=\.\.\.\), .*generate without it"
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        with pytest.raises(UnsupportedCallError, match=refused):
            model.generate(**inputs, max_new_tokens=2, **ways[given], **more)


def test_a_compile_config_of_another_backend_is_let_be():
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.Row(images=((1, 1),))])
    plain = model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, compile_config=CompileConfig(backend="eager")), plain)


def test_rows_with_unequal_visual_counts_are_refused():
    model = zoo.build("llava", layers=1)
    inputs = encoded(model, zoo.Row(images=((1, 1),)), zoo.Row(images=((1, 1), (1, 1), (1, 1))))
    with pytest.raises(RuntimeError, match="different numbers of visual tokens"):
        through_the_door(model, inputs, dynamic=True)


def test_a_graph_without_images_is_compiled_as_it_is():
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    compiled = torch.compile(linear, backend="hawk", options=OPTIONS)
    assert torch.equal(compiled(x), linear(x))


def test_a_planned_graph_that_merges_in_another_way_is_refused():
    """Not compiled as it is: what was asked to be pruned must be."""
    inputs = graphs.prompt()
    graph = graphs.captured(graphs.planned(graphs.Decoder(merges=0)), inputs, graphs.plan_of(inputs, 2))
    with pytest.raises(MergeNotFoundError, match="a model that merges in another way cannot be pruned"):
        compile_graph(graph, [], hawk_compile.HawkConfig(backend="eager"), PassOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio is the fraction"),
        ({"rate": 0.5}, "unknown setting rate"),
        ({"backend": "gcc"}, "backend must be one of"),
        ({"modalities": ("image",)}, "modalities.* needs the ids of placeholders"),
        ({"question": "own"}, "question.* needs the prompt's ids"),
        ({"end_of_turn_token_id": 3}, "end_of_turn_token_id.* needs the prompt's ids"),
        ({"min_per_image": 4}, "min_per_image.* needs the prompt"),
        ({"compile_decode": True}, "compile_decode.* needs the model's other graphs"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    """Whatever the graph: they are read before it is. The error is the setting's, not one of Dynamo's around it."""
    with pytest.raises(ConfigError, match=message) as caught:
        torch.compile(nn.Linear(4, 4), backend="hawk", options={**OPTIONS, **options})(torch.randn(3, 4))
    shown = "".join(traceback.format_exception(caught.value)).splitlines()
    assert shown[-1].startswith("hawk_compile.errors.ConfigError: ") and len(shown) < 60
    travelled = pickle.loads(pickle.dumps(caught.value))
    assert type(travelled) is ConfigError and re.search(message, str(travelled))


def test_a_mode_is_refused():
    """torch hands it on to a backend that is given by name."""
    with pytest.raises(ConfigError, match="takes its settings in options alone, got mode='reduce-overhead': leave"):
        torch.compile(nn.Linear(4, 4), backend="hawk", mode="reduce-overhead")(torch.randn(3, 4))


def test_head_weights_that_do_not_fit_the_model_are_refused():
    model = zoo.build("llava", layers=1)
    inputs = encoded(model, zoo.Row(images=((1, 1),)))
    with pytest.raises(GraphError, match="query heads"):
        through_the_door(model, inputs, dynamic=True, options={"head_weights": [1.0, 2.0, 3.0]})


@pytest.mark.slow
def test_a_break_between_merge_and_decoder_is_refused_with_the_remedy():
    """Without position_ids this architecture reads image sizes back while it counts positions."""
    model = zoo.build("qwen2_5_vl", layers=1)
    inputs = zoo.inputs("qwen2_5_vl", model, rows=[zoo.sizes("qwen2_5_vl")[2]])
    with pytest.raises(AttentionNotFoundError, match="mm_encoder_outputs"):
        through_the_door(model, inputs, dynamic=True)


def test_a_graph_that_is_compiled_has_its_code(monkeypatch):
    """It would be written by the first run, by two at once where two threads come first."""
    kept = []

    def keep(gm, example_inputs):
        kept.append(inner_compiler("eager")(gm, example_inputs))
        return lambda *args: args  # the graph itself has not run

    torch.compile(lambda x: x.sin(), backend=keep, dynamic=False)(torch.ones(3))
    monkeypatch.delattr(torch.fx.Graph, "python_code")
    assert torch.equal(kept[0](torch.ones(3))[0], torch.ones(3).sin())
