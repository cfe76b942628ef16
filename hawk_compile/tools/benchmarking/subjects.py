"""What is timed against each other: one set of weights under the eager model, the compiled one and the pruned ones."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hawk_compile.capture.dynamo import capture_settings, compile_alone
from hawk_compile.capture.features import fresh, join_features
from hawk_compile.capture.patches import body_overrides
from hawk_compile.capture.prefill import unplanned_forward
from hawk_compile.capture.vision import CompiledVision
from hawk_compile.errors import HawkError
from hawk_compile.runtime.api import optimize, report
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.benchmarking import scoring
from hawk_compile.tools.benchmarking.models import twin
from hawk_compile.tools.benchmarking.prompts import Prompt, encode

NOISE_FACTOR = 3
"""How much more than compiling alone pruning may change the logits: it sums over other tokens in another order."""


class Subjects:
    """The columns of the benchmark, each a function from a prompt's arguments to the model's output."""

    def __init__(self, model: Any, config: HawkConfig):
        self.plain = twin(model)
        self.unpruned = twin(model)
        self.model = model
        self.config = config
        backend = config.backend
        self.layer = scoring.first_layer(self.plain)
        self.unpruned.base_model.__dict__.update(body_overrides(self.unpruned))
        self.graph = compile_alone(unplanned_forward, backend=backend, fullgraph=True)
        self.decode_graph = compile_alone(self.unpruned.forward, backend=backend)
        self.vision = CompiledVision(backend)
        self.hawk_graph = compile_alone(scoring.hawk, backend=backend)

    @property
    def compilations(self) -> int:
        """How often the pruned prefill was compiled."""
        return self.model.__dict__[RUNTIME].compilations

    def optimized(self, ratio: float) -> Any:
        """The pruned model with that fraction of visual tokens removed."""
        return optimize(self.model, replace(self.config, ratio=ratio))

    def compiled(self, given: dict[str, Any]) -> Any:
        """The unpruned prefill of encoded images: captured and compiled as the pruned one is, but for the passes."""
        inputs = {name: value for name, value in given.items() if value is not None}
        inputs |= {"mm_encoder_outputs": join_features(inputs["mm_encoder_outputs"]), "use_cache": True}
        with capture_settings():
            inputs |= {"past_key_values": DynamicCache()}
            return self.graph(self.unpruned.forward, inputs, None, inputs["input_ids"])

    def compiled_vision(self, prompt: Prompt) -> dict[str, Any]:
        return encode(self.vision.twin(self.unpruned), prompt)

    def compiled_whole(self, prompt: Prompt) -> Any:
        return self.compiled(self.compiled_vision(prompt))

    def compiled_step(self, **given: Any) -> Any:
        with capture_settings():
            return self.decode_graph(**given)

    def authors(self, prompt: Prompt, given: dict[str, Any], kept: int) -> Any:
        """The eager model with the authors' form in front of its decoder."""
        chosen = scoring.selection(self.plain, prompt, kept)
        keep_of = functools.partial(scoring.authors_keep, self.layer, chosen)
        with scoring.pruned_by_hand(self.plain, keep_of, prompt):
            return self.plain(**fresh(given))

    def compiled_hawk(self, hidden: Tensor, chosen: scoring.Selection) -> Any:
        with capture_settings():
            return self.hawk_graph(
                self.layer, hidden, chosen.visual, chosen.question_mask, chosen.weights, chosen.budget, chosen.length
            )

    def check(self, prompt: Prompt, given: dict[str, Any], ratios: Sequence[float]) -> None:
        """See that the pruned logits are those of the eager decoder on the tokens that were kept, for each ratio.

        What rounding does in this dtype is measured, not assumed: by how much compiling alone changes the logits.

        Raises:
            HawkError: they are not.
        """
        noise = distance(self.compiled(given).logits, self.plain(**fresh(given)).logits)
        for ratio in ratios:
            off = self.error(prompt, given, ratio)
            if not off <= NOISE_FACTOR * noise + 4 * torch.finfo(self.plain.dtype).eps:
                raise HawkError(
                    f"nothing is timed: with {ratio:g} of {prompt.image.tokens} visual tokens removed the logits are "
                    f"off by {off:.1e} of the largest, those of compiling alone by {noise:.1e}; run the tests here"
                )

    def error(self, prompt: Prompt, given: dict[str, Any], ratio: float) -> float:
        """How far the pruned logits are from the eager decoder's on the kept tokens, over the largest of them."""
        model = self.optimized(ratio)
        logits = model(**fresh(given)).logits
        keep = report(model).keep_indices
        assert keep is not None
        positions = torch.stack(list(keep)).to(logits.device)
        with scoring.pruned_by_hand(self.plain, lambda _: positions, prompt):
            return distance(logits, self.plain(**fresh(given)).logits)


def kept_of(prompt: Prompt, ratio: float) -> int:
    """Visual tokens that a row keeps."""
    return HawkConfig(ratio=ratio).kept(prompt.image.tokens)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())
