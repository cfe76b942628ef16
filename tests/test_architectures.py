"""Every architecture through the same passes, held to the eager model on hand-gathered inputs."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hawk_compile
from tests import eager_reference as reference
from tests import zoo
from tests.marks import slow
from tests.zoo import common, rows

RATIOS = (0.3, 0.6, 0.8, 0.9)
CONFIG_NAMES_VISION_END = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v", "kimi_k25")
NO_ID = -1


@dataclass(frozen=True)
class Case:
    """One prompt at one ratio, with what the eager model gives on the hand-gathered tokens."""

    inputs: dict[str, Any]
    ratio: float
    visual: Tensor
    keep: Tensor
    scores: Tensor
    output: Any
    cache: DynamicCache


def encoded(name, model, size):
    """A one-row prompt with encoded images and explicit positions; no mask, as generate gives none without padding."""
    inputs = rows.encoded(model, zoo.inputs(name, model, rows=[size]))
    wanted = ("input_ids", "position_ids", "token_type_ids", "mm_encoder_outputs")
    return {key: value for key, value in inputs.items() if key in wanted}


def fresh(inputs):
    """The model's forward writes into the dict of features that it is given."""
    return {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}


def head_weights(model):
    weights = torch.arange(1.0, model.config.get_text_config().num_attention_heads + 1)
    return weights / weights.sum()


def eager_case(name, model, size, ratio):
    """Score, select and run by hand, on the model as it is without us."""
    inputs = encoded(name, model, size)
    visual = zoo.visual_mask(name, model, inputs)[0]
    merged = reference.merged_inputs(model, fresh(inputs))["inputs_embeds"]
    with torch.no_grad():
        query, key = reference.first_layer_query_key(model, merged)
    eos = model.generation_config.eos_token_id
    vision_end = common.VISION_END if name in CONFIG_NAMES_VISION_END else NO_ID
    ends = set(eos) if isinstance(eos, list) else {eos}
    votes = reference.voters(inputs["input_ids"][0].tolist(), visual.tolist(), vision_end, ends)
    scores = reference.scores(query[0], key[0], visual, torch.tensor(votes), head_weights(model))
    count = max(1, math.ceil(round(int(visual.sum()) * (1 - ratio), 6)))
    keep = reference.kept_positions(scores, visual, count)
    output, cache = reference.pruned_forward(model, fresh(inputs), keep, visual)
    return Case(inputs, ratio, visual, keep, scores, output, cache)


def check(model, case, tolerance):
    with torch.no_grad():
        output = model(**fresh(case.inputs))
    report = hawk_compile.report(model)
    assert report.keep_indices[0].tolist() == case.keep.tolist()
    torch.testing.assert_close(report.scores[0, case.visual].double(), case.scores, atol=1e-5, rtol=1e-4)
    assert report.kept_visual_tokens.tolist() == [int(case.visual[case.keep].sum())]
    assert difference(output.logits, case.output.logits) <= tolerance
    for layer, eager in zip(output.past_key_values.layers, case.cache.layers, strict=True):
        assert layer.get_seq_length() == len(case.keep)
        assert difference(layer.keys, eager.keys) <= tolerance
        assert difference(layer.values, eager.values) <= tolerance


def difference(left, right):
    assert left.shape == right.shape
    return (left - right).abs().max().item()


def compilations(model):
    return model.__dict__["_hawk_runtime"].compilations


def graphs(model, visual_counts):
    """One, and one more where features of later layers are added to a single token: one row broadcasts, two do not."""
    later_layers = hasattr(model.config.vision_config, "deepstack_visual_indexes")
    return 2 if later_layers and 1 in visual_counts else 1


@pytest.mark.parametrize("name", (*zoo.NAMES, *zoo.LATENT_NAMES))
def test_kept_tokens_logits_and_cache_equal_the_hand_gathered_eager_model(name):
    """Bit for bit, at every ratio, from one compilation."""
    model = zoo.build(name, layers=2)
    cases = [eager_case(name, model, size, ratio) for size in zoo.sizes(name)[1:4] for ratio in RATIOS]
    for case in cases:
        hawk_compile.optimize(model, ratio=case.ratio, backend="eager", head_weights=head_weights(model))
        check(model, case, 0.0)
    assert compilations(model) == 1


@pytest.mark.parametrize(
    ("name", "precision"), [("qwen3_vl", "bfloat16"), ("gemma3", "autocast"), ("qwen3_vl", "inference_mode")]
)
def test_other_precisions_and_modes(name, precision):
    """Bit for bit on the tokens that were kept; at half precision these are not held to the fp64 reference."""
    model = zoo.build(name, layers=2)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    size = zoo.sizes(name)[2]
    mode = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference_mode": torch.inference_mode()}
    with mode.get(precision, torch.no_grad()):
        inputs = zoo.inputs(name, model, rows=[size])
        pixels = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        inputs = rows.encoded(model, pixels)
        hawk_compile.optimize(model, ratio=0.6, backend="eager", head_weights="uniform")
        output = model(**fresh(inputs))
        keep = hawk_compile.report(model).keep_indices[0]
        hawk_compile.restore(model)
        expected, _ = reference.pruned_forward(model, fresh(inputs), keep, zoo.visual_mask(name, model, inputs)[0])
        assert difference(output.logits, expected.logits) == 0
        assert len(keep) < inputs["input_ids"].shape[1]


SLOW = ("qwen2_5_vl", "smolvlm", "gemma3")


@pytest.mark.parametrize(
    "name", ["qwen3_vl", "llava_next", *slow(*SLOW)]
)
def test_the_prefill_is_compiled_once_for_ten_shapes(name):
    """And once more for prompts of embeddings, which have the logits of ids, at the positions that ids would have."""
    model = zoo.build(name, layers=2)
    hawk_compile.optimize(model, ratio=0.6, backend="eager")
    sizes = zoo.sizes(name)[:10]
    prompts = [zoo.inputs(name, model, rows=[size]) for size in sizes]
    counts = [zoo.visual_count(name, size) for size in sizes]
    assert len({(count, each["input_ids"].shape[1]) for count, each in zip(counts, prompts, strict=True)}) == 10
    with torch.no_grad():
        logits = [model(**prompt).logits for prompt in prompts]
        compiled = graphs(model, counts)
        assert compilations(model) == compiled
        for prompt, expected in zip(prompts[1:5], logits[1:5], strict=True):
            embedded = rows.encoded(model, prompt)
            embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
            assert torch.equal(model(**embedded).logits, expected)
    assert compilations(model) == compiled + 1
