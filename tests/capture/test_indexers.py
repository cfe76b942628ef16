"""Indexers that pick keys by data: the operator that stands for them is what they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from hawk_compile.capture.indexers import NUMBER, Remembered, counts_slots, indexers_stood_for, is_opaque
from hawk_compile.capture.shells import name_of_shell, shells, weights_of
from hawk_compile.runtime.handover import keep_positions, scratch_layers
from hawk_compile.runtime.tracked import opened, track
from hawk_compile.tools.survey.tiny import build, read
from tests.tiny import FOLDER

PAST, LENGTH = 5, 9


class User:
    """What asks for the stand-in."""


@pytest.fixture(scope="module")
def indexer() -> nn.Module:
    model = build(read(FOLDER / "qwen4_exp.json"))
    found = [module for module in model.modules() if is_opaque(module)]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def user(indexer: nn.Module) -> Any:
    user = User()
    indexers_stood_for.begin(user, indexer)
    yield user
    indexers_stood_for.end(user)


def arguments(past: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Two rows of which the second begins with two masked tokens."""
    torch.manual_seed(0)
    angles = torch.rand(2, past + LENGTH, 6)
    mask = torch.ones(LENGTH, past + LENGTH).tril(past).bool().expand(2, 1, -1, -1).clone()
    mask[1, :, :, :2] = False
    return torch.randn(2, LENGTH, 32), (angles.cos(), angles.sin()), mask


def run_operator(indexer: nn.Module, past: Tensor | None) -> Any:
    hidden, (cos, sin), mask = arguments(0 if past is None else past.shape[1])
    with torch.no_grad():
        return torch.ops.hawk.choose_keys(
            hidden, cos, sin, mask, past, weights_of(indexer), name_of_shell(indexer, NUMBER)
        )


@pytest.mark.parametrize("past", [0, PAST])
def test_the_operator_is_the_indexers_own_forward(indexer: nn.Module, user: Any, past: int) -> None:
    held = torch.randn(2, past, 8) if past else None
    remembered = Remembered(held)
    with torch.no_grad():
        expected = indexers_stood_for.originals[type(indexer)](indexer, *arguments(past), remembered)
    chosen, added = run_operator(indexer, held)
    assert torch.equal(chosen, expected) and torch.equal(added, remembered.added)
    visible = arguments(past)[2]
    assert 0 < int(chosen.sum()) < int(visible.sum()), "some keys are left out"


def test_shapes_are_known_without_data(indexer: nn.Module, user: Any) -> None:
    hidden, (cos, sin), mask = arguments(0)
    weights = [weight.detach() for weight in weights_of(indexer)]
    chosen, added = run_operator(indexer, None)
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [mode.from_tensor(each) for each in (hidden, cos, sin, mask)]
        fake_weights = [mode.from_tensor(weight) for weight in weights]
        fake = torch.ops.hawk.choose_keys(*fakes, None, fake_weights, name_of_shell(indexer, NUMBER))
    assert [(each.shape, each.dtype) for each in fake] == [(each.shape, each.dtype) for each in (chosen, added)]


def test_a_shell_holds_no_weights_and_the_class_is_put_back(indexer: nn.Module) -> None:
    kind: Any = type(indexer)
    user, before = User(), kind.forward
    indexers_stood_for.begin(user, indexer)
    shell, names = shells[name_of_shell(indexer, NUMBER)]
    assert names and not list(shell.parameters())
    indexers_stood_for.end(user)
    assert kind.forward is before


def test_positions_that_a_layer_remembers_are_cut_to_the_kept_ones() -> None:
    layer = DynamicIndexedLayer()
    layer.indexer_position_ids = torch.arange(8).expand(3, 2, 8).clone()
    cache = DynamicCache()
    cache.layers = [layer]
    keep = torch.tensor([[0, 2, 4], [1, 2, 4]])
    keep_positions(cache, keep, past=3, length=5)
    expected = torch.tensor([[0, 1, 2, 3, 5, 7], [0, 1, 2, 4, 5, 7]]).expand(3, 2, 6)
    assert torch.equal(layer.indexer_position_ids, expected)
    keep_positions(cache, keep, past=3, length=5)
    assert torch.equal(layer.indexer_position_ids, expected), "what the graph has gathered stays as it is"


@pytest.fixture(scope="module")
def blocks() -> Any:
    """An indexer that counts blocks of keys, and takes positions for slots."""
    model = build(read(FOLDER / "minimax_m3_vl.json"))
    found = next(module for module in model.modules() if is_opaque(module))
    user = User()
    indexers_stood_for.begin(user, found)
    yield found
    indexers_stood_for.end(user)


def test_numbers_of_blocks_fill_the_keys_and_say_the_same(blocks: Any) -> None:
    assert counts_slots(blocks)
    torch.manual_seed(0)
    hidden, angles = torch.randn(2, LENGTH, 32), torch.rand(2, LENGTH, 4)
    held = torch.randn(2, 1, PAST, 8)
    slots = torch.arange(PAST, PAST + LENGTH).expand(2, -1)
    weights = [weight.detach() for weight in weights_of(blocks)]
    tables, remembered = (angles.cos(), angles.sin()), Remembered(held)
    with torch.no_grad():
        expected = indexers_stood_for.originals[type(blocks)](blocks, hidden, tables, remembered, slots)
        chosen, added = torch.ops.hawk.choose_keys(hidden, *tables, None, held, weights, name_of_shell(blocks, NUMBER))
    assert chosen.shape[-1] == PAST + LENGTH and torch.equal(added, remembered.added)
    mask = [blocks.build_block_mask(each, None, PAST + LENGTH, torch.float32, "cpu", slots)
            for each in (expected, chosen)]  # fmt: skip
    assert torch.equal(*mask) and int((mask[0] == 0).sum()) > 0


def test_behind_a_pruned_prompt_positions_are_slots(blocks: Any) -> None:
    """The cache holds 4 of 30 tokens: a step at position 30 is slot 4."""
    layer = next(each for each in scratch_layers(build(read(FOLDER / "minimax_m3_vl.json")))
                 if hasattr(each, "idx_keys"))  # fmt: skip
    cache = DynamicCache()
    cache.layers = [layer] * (blocks.layer_idx + 1)
    keys = torch.randn(1, 2, 4, 8)
    layer.update(keys, keys)
    layer.update_index(torch.randn(1, 1, 4, 8))
    track(cache, torch.tensor([[0, 3, 9, 29]]), None, 0, 30, None)
    hidden, tables = torch.randn(1, 1, 32), (torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    with torch.no_grad(), opened(cache):
        layer.update(keys[:, :, :1], keys[:, :, :1])
        before = layer.idx_keys
        found = blocks(hidden, tables, cache, torch.tensor([[30]]))
        own = indexers_stood_for.originals[type(blocks)]
        expected = own(blocks, hidden, tables, Remembered(before), torch.tensor([[4]]))
    assert torch.equal(found, expected)
