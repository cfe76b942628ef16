"""What the host adds to a pruned prefill: a model of many tiny layers, whose operators cost next to nothing.

    OMP_NUM_THREADS=1 python benchmarks/host.py [--layers 28] [--rounds 60]

"decoder" is torch.compile, as anyone would call it, of the decoder and its head for as many tokens as are kept, with
embeddings and positions given and a new cache: no merge, no plan, no score. "hawk" is a call of the optimised model
behind its encoder, with a new cache. Both in turns, medians; the ratio is the median of the turns' ratios.
"""

import statistics
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

import hawk_compile
from hawk_compile.capture.features import fresh
from hawk_compile.tools.benchmarking import prompts
from hawk_compile.tools.benchmarking.images import picture
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.profiles import qwen2_5_vl_scaled
from hawk_compile.tools.benchmarking.timing import Call, in_turns, spread
from hawk_compile.tools.environment import measured_on

CPU = torch.device("cpu")


def decoder_alone(model: Any) -> Any:
    """(embeddings [1, S', D], positions [3, 1, S']) -> the last token's logits, compiled by torch.compile."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def run(embeddings: torch.Tensor, positions: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        output = decoder(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True)
        return head(output.last_hidden_state[:, -1:])  # type: ignore[no-any-return]

    return torch.compile(run, dynamic=True)


@torch.no_grad()
def main(
    layers: Annotated[int, typer.Option(help="decoder layers")] = 28,
    visual: Annotated[int, typer.Option(help="visual tokens")] = 64,
    ratio: Annotated[float, typer.Option(help="fraction of them removed")] = 0.8,
    rounds: Annotated[int, typer.Option(help="turns")] = 60,
    profile: Annotated[bool, typer.Option(help="print where a pruned call spends its time, by cProfile")] = False,
) -> None:
    config = qwen2_5_vl_scaled(layers=layers, width=64, vision_layers=1, vision_width=32)
    plain = load(config, CPU, torch.float32, None, False)[0]
    prompt = prompts.make(plain, picture(config, visual), 16, 1, CPU)
    given = prompts.encode(plain, prompt)
    alone = decoder_alone(plain)
    model = hawk_compile.optimize(load(config, CPU, torch.float32, None, False)[0], ratio=ratio)
    kept = model(**fresh(given)).past_key_values.layers[0].keys.shape[2]
    embeddings, positions = torch.randn(1, kept, 64), torch.arange(kept).expand(3, 1, kept)
    calls = [
        Call("decoder", None, lambda: lambda: alone(embeddings, positions, DynamicCache())),
        Call("hawk", ratio, lambda: lambda: model(**fresh(given), past_key_values=DynamicCache())),
    ]
    in_turns(calls, 5, CPU)
    decoder, hawk = in_turns(calls, rounds, CPU)
    share = spread([mine / floor for mine, floor in zip(hawk, decoder, strict=True)])
    print(measured_on("cpu"))
    print(f"{layers} layers, {prompt.length} -> {kept} tokens, {torch.get_num_threads()} threads, {rounds} turns")
    print(f"decoder {1e3 * statistics.median(decoder):.2f} ms, hawk {1e3 * statistics.median(hawk):.2f} ms, "
          f"hawk / decoder {share.median:.3f} (iqr {share.iqr:.3f})")  # fmt: skip
    if profile:
        profiled(lambda: model(**fresh(given), past_key_values=DynamicCache()), rounds)


def profiled(call: Any, rounds: int) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as watched:
        for _ in range(rounds):
            call()
    pstats.Stats(watched).sort_stats("cumulative").print_stats(60)


if __name__ == "__main__":
    typer.run(main)
