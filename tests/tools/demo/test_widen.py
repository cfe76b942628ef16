"""The demo model with larger heads is the same function.

The model here is the demo's with random weights, and with norms and biases that are not what a new model has.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

import hawk_compile
from examples.demo_checkpoint import make_config, save_checkpoint
from examples.widen_demo_model import widened
from tests.exporting import demo

ROUNDING = 5e-5
"""Of log-probabilities in float32."""
FACTORS = ("norm.weight", "q_proj.weight", "q_proj.bias")
"""The ends of the names of what is multiplied by a square root."""


def new_model() -> Qwen2_5_VLForConditionalGeneration:
    """In bf16. An epsilon as large as what it is added to, so that it counts."""
    config = make_config()
    config.text_config.rms_norm_eps = 0.05
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.bfloat16()


@pytest.fixture(scope="module")
def narrow() -> Any:
    """The model before, computed in float32."""
    model = Qwen2_5_VLForConditionalGeneration(new_model().config).eval()  # tables of its own: bf16 rounds them
    model.load_state_dict(new_model().state_dict())
    return model


@pytest.fixture
def wide() -> Any:
    return widened(new_model()).float()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """One picture, and two of other sizes: left of the first stands padding."""
    return demo.batch([(336, 364)], [(392, 336), (420, 392)])


@torch.no_grad()
def logprobs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[N, words] of all tokens that are not padding."""
    logits = model(**inputs).logits.log_softmax(-1)
    assert logits.std() > 0.5  # not flat
    return logits[inputs["attention_mask"].bool()]


def test_same_logits(narrow: Any, wide: Any, inputs: dict[str, Tensor]) -> None:
    assert wide.config.text_config.hidden_size == 256 and wide.model.language_model.layers[0].self_attn.head_dim == 32
    torch.testing.assert_close(logprobs(wide, inputs), logprobs(narrow, inputs), rtol=0, atol=ROUNDING)


def other_base(model: Any) -> None:
    rope(model, "rope_theta", 1e6)


def other_axes(model: Any) -> None:
    rope(model, "mrope_section", [8, 4, 4])


def rope(model: Any, name: str, value: Any) -> None:
    text = model.model.language_model
    text.config.rope_parameters[name] = value
    text.rotary_emb = type(text.rotary_emb)(text.config)


def same_epsilon(model: Any) -> None:
    for module in model.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05


def norms_as_they_were(model: Any) -> None:
    model.model.language_model.norm.weight.data *= (4 / 3) ** 0.5


def queries_as_they_were(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 0.75**0.5


@pytest.mark.parametrize(
    "spoil", [other_base, other_axes, same_epsilon, norms_as_they_were, queries_as_they_were], ids=lambda f: f.__name__
)
def test_each_compensation_is_needed(
    spoil: Callable[[Any], None], narrow: Any, wide: Any, inputs: dict[str, Tensor]
) -> None:
    spoil(wide)
    assert (logprobs(wide, inputs) - logprobs(narrow, inputs)).abs().max() > 50 * ROUNDING


@pytest.mark.slow
def test_same_tokens_are_kept(narrow: Any, wide: Any, inputs: dict[str, Tensor]) -> None:
    runs: list[list[tuple[Tensor, Any]]] = [[], []]
    for model, run in zip((narrow, wide), runs, strict=True):
        for ratio in (0.6, 0.9):
            with hawk_compile.pruned(model, ratio=ratio, backend="eager"), torch.no_grad():
                last = model(**inputs).logits[:, -1].log_softmax(-1)
                run.append((last, [row.tolist() for row in hawk_compile.report(model).keep_indices]))
    for (last, kept), (other_last, other_kept) in zip(*runs, strict=True):
        assert kept == other_kept
        torch.testing.assert_close(other_last, last, rtol=0, atol=ROUNDING)


def test_precisions_and_what_stays(tmp_path: Path) -> None:
    """As a checkpoint: float32 where a factor needs it, and read in float32 whether one asks for it or not."""
    model = new_model()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    wide = widened(model)
    for name, values in wide.named_parameters():
        in_text = "language_model" in name
        assert values.dtype == (torch.float32 if in_text and name.endswith(FACTORS) else torch.bfloat16), name
    save_checkpoint(wide, tmp_path)
    for asked in ({}, {"dtype": "auto"}, {"dtype": torch.float32}):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **asked)
        assert loaded.dtype == torch.float32 and loaded.lm_head.weight is loaded.get_input_embeddings().weight
        for name, values in loaded.state_dict().items():
            assert torch.equal(values, wide.state_dict()[name].float()), name
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("head", [31, 16])
def test_heads_that_cannot_be(head: int) -> None:
    with pytest.raises(ValueError, match=f"head must be even and at least 24, the model's own, got {head}"):
        widened(new_model(), head)
