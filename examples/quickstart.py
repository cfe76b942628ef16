"""Prune visual tokens of a vision-language model, here the small one that comes with the package.

    python examples/quickstart.py [CHECKPOINT_FOLDER PICTURE QUESTION]
"""

import sys
from importlib import resources
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import hawk_compile
from hawk_compile.tools.demo.scenes import make_scene


def main() -> None:
    if len(sys.argv) == 4:
        folder, picture, question = sys.argv[1], Image.open(sys.argv[2]).convert("RGB"), sys.argv[3]
    else:
        scene = make_scene("test", 0)
        folder = str(resources.files("hawk_compile.tools.demo").joinpath("model"))
        picture, question = scene.pil(), scene.questions[0].text
        print(f"The right answer to {question!r} is {scene.questions[0].answer!r}.")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")

    model = hawk_compile.optimize(model, ratio=0.8)
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print("Answer:", processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    report = hawk_compile.report(model)
    print(f"{report.reason}: the decoder ran on {report.kept_tokens} of {report.prompt_tokens} tokens")
    print(f"Head weights: {report.head_weights}")


if __name__ == "__main__":
    main()
