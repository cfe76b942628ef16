"""The lower door: prune through `torch.compile` alone, without `hawk_compile.optimize`.

The graph must hold the merge and the decoder together, so the picture is encoded first, and a model whose positions
depend on the picture (mRoPE) is given them. A graph knows neither its checkpoint nor its special tokens: all heads
count the same, and all text behind the picture votes, the chat template's tail included. So it chooses somewhat worse
than `hawk_compile.optimize`, and a wrong answer more often follows.

    python examples/torch_compile_backend.py
"""

from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hawk_compile.tools.demo.scenes import make_scene


@torch.no_grad()
def main() -> None:
    folder = str(resources.files("hawk_compile.tools.demo").joinpath("model"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    options: dict[str, Any] = {"ratio": 0.8, "backend": "eager"}
    compiled = torch.compile(model, backend="hawk", options=options, dynamic=True)
    for index in range(3, 6):
        scene = make_scene("test", index)
        question = scene.questions[1]
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(text=[text], images=[scene.pil()], return_tensors="pt")

        ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
        encoded = model.model.get_image_features(inputs["pixel_values"], grid)
        positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], grid)
        logits = compiled(input_ids=ids, position_ids=positions, mm_encoder_outputs={"image": encoded}).logits
        answer = processor.decode(logits[0, -1].argmax())
        print(f"{question.text}: {answer} (right: {question.answer}); {ids.shape[1]} tokens, {logits.shape[1]} left")


if __name__ == "__main__":
    main()
