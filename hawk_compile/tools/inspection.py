"""What the passes find in a model, without its weights: the real capture and the real passes, on the meta device.

The prefill is captured as `hawk_compile.optimize` captures it, from a prompt of one image (one audio, for a model that
only hears), with the model's parameters
on the meta device: nothing is allocated and nothing is computed, so a configuration file is enough.
"""

import copy
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hawk_compile.capture.diagnosis import user_stack
from hawk_compile.capture.features import EXTRA_ROWS, FEATURES, LAYER_FEATURES
from hawk_compile.capture.modalities import AUDIO, encodes_audio_itself, takes
from hawk_compile.capture.prefill import CapturedPrefill, capture_prefill
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import PRUNING, run_passes
from hawk_compile.errors import CaptureError, InputError, UnsupportedModelError
from hawk_compile.kernels.plan.op import slots
from hawk_compile.passes.graph import ancestors, dependents, in_order, is_call, same, tensor
from hawk_compile.passes.site import Gathered as Gathering
from hawk_compile.passes.site import Located, Selected, read
from hawk_compile.plan.question import SpecialIds, special_ids
from hawk_compile.runtime.api import restore
from hawk_compile.runtime.checks import check_model
from hawk_compile.settings.config import MODALITIES, HawkConfig

META = torch.device("meta")
CAPTURED_LAYERS = 2
"""Decoder layers that are captured. What is scored lies in the first; the others only repeat what crosses the cut."""


@dataclass(frozen=True)
class Gathered:
    """A value that crosses from the full prompt to the pruned one, with its shape in letters."""

    name: str
    shape: tuple[str, ...]
    along: str
    """'tokens' (S becomes S'), 'visual tokens' (V becomes V') or 'length' (the number S becomes S')."""


@dataclass(frozen=True)
class Inspection:
    """What the passes find in a model's prefill of one row, and what pruning saves there.

    Attributes:
        model: the model's class.
        layers: decoder layers of the model; `captured_layers` of them were captured.
        merges: the nodes that scatter visual features into the token embeddings, first to last.
        attention: the attention whose queries and keys are scored, as a module path.
        norm: the norm that the projections read, as a module path; None if they do not read one value.
        query_projection, key_projection: module paths of the linears; None if heads do not come from one linear.
        heads, kv_heads, head_dim, width: of the scoring layer; width is D.
        form: 'folded' or 'projected': how visual tokens are scored; `why` says what decided it.
        gathered: everything that is gathered.
        placeholders: ids that visual features replace.
        vision_end, end_of_turn: the text after the last of the first, up to the last of the second, votes.
        ratio: fraction of visual tokens removed.
        visual_tokens, kept_visual_tokens: V and V' of the prompt that the numbers are for.
        prompt_tokens, kept_tokens: S and S'.
        flops, kept_flops: of the decoder's prefill at S and at S', with one position's logits; a multiply-add is two,
            attention counts S x S. None where they could not be counted.
        scoring_flops: of the score, to be added to `kept_flops`.
    """

    model: str
    layers: int
    captured_layers: int
    merges: tuple[str, ...]
    attention: str
    norm: str | None
    query_projection: str | None
    key_projection: str | None
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    form: str
    why: str
    gathered: tuple[Gathered, ...]
    placeholders: tuple[int, ...]
    vision_end: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    ratio: float
    visual_tokens: int
    kept_visual_tokens: int
    prompt_tokens: int
    kept_tokens: int
    flops: int | None
    kept_flops: int | None
    scoring_flops: int

    @property
    def flop_ratio(self) -> float | None:
        """(pruned prefill + scoring) / unpruned prefill."""
        if not self.flops or self.kept_flops is None:
            return None
        return (self.kept_flops + self.scoring_flops) / self.flops


def inspect_model(
    source: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    *,
    ratio: float = 0.8,
    image_tokens: int = 1024,
    text_tokens: int = 64,
    layers: int = CAPTURED_LAYERS,
) -> Inspection:
    """Capture a model's prefill, run the passes on it and say what they found. No weights are read or allocated.

    Args:
        source: a checkpoint folder or its config.json, a config, or a model, which is left as it is (adapters on a
            model are seen; those beside a folder are not).
        ratio: fraction of visual tokens removed, in [0, 1).
        image_tokens: V, visual tokens of the prompt that tokens and FLOPs are given for; at least 2.
        text_tokens: its other tokens; at least 1.
        layers: how many decoder layers to capture; more take longer.

    Raises:
        ConfigError: a ratio out of range.
        InputError: a path or a number that cannot be used.
        UnsupportedModelError: a model that cannot be pruned.
        CaptureError: a model whose forward cannot be captured.
        GraphError: a model whose graph cannot be pruned.
    """
    config = HawkConfig(ratio=ratio, backend="eager")
    least = {"image_tokens": (image_tokens, 2), "text_tokens": (text_tokens, 1), "layers": (layers, 1)}
    for name, (given, minimum) in least.items():
        if given < minimum:
            raise InputError(f"{name} must be at least {minimum}, got {given}")
    model = on_meta(source)
    check_model(model, MODALITIES)
    modality = next(each for each in MODALITIES if takes(model, each))
    if modality == AUDIO and encodes_audio_itself(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes audio in the middle of its forward, so no prefill can be captured without "
            'audio frames: hawk_compile.optimize(model, modalities=("audio",)) prunes it, and HAWK_DUMP shows its graph'
        )
    total = model.config.get_text_config().num_hidden_layers
    kept = config.kept(image_tokens)
    before, after = text_tokens + image_tokens, text_tokens + kept
    flops, kept_flops = count_flops(model, before), count_flops(model, after)
    captured = keep_layers(model, layers, total)
    graph = pruned_graph(model, config, before, image_tokens, modality)
    facts = described(graph) | identifiers(model, special_ids(model, config))
    return Inspection(
        model=type(model).__name__,
        layers=total,
        captured_layers=captured,
        ratio=ratio,
        visual_tokens=image_tokens,
        kept_visual_tokens=kept,
        prompt_tokens=before,
        kept_tokens=after,
        flops=flops,
        kept_flops=kept_flops,
        scoring_flops=scoring_flops(
            facts["form"], facts["width"], facts["heads"], facts["kv_heads"], facts["head_dim"], before
        ),
        **facts,
    )


def on_meta(source: Any) -> PreTrainedModel:
    """The model on the meta device, in eval mode and not optimised."""
    if isinstance(source, PreTrainedModel):
        held = [*source.parameters(), *source.buffers()]
        # A deep copy takes what its memo holds instead of copying it: the twin shares no tensor and allocates none.
        memo: dict[int, Any] = {id(each): meta_like(each) for each in held}
        return restore(copy.deepcopy(source, memo)).eval()
    generation = None
    if isinstance(source, (str, os.PathLike)):
        generation = generation_config(Path(source))
        source = read_config(Path(source))
    if not isinstance(source, PreTrainedConfig):
        raise InputError(f"give a checkpoint folder, a config.json, a config or a model, got {type(source).__name__}")
    dtype = getattr(source, "dtype", None) or torch.float32
    try:
        with META:
            model = AutoModelForMultimodalLM.from_config(source, attn_implementation="sdpa", dtype=dtype)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UnsupportedModelError(
            f"{type(source).__name__} ({source.model_type}) makes no model of text and images or audio: {reason}"
        ) from error
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def meta_like(held: Tensor) -> Tensor:
    twin = torch.empty_like(held, device=META)
    return nn.Parameter(twin, requires_grad=False) if isinstance(held, nn.Parameter) else twin


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a folder or file on this machine; nothing is downloaded."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no file {file}: give a checkpoint folder or a config.json on this machine")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is no model config: {str(error).strip().splitlines()[0][:200]}") from error


def generation_config(path: Path) -> GenerationConfig | None:
    folder = path if path.is_dir() else path.parent
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def keep_layers(model: PreTrainedModel, wanted: int, total: int) -> int:
    """Cut the decoder's layers down to the first ones; returns how many are left."""
    stack = getattr(model.get_decoder(), "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != total or wanted >= total:
        return total
    del stack[wanted:]
    return wanted


def pruned_graph(
    model: PreTrainedModel, config: HawkConfig, length: int, visual: int, modality: str
) -> fx.GraphModule:
    """One prompt's prefill behind the passes that prune."""
    prefill = captured(model, config, length, visual, modality)
    return run_passes(prefill.gm, prefill.example_inputs, options_of(config), PRUNING)


def captured(
    model: PreTrainedModel, config: HawkConfig, length: int, visual: int, modality: str
) -> CapturedPrefill:
    """One prompt's prefill, its features in the structure that the model expects.

    Raises:
        CaptureError: it cannot be captured in any; of the structures, the one that came furthest is told of.
    """
    refusals: list[CaptureError] = []
    for outputs in encoder_outputs(model, visual):
        inputs = prompt(model, length) | {"mm_encoder_outputs": {modality: outputs}}
        try:
            return capture_prefill(model, inputs, None, plan(model, config, length, visual))
        except CaptureError as error:
            refusals.append(error)
    raise max(refusals, key=depth)


def depth(error: CaptureError) -> int:
    """How deep in the model's calls a capture ended."""
    return len(user_stack(error.__cause__)) if error.__cause__ else 0


def encoder_outputs(model: PreTrainedModel, visual: int) -> list[ModelOutput]:
    """Encoded images, in the two structures that models expect: a list of [V, D], and one [1, V, D]."""
    weight = embedding_weight(model)
    vision = getattr(model.config, "vision_config", None)
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def features() -> Tensor:
        return torch.empty((visual + EXTRA_ROWS, weight.shape[1]), dtype=weight.dtype, device=META)

    kind: type[ModelOutput] = BaseModelOutputWithPooling
    more: dict[str, Any] = {}
    if levels:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        kind = BaseModelOutputWithDeepstackFeatures
        more = {LAYER_FEATURES: [[features()] for _ in range(levels)]}
    structures = ([features()], features().unsqueeze(0))
    return [kind(**{FEATURES: structure}, **more) for structure in structures]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, D]; its dtype is that of the features."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def prompt(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """The other arguments of a prefill of one row without padding."""
    ids = torch.zeros((1, length), dtype=torch.long, device=META)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if hasattr(model.base_model, "compute_3d_position_ids"):
        given["position_ids"] = ids.expand(3, 1, length).clone()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = ids.clone()
    return given


def plan(model: PreTrainedModel, config: HawkConfig, length: int, visual: int) -> tuple[Tensor, ...]:
    """The arguments of `hawk::plan`: [1, S] votes, [1] budget, [H] head weights, S' and V'."""
    kept = config.kept(visual)
    weights = torch.empty(model.config.get_text_config().num_attention_heads, device=META)
    torch._dynamo.mark_static(weights)
    votes = torch.zeros((1, length), dtype=torch.bool, device=META)
    budget = torch.zeros(1, dtype=torch.long, device=META)
    return votes, budget, weights, *slots(length - visual + kept, kept, META)


def described(gm: fx.GraphModule) -> dict[str, Any]:
    """What the passes know of a graph, in words: nodes as module paths, sizes as letters."""
    located, keep = read(gm, Located), read(gm, Selected).keep
    sizes = [(located.length, "S"), (located.rows, "B"), *((count, "V") for count in located.visual)]

    def letter(size: Any) -> str:
        return next((name for known, name in sizes if same(size, known) and not isinstance(size, int)), str(size))

    query, key = projection_of(located, keep, located.query), projection_of(located, keep, located.key)
    return {
        "merges": tuple(merge.name for merge in located.merges),
        "attention": module_path(located.attention) or located.attention.name,
        "norm": None if query is None else module_path(query.args[0]),  # type: ignore[arg-type]
        "query_projection": None if query is None else module_path(query),
        "key_projection": None if key is None else module_path(key),
        "heads": located.heads,
        "kv_heads": located.kv_heads,
        "head_dim": located.head_dim,
        "width": width_of(located),
        "form": located.form,
        "why": why(located, keep),
        "gathered": tuple(
            Gathered(name.strip("_").removeprefix("l_"), tuple(map(letter, shape)), along)
            for name, shape, along in read(gm, Gathering).values
        ),
    }


def projection_of(located: Located, keep: fx.Node, node: fx.Node) -> fx.Node | None:
    """The linear that makes these queries or keys, whatever else stands in between; None if several do."""
    linears = [each for each in behind_the_cut(located, keep, node) if is_call(each, "linear")]
    return linears[0] if len(linears) == 1 else None


def behind_the_cut(located: Located, keep: fx.Node, *nodes: fx.Node) -> set[fx.Node]:
    """What the nodes are computed from at the pruned length; the copies that the score reads stand before the cut."""
    return (ancestors(*nodes) & dependents(located.merged)) - ancestors(keep)


def why(located: Located, keep: fx.Node) -> str:
    if located.form == "folded":
        return "queries and keys are linear in the norm's output, so no key of a visual token is made"
    linears = {projection_of(located, keep, node) for node in (located.query, located.key)}
    if None in linears:
        return "queries and keys do not come from one linear each, so the keys of all tokens are made"
    behind = set().union(*(dependents(linear) for linear in linears if linear is not None))
    between = in_order(located.merged.graph, behind & behind_the_cut(located, keep, located.query, located.key))
    modules = dict.fromkeys(module_path(node) for node in between)
    names = [path for path in modules if path and path != module_path(located.attention)] or list(located.between)
    return f"{', '.join(names)} between projection and position, so the keys of all tokens are made"


def module_path(node: fx.Node) -> str:
    """Where in the model the node was traced, without the path to the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("", None))[0] if stack else ""
    return path.split("__self__", 1)[-1].lstrip(".").replace("['", ".").replace("']", "")


def width_of(located: Located) -> int:
    merged = tensor(located.merged)
    assert merged is not None
    return int(merged.shape[-1])


def identifiers(model: PreTrainedModel, ids: SpecialIds) -> dict[str, Any]:
    named = [getattr(model.config, f"{modality}_token_id", None) for modality in MODALITIES]
    return {
        "placeholders": tuple(dict.fromkeys(each for each in named if each is not None)),
        "vision_end": ids.vision_end,
        "end_of_turn": ids.end_of_turn,
    }


def count_flops(model: PreTrainedModel, length: int) -> int | None:
    """FLOPs of the decoder over `length` embeddings, with one position's logits; None where it cannot run on meta."""
    weight = embedding_weight(model)
    embeds = torch.empty((1, length, weight.shape[1]), dtype=weight.dtype, device=META)
    # A mask over queries and keys is taken as it is; any other would be looked into, and meta tensors hold no values.
    mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=META)
    positions = torch.zeros((1, length), dtype=torch.long, device=META)
    if hasattr(model.base_model, "compute_3d_position_ids"):
        positions = positions.expand(3, 1, length)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return counter.get_total_flops()


def scoring_flops(form: str, width: int, heads: int, kv_heads: int, depth: int, length: int) -> int:
    """FLOPs of the score of one row, as `kernels/score/reference.py` computes it."""
    if form == "folded":
        return 2 * width * heads * depth * 2 + 2 * length * width * heads
    return 2 * length * width * (heads + kv_heads) * depth + 2 * length * heads * depth
