"""The model of a served checkpoint: vLLM's own, with what is kept of every item as it leaves the encoder."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.errors import UnsupportedModelError
from hawk_compile.serving.settings import serving_config
from hawk_compile.serving.vllm import positions
from hawk_compile.serving.vllm.compat import model as compat
from hawk_compile.serving.vllm.compat.engine import bound_encoder_calls, check_engine
from hawk_compile.serving.vllm.items import FIELDS, PREFIX, Place, place_of, visual_tokens
from hawk_compile.serving.vllm.scoring import Projections, kept

LOG = logging.getLogger("vllm.hawk")

NO_TOKEN = -1
"""An id of no vocabulary."""


class PrunedModel:
    """Goes in front of a multimodal model class of vLLM's (`pruned_class`), whose methods it extends.

    vLLM's switch for "embeddings carry positions" is its own pruning of videos (EVS): the configuration turns it on
    (`plugin.py`), and the code of that method stays off here.
    """

    supports_multimodal_pruning = True
    supports_mrope = True
    hawk_head_weights: Tensor
    """[H], of this rank's heads. A buffer: an engine that sleeps keeps those, and loads parameters anew."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.is_multimodal_pruning_enabled = False
        self.video_pruning_rate = None
        self.hawk = serving_config(vllm_config.model_config.hf_config.hawk)
        self.places: set[int] = set()
        self.widths: set[int] = set()
        self.is_probed = False
        self.plain = positions.is_plain(vllm_config.model_config.hf_config)
        most = vllm_config.model_config.max_model_len
        compat.let_positions_reach(self, most, positions.room(self.plain, most))
        bound_encoder_calls(vllm_config, visual_tokens)
        self.decoder = decoder = compat.decoder_of(self)
        axes = 1 if self.plain else positions.AXES
        # Taken before adapters are put around the modules of the model: the base weights score.
        self.projections = Projections(decoder.module, decoder.first_layer, axes, decoder.heads, decoder.kv_heads)
        self.embed_words, self.embed_text = compat.base_embeddings(self)
        weights = compat.weights_of_rank(self.hawk, vllm_config.model_config.model, decoder)
        self.register_buffer("hawk_head_weights", weights.values.to(decoder.device), persistent=False)  # type: ignore[attr-defined]
        LOG.info("hawk: head weights: %s", weights.origin)

    def forward(self, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        """A decoder without axes gets one of those that vLLM carries, which are all the same."""
        self.probe()  # an engine runs the decoder before it serves, and may leave the encoder out (skip_mm_profiling)
        return super().forward(input_ids, positions[0] if self.plain else positions, *args, **kwargs)  # type: ignore[misc]

    def probe(self) -> None:
        """Try what scores, once, as soon as there are weights: later is too late to refuse.

        Raises:
            UnsupportedModelError: a decoder that is not scored rightly by what it is given here.
        """
        if self.is_probed:
            return
        decoder = self.decoder
        compat.check_merge(self.embed_text, decoder)
        self.projections.check(torch.zeros(2, decoder.width, device=decoder.device, dtype=decoder.dtype))
        ids = torch.arange(2, device=decoder.device)
        if not self.embed_text(ids).equal(self.embed_words(ids)):
            raise UnsupportedModelError(
                f"{type(self).__name__} changes embeddings of text on their way to its decoder, so that something else "
                "would be scored than what it reads: leave hawk out of hf_overrides"
            )
        self.is_probed = True

    def embed_multimodal(self, **kwargs: Any) -> Any:
        self.probe()
        facts = {name: kwargs.pop(PREFIX + name, None) for name in FIELDS}
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        self.widths.add(features[0].shape[-1])  # of images with what deeper layers add, of audio without
        if facts["keep"] is None:
            return features
        return tuple(
            self.kept_rows(rows, {name: values[index] for name, values in facts.items()}, kwargs, index)
            for index, rows in enumerate(features)
        )

    def kept_rows(self, features: Tensor, facts: dict[str, Tensor], kwargs: dict[str, Any], index: int) -> Tensor:
        """What is kept of one item's features [V, D], with the text between them, and their positions behind."""
        place = place_of(facts["ids"].tolist(), facts["visual"].cpu())
        if place is None or place.count != len(features):
            raise UnsupportedModelError(
                f"an item has {int(facts['visual'].sum())} placeholders and {len(features)} visual features: this "
                "checkpoint cannot be served pruned; leave hawk out of hf_overrides"
            )
        device = features.device
        where = over(place.visual.nonzero().flatten(), device)
        between = over((~place.visual).nonzero().flatten(), device)
        chosen = self.chosen(features, over(facts["question"], device), int(facts["keep"]))
        stays = torch.cat([where[chosen], between]).sort().values  # by index: a mask's length would be waited for
        rows = features[chosen]
        if place.text:
            whole = features.new_zeros(len(place.inner), features.shape[1])
            whole[where] = features
            whole[between, : self.decoder.width] = self.words(over(torch.tensor(place.text), device), features)
            rows = whole[stays]
        axes, extent = self.item_positions(compat.lone_feature(kwargs, index, place.all_visual), place)
        return positions.with_positions(rows, over(axes, device)[:, stays], extent)

    def chosen(self, features: Tensor, question: Tensor, keep: int) -> Tensor:
        """[keep] int64, which of an item's features [V, D] stay; the same on all ranks."""
        words, seen = self.words(question, features), features[:, : self.decoder.width]
        return compat.from_first_rank(
            kept(self.hawk, self.projections, self.hawk_head_weights, words, seen, keep, compat.all_reduce)
        )

    def words(self, ids: Tensor, like: Tensor) -> Tensor:
        """[T, D] embeddings of text, as the decoder gets them."""
        return self.embed_words(ids).to(like.dtype)

    def item_positions(self, feature: Any, place: Place) -> tuple[Tensor, int]:
        """([3, N] positions from an item's first visual token to its last, how many they take), counted from the first,
        by the model's own rule for a prompt that is this item alone, and one text token: some rules count on an end of
        image."""
        found, _ = self.whole_positions([*place.ids, NO_TOKEN], [feature])
        begin = len(place.before)
        first = int(found[:, :begin].max()) + 1 if begin else 0
        inner = found[:, begin : begin + len(place.inner)] - first
        return inner, int(inner.max()) + 1

    def whole_positions(self, tokens: list[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        """([3, S] positions of a whole prompt, what is added to later places), by the model's own rule."""
        if self.plain:
            return torch.arange(len(tokens)).expand(positions.AXES, -1), 0
        return super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        features = sorted(mm_features, key=lambda each: each.mm_position.offset)
        for feature in features:
            self.places |= {input_tokens[start] for start, _ in feature.mm_position.extract_embeds_range()[:1]}
        tokens, moved, columns = positions.expanded(input_tokens, features)
        found, _ = self.whole_positions(tokens, moved)
        self.check_positions(found, moved)
        known, end = found[:, torch.tensor(columns)].contiguous(), int(found.max()) + 1
        known.hawk_end = end  # type: ignore[attr-defined]
        return known, end - len(input_tokens)

    def check_positions(self, whole: Tensor, features: Sequence[Any]) -> None:
        """See that an item has the positions in its prompt that it has by itself, as they will travel with it.

        Args:
            whole: [3, S] positions of a whole prompt.
            features: its items.

        Raises:
            UnsupportedModelError: the model's rule reads what is not known of an item alone.
        """
        for feature in () if self.plain else features:
            if feature.data is None or PREFIX + "keep" not in feature.data:
                continue
            facts = {name: [value.data] for name, value in feature.data.items()}
            place = place_of(facts[PREFIX + "ids"][0].tolist(), facts[PREFIX + "visual"][0])
            assert place is not None
            alone, _ = self.item_positions(compat.lone_feature(facts, 0, place.all_visual), place)
            begin = feature.mm_position.offset + len(place.before)
            first = int(whole[0, begin - 1]) + 1 if begin else 0
            if not torch.equal(whole[:, begin : begin + len(place.inner)] - first, alone):
                raise UnsupportedModelError(
                    f"{type(self).__name__} gives an image or video other positions in a prompt than by itself, and "
                    "those travel with what is kept of it: it cannot be served pruned; leave hawk out of hf_overrides"
                )

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """As `positions.restored`. One of vLLM's two runners asks in every step, with the very tensor that
        `get_mrope_input_positions` made; the other one where there are embeddings, with a copy."""
        end = getattr(mrope_positions, "hawk_end", None)
        if end is not None and not len(multimodal_embeddings):
            return multimodal_embeddings, mrope_positions, end - len(input_ids)
        ids = torch.as_tensor(input_ids, dtype=torch.int64).cpu()
        return positions.restored(
            multimodal_embeddings, ids, mrope_positions, num_computed_tokens, self.places, self.widths
        )

    def get_encoder_cudagraph_config(self) -> Any:
        """A captured encoder passes `embed_multimodal` by."""
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]


def rule_of_positions(served: type, config: Any, plain: bool) -> Any:
    """A model of such a class with nothing in it: the positions of an item (`item_positions`) can be asked for where
    there are no weights, as in front of the engine."""
    model: Any = object.__new__(served)
    nn.Module.__init__(model)
    model.config, model.plain = config, plain
    return model


def over(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device, without waiting for what that device does."""
    return tensor.to(device, non_blocking=True)


def pruned_class(base: type) -> type:
    """A multimodal model class of vLLM's as one that prunes."""
    return type(f"Pruned{base.__name__}", (PrunedModel, base), {"__module__": __name__})
