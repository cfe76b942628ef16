"""What makes a kept encoding one of another encoder: the next answer is that of a model that keeps nothing and was
changed alike, bit for bit. And what is encoded without being kept, with its reason."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from tests import zoo
from tests.runtime.models import fresh, picture

NAME = "llava"
FIRST, SECOND = picture(NAME, 0), picture(NAME, 3)


def keeping(**settings: Any) -> Any:
    return fresh(NAME, image_cache="64MB", **settings)


def use(model: Any) -> Any:
    return model._hawk_runtime.images.use()


@torch.no_grad()
def features(model: Any, inputs: dict[str, Tensor] = FIRST) -> Tensor:
    """[V, D]: what enters the merge of a call."""
    return torch.cat([*run_encoders(model, dict(inputs))["mm_encoder_outputs"]["image"].pooler_output])


def without() -> Any:
    """The same model, which keeps nothing and is no optimised one."""
    return zoo.build(NAME, layers=2)


def tower(model: Any) -> Any:
    return model.base_model.vision_tower


def weight(model: Any) -> Any:
    """A matrix of the tower's first layer."""
    return next(part for part in tower(model).modules() if isinstance(part, nn.Linear)).weight


def linear(model: Any) -> Any:
    return next(part for part in tower(model).modules() if isinstance(part, nn.Linear))


def added(model: Any) -> None:
    weight(model).add_(0.1)


def added_past_the_counter(model: Any) -> None:
    weight(model).data.add_(0.1)


def one_bit_past_the_counter(model: Any) -> None:
    model.base_model.multi_modal_projector.linear_1.bias.data[3] += 1e-3


def negated_past_the_counter(model: Any) -> None:
    weight(model).data.neg_()


def rows_swapped_past_the_counter(model: Any) -> None:
    weight(model).data.copy_(weight(model).data.roll(1, 0))


def other_data(model: Any) -> None:
    weight(model).data = weight(model).data * 2


def other_parameter(model: Any) -> None:
    linear(model).weight = nn.Parameter(weight(model).detach() * 2)


def loaded(model: Any) -> None:
    tower(model).load_state_dict({name: 1.5 * value if value.is_floating_point() else value
                                  for name, value in tower(model).state_dict().items()})  # fmt: skip


def loaded_by_assignment(model: Any) -> None:
    tower(model).load_state_dict({name: 0.5 * value if value.is_floating_point() else value
                                  for name, value in tower(model).state_dict().items()}, assign=True)  # fmt: skip


def other_module(model: Any) -> None:
    model.base_model.multi_modal_projector.act = nn.Tanh().eval()


def other_forward(model: Any) -> None:
    projector = model.base_model.multi_modal_projector
    before = type(projector).forward
    projector.forward = lambda features: 0.5 * before(projector, features)


def other_setting(model: Any) -> None:
    model.config.vision_feature_layer = -1


def other_number(model: Any) -> None:
    next(part for part in tower(model).modules() if isinstance(part, nn.LayerNorm)).eps = 0.3


def other_attention(model: Any) -> None:
    model.set_attn_implementation({"vision_config": "eager"})


def bias_taken_off(model: Any) -> None:
    linear(model).bias = None


CHANGES: list[Callable[[Any], None]] = [
    added, added_past_the_counter, one_bit_past_the_counter, negated_past_the_counter, rows_swapped_past_the_counter,
    other_data, other_parameter, loaded, loaded_by_assignment, other_module, other_forward, other_setting, other_number,
    other_attention, bias_taken_off,
]  # fmt: skip


def test_an_encoder_that_is_changed() -> None:
    """One model goes through all changes: what any of its states has encoded might be taken for another's."""
    model, other = keeping(), without()
    expected = [features(other)]
    assert features(model).equal(expected[0])
    for change in CHANGES:
        with torch.no_grad():
            change(model), change(other)
        before, expected = use(model), [*expected, features(other)]
        assert features(model).equal(expected[-1]), change.__name__
        assert use(model).misses > before.misses and use(model).hits == before.hits, change.__name__
        assert features(model).equal(expected[-1]) and use(model).hits > before.hits, change.__name__
    assert not use(model).passed_over
    differing = [one for one, other in itertools.pairwise(expected) if not one.equal(other)]
    assert len(differing) >= len(CHANGES) - 1  # attention by another function may round alike


def test_a_change_of_the_decoder_is_none_of_the_encoder() -> None:
    model, other = keeping(), without()
    features(model)
    for each in (model, other):
        each.lm_head.weight.data.mul_(2)
        each.base_model.language_model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert features(model).equal(features(other)) and use(model).hits


def test_an_encoder_that_goes_back_to_what_it_was() -> None:
    model = keeping()
    expected = features(model)
    before = weight(model).detach().clone()
    weight(model).data.mul_(2)
    assert not features(model).equal(expected)
    weight(model).data.copy_(before)
    assert features(model).equal(expected) and use(model).misses == 2 == 2 * use(model).hits


@pytest.mark.parametrize("change", [
    {"pixel_values": FIRST["pixel_values"] + 1e-6}, {"pixel_values": FIRST["pixel_values"].flip(-1)},
    {"pixel_values": FIRST["pixel_values"] + 0j.real}, {"vision_feature_layer": -1},
    {"vision_feature_select_strategy": "full"},
], ids=["brighter", "mirrored", "the same", "layer", "strategy"])  # fmt: skip
def test_other_arguments(change: dict[str, Any]) -> None:
    model, inputs = keeping(), {**FIRST, **change}
    features(model)
    assert features(model, inputs).equal(features(without(), inputs))
    same = "pixel_values" in change and change["pixel_values"].equal(FIRST["pixel_values"])
    assert bool(use(model).hits) == same


def test_another_dtype_and_autocast() -> None:
    model, other = keeping(), without()
    features(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert features(model, FIRST).equal(features(other, FIRST))
    model.to(torch.bfloat16), other.to(torch.bfloat16)
    inputs = FIRST | {"pixel_values": FIRST["pixel_values"].bfloat16()}
    assert features(model, inputs).equal(features(other, inputs))
    assert use(model).hits == 0


def test_what_is_replaced_around_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a class, in the globals of the model's code, and among the attention functions that others register."""
    model, other = keeping(), without()
    features(model)
    kind = type(model.base_model.multi_modal_projector)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, features: 0.5 * before(self, features))
    assert features(model).equal(features(other)) and use(model).hits == 0
    monkeypatch.undo()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def halved(*args: Any, **kwargs: Any) -> Any:
        output, weights = attend(*args, **kwargs)
        return output * 0.5, weights

    for each in (model, other):
        ALL_ATTENTION_FUNCTIONS.register("halved", halved)
        each.set_attn_implementation({"vision_config": "halved"})
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "halved", halved)
    assert features(model, FIRST).equal(features(other, FIRST))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "halved", attend)
    changed = features(model, FIRST)
    assert changed.equal(features(other, FIRST)) and use(model).hits == 0


def test_adapters_on_the_encoder() -> None:
    """Added, switched off and on, scaled, merged and unmerged."""
    models = []
    for settings in ({"image_cache": "64MB"}, {}):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(fresh(NAME), peft.LoraConfig(
            target_modules=r".*vision_tower.*q_proj", init_lora_weights=False, r=4)).eval()  # fmt: skip
        hawk_compile.optimize(adapted, ratio=0.6, backend="eager", **settings)
        models.append(adapted)
    model, other = models
    layers = [[part for part in each.modules() if isinstance(part, peft.tuners.lora.LoraLayer)] for each in models]

    def scale() -> None:
        for part in (*layers[0], *layers[1]):
            part.scaling["default"] *= 3

    steps: list[Callable[[Any], Any] | None] = [
        None, lambda each: each.base_model.disable_adapter_layers(),
        lambda each: each.base_model.enable_adapter_layers(), None, lambda each: each.merge_adapter(),
        lambda each: each.unmerge_adapter(),
    ]  # fmt: skip
    for number, step in enumerate(steps):
        if step is not None:
            step(model), step(other)
        elif number:
            scale()
        assert features(inner(model), FIRST).equal(features(inner(other), FIRST)), number
    assert layers[0]


def inner(adapted: Any) -> Any:
    return adapted.base_model.model


@contextlib.contextmanager
def hooked(model: Any) -> Iterator[None]:
    handle = tower(model).register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_everywhere(model: Any) -> Iterator[None]:
    with FlopCounterMode(display=False):
        yield


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    tower(model).train()
    yield
    tower(model).eval()


@contextlib.contextmanager
def random(model: Any) -> Iterator[None]:
    projector = model.base_model.multi_modal_projector
    before = type(projector).forward
    projector.forward = lambda features: before(projector, features + 0 * torch.rand(1))
    yield
    del projector.forward


@contextlib.contextmanager
def reading_the_decoder(model: Any) -> Iterator[None]:
    projector, embed = model.base_model.multi_modal_projector, model.get_input_embeddings()
    before = type(projector).forward
    projector.forward = lambda features: before(projector, features) + embed.weight[5]
    yield
    del projector.forward


@contextlib.contextmanager
def unreadable(model: Any) -> Iterator[None]:
    class Strange(nn.Parameter):
        pass

    before = linear(model).weight
    linear(model).weight = Strange(before.detach(), requires_grad=False)
    yield
    linear(model).weight = before


@pytest.mark.parametrize(("inside", "reason"), [
    (hooked, "a hook of .*image_cache_stale stands on"), (hooked_everywhere, "a mode or a hook sees each operator"),
    (training, "is in training mode"), (random, "random numbers were drawn"),
    (reading_the_decoder, "reads weights that are not its encoder's"), (unreadable, "holds a Strange"),
])  # fmt: skip
def test_what_is_not_kept(inside: Any, reason: str) -> None:
    """It is encoded each time, and what was kept before is taken again behind it."""
    model, other = keeping(), without()
    expected = features(model)
    hits = use(model).hits
    with inside(model), inside(other):
        plain = features(other)
        for turn in (1, 2):
            assert features(model).equal(plain)
            assert use(model).passed_over >= turn and use(model).hits == hits, inside.__name__
        assert re.search(reason, use(model).reason), use(model).reason
    assert features(model).equal(expected) and use(model).hits > hits


def test_gradients_are_not_kept() -> None:
    model = keeping()
    outputs = run_encoders(model, dict(FIRST))["mm_encoder_outputs"]["image"].pooler_output
    assert all(part.requires_grad for part in outputs)
    assert "gradients are wanted" in use(model).reason


def test_a_change_while_it_is_encoded_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = keeping(), without()
    features(model, SECOND)
    kind, turns = type(model.base_model), []
    method = kind.get_image_features

    @functools.wraps(method)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        if self is model.base_model and not turns:
            turns.append(1)
            weight(model).data.mul_(2)
        return output

    monkeypatch.setattr(kind, "get_image_features", changing)
    features(model)
    assert turns and "was changed while it ran" in use(model).reason
    weight(other).data.mul_(2)
    assert features(model).equal(features(other))


def test_a_helper_that_is_replaced_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that the encoder's code calls by name, through one that is wrapped, and a number that it reads."""
    kind = type(zoo.build(NAME, layers=1).base_model.multi_modal_projector)
    before = kind.forward

    @functools.cache
    def factor() -> float:
        return scale() * NUMBER

    def forward(self: Any, features: Tensor) -> Tensor:
        return factor.__wrapped__() * before(self, features)

    monkeypatch.setattr(kind, "forward", forward)
    model, other = keeping(), without()
    for name, value in ((None, None), ("scale", lambda: 3.0), ("NUMBER", 0.5)):
        if name is not None:
            monkeypatch.setitem(globals(), name, value)
        misses = use(model).misses
        assert features(model).equal(features(other)) and use(model).misses == misses + 1, name
        assert features(model).equal(features(other)) and use(model).misses == misses + 1, name


NUMBER = 2.0


def scale() -> float:
    return 1.0


@pytest.mark.parametrize("name", ["torchao.quantization", "optimum.quanto"])
def test_a_quantised_encoder(name: str) -> None:
    """Known by what its weights are made of; the same weights in the other kind are another encoder."""
    library = pytest.importorskip(name, reason=f"{name} is not installed")
    model, other = keeping(), without()
    expected = features(other)
    assert features(model).equal(expected)
    for each in (model, other):
        if name == "torchao.quantization":
            library.quantize_(tower(each), library.Int8WeightOnlyConfig())
        else:
            library.quantize(tower(each), weights=library.qint8), library.freeze(tower(each))
            each.eval()  # its layers are made in training mode
    assert not features(other).equal(expected)
    for hits in (0, 1):
        assert features(model).equal(features(other)) and use(model).hits == hits
    assert not use(model).passed_over
