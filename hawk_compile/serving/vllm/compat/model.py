"""Of a served model: its decoder, the ranks that share it, and the positions that it takes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.errors import UnsupportedModelError
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import HeadWeights, weights_for


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a served model, as this rank has it."""

    module: nn.Module
    """Takes embeddings, and runs the layers."""
    first_layer: nn.Module
    width: int
    heads: int
    kv_heads: int
    all_heads: int
    device: torch.device
    dtype: torch.dtype


def decoder_of(model: Any) -> Decoder:
    """Raises UnsupportedModelError where there is no list of layers with attention."""
    text = model.get_language_model()
    inner = getattr(text, "model", text)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(text).__name__} has no list of decoder layers, whose first one could be scored: leave hawk out of "
            "hf_overrides"
        )
    config = model.config.get_text_config()
    # What keeps keys knows this rank's heads; of modules around it some name those of all ranks.
    attention: Any = next((each for each in attentions_of(layers[0]) if hasattr(each, "num_kv_heads")), None)
    weight = next(layers[0].parameters())
    if attention is None:
        raise UnsupportedModelError(
            f"the first decoder layer, {type(layers[0]).__name__}, has no softmax attention, by which visual tokens "
            "are scored: leave hawk out of hf_overrides"
        )
    return Decoder(
        inner, layers[0], config.hidden_size, attention.num_heads, attention.num_kv_heads, config.num_attention_heads,
        weight.device, model_dtype(model),
    )  # fmt: skip


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(each.dtype for each in model.parameters() if each.is_floating_point())


Embed = Callable[[Tensor], Tensor]
"""[T] ids -> [T, D]."""


def base_embeddings(model: Any) -> tuple[Embed, Embed]:
    """How ids are embedded by the base weights, whatever adapter is put in the place of the embedding later: by the
    decoder, and by the whole model."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for module in model.get_language_model().modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            model = with_others(model, {module: module})
            break
    return model.get_language_model().embed_input_ids, model.embed_input_ids


MOST_LEVELS = 8
"""How many layers behind the first may get features of their own, which stand behind those of the first."""


def check_merge(embed: Callable[..., Tensor], decoder: Decoder) -> None:
    """Refuse a model whose decoder does not get visual features as they leave the encoder: what is scored would not be
    what it reads.

    Args:
        embed: the model's own `embed_input_ids`, which puts features in the places of their ids.

    Raises:
        UnsupportedModelError: such a model.
    """
    feature = (1 + torch.arange(decoder.width) % 8).unsqueeze(0)  # exact in every dtype
    feature = feature.to(decoder.device, decoder.dtype)
    ids = torch.zeros(1, dtype=torch.int64, device=decoder.device)
    for level in range(1 + MOST_LEVELS):
        deep = feature.new_zeros(1, level * decoder.width)  # zeros: a model keeps them until a step has read them
        try:
            merged = embed(ids, [torch.cat([feature, deep], 1)], is_multimodal=torch.ones(1, dtype=torch.bool))
        except (RuntimeError, ValueError, AssertionError):  # of another width
            continue
        if merged.to(feature.dtype).equal(feature):
            return
        break
    raise UnsupportedModelError(
        "this model does not put visual features as they leave the encoder in the places of their tokens, so that "
        "something else would be scored than what its decoder reads: leave hawk out of hf_overrides"
    )


def attentions_of(layer: nn.Module) -> list[nn.Module]:
    """The modules that keep keys and values (vLLM's AttentionLayerBase), whatever computes them."""
    return [module for module in layer.modules() if hasattr(module, "get_kv_cache_spec")]


def with_others(module: Any, others: Mapping[nn.Module, nn.Module]) -> Any:
    """A twin of a module that shares all of it but some modules in it, in whose places others stand. It is not
    compiled: vLLM would do so when it is called first."""
    if module in others:
        return others[module]
    if others.keys().isdisjoint(module.modules()):
        return module
    twin = copy.copy(module)
    children = {name: child and with_others(child, others) for name, child in module._modules.items()}
    twin.__dict__["_modules"] = children
    if hasattr(twin, "do_not_compile"):
        twin.do_not_compile = True
    return twin


def weights_of_rank(settings: HawkConfig, checkpoint: str, decoder: Decoder) -> HeadWeights:
    """Those of this rank's heads, [H], which are H in a row of all."""
    from vllm.distributed import get_tensor_model_parallel_rank

    weights = weights_for(settings.used_head_weights, decoder.all_heads, checkpoint)
    rank = get_tensor_model_parallel_rank()
    return replace(weights, values=weights.values[rank * decoder.heads : (rank + 1) * decoder.heads])


def all_reduce(scores: Tensor) -> Tensor:
    """The sum over the ranks of a tensor-parallel model."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(scores) if get_tensor_model_parallel_world_size() > 1 else scores


def from_first_rank(chosen: Tensor) -> Tensor:
    """What the first rank chose: sums over ranks may differ in their last bit."""
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    return get_tp_group().broadcast(chosen, src=0) if get_tensor_model_parallel_world_size() > 1 else chosen


def let_positions_reach(model: Any, most: int, room: int) -> None:
    """Let the tables of a decoder's rotary embeddings hold more positions: vLLM makes them as long as prompts may be,
    and what is kept has positions of a longer one. Past the end of a table is whatever memory holds, or an error that
    ends the engine.

    Args:
        most: the longest prompt.
        room: how many positions there may be beyond it.

    Raises:
        UnsupportedModelError: a table that cannot grow, as one whose entries depend on its length.
    """
    rows = most + room
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    for name, module in model.get_language_model().named_modules():
        table = getattr(module, "cos_sin_cache", None)
        if table is None and (not name.rpartition(".")[2].startswith("rotary_emb") or trained >= rows):
            continue
        if table is None or (len(table) < rows and not grown(module, rows)):
            length = trained if table is None else len(table)
            shorter = length * most // rows
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__} for {length} positions, and kept tokens have up to {rows}: "
                f"start the server with max_model_len={shorter} or less, or leave hawk out of hf_overrides"
            )


def grown(module: Any, rows: int) -> bool:
    """Make a rotary embedding's table [positions, d] longer; False, and nothing changed, if it would be another one."""
    table, length = module.cos_sin_cache, module.max_position_embeddings
    module.max_position_embeddings = length * -(-rows // len(table))
    longer = module._compute_cos_sin_cache().to(table)
    if len(longer) < rows or not torch.equal(longer[: len(table)], table):
        module.max_position_embeddings = length
        return False
    module.cos_sin_cache = longer
    if getattr(module, "cos_sin_cache_bf16", None) is not None:
        module.cos_sin_cache_bf16 = longer.to(torch.bfloat16)
    return True


def lone_feature(kwargs: dict[str, Any], index: int, visual: Tensor) -> Any:
    """One item of those that an encoder gets, by itself: what a model's rule for positions reads of it."""
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

    modality = "video" if any("video" in name for name in kwargs) else "image"
    data = {
        name: MultiModalFieldElem(data=value[index].cpu(), field=MultiModalBatchedField())
        for name, value in kwargs.items()
        if name.endswith("grid_thw") or name == "second_per_grid_ts"
    }
    return at_the_start(MultiModalKwargsItem(data), modality, visual)


def at_the_start(data: Any, modality: str, visual: Tensor) -> Any:
    """An item (a MultiModalKwargsItem) of which `visual` [L] says what is visual, as a prompt that begins with it."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    mask = None if bool(visual.all()) else visual
    place = PlaceholderRange(offset=0, length=len(visual), is_embed=mask)
    return MultiModalFeatureSpec(data=data, modality=modality, identifier="", mm_position=place)
