"""Is the second question of a chat answered as well as alone, where both look for other objects in one picture?

    python benchmarks/conversation.py --scenes 120

Two questions about each held-out scene of the demo. The first is answered; then the chat with its answer and the second
question is prefilled at once, and the second question is asked alone, with and without pruning. The same question must
keep the same visual tokens both times: what the model makes of them in a chat is its own.
"""

from typing import Annotated, Any

import typer

import hawk_compile
from hawk_compile.tools.demo.run import load
from hawk_compile.tools.demo.scenes import Scene, pick_questions


def answer(model: Any, processor: Any, scene: Scene, *said: str) -> tuple[str, set[int]]:
    """The answer to the last of what was said, user and assistant in turns, and which visual tokens were kept.

    The picture stands in front.
    """
    messages = [
        {"role": "assistant" if place % 2 else "user", "content": [{"type": "text", "text": text}]}
        for place, text in enumerate(said)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[scene.pil()], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    placeholders = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    kept = set(placeholders) & set(hawk_compile.report(model).keep_indices[0].tolist())
    said_now = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said_now, {place - placeholders[0] for place in kept}


def main(
    scenes: Annotated[int, typer.Option(help="held-out scenes, two questions each")] = 120,
    ratio: Annotated[float, typer.Option(help="fraction of the visual tokens removed")] = 0.8,
    backend: Annotated[str, typer.Option(help="what compiles the prefill")] = "eager",
) -> None:
    """Print the share of second questions that are answered rightly, in the chat and alone."""
    model, processor = load()
    pairs = pick_questions("test", 2 * scenes, per_scene=2)
    for removed in (0.0, ratio):
        hawk_compile.optimize(model, ratio=removed, backend=backend)
        in_chat = alone = first_right = alike = 0
        for (scene, first), (_, second) in zip(pairs[::2], pairs[1::2], strict=True):
            first_answer, _ = answer(model, processor, scene, first.text)
            first_right += first_answer == first.answer
            later, kept = answer(model, processor, scene, first.text, first_answer, second.text)
            now, kept_alone = answer(model, processor, scene, second.text)
            in_chat += later == second.answer
            alone += now == second.answer
            alike += kept == kept_alone
        print(
            f"{removed:.0%} removed, {scenes} scenes: first question {first_right / scenes:.3f}, second question in "
            f"the chat {in_chat / scenes:.3f}, alone {alone / scenes:.3f}; the same tokens kept in {alike} of {scenes}"
        )


if __name__ == "__main__":
    typer.run(main)
