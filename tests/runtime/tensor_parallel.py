"""What each rank of a tensor-parallel model says, as JSON lines: tests/runtime/test_tensor_parallel.py compares them.

    torchrun --nproc_per_node=2 -m tests.runtime.tensor_parallel FOLDER
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import hawk_compile
from hawk_compile.errors import GraphError
from tests import zoo

NAME = "qwen2_5_vl"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"head_weights": (1.0, 2.0, 3.0, 4.0)},
    {"query": "each", "normalization": "softmax"},
)


def answers(model: Any) -> Iterator[dict[str, Any]]:
    """What is kept and said with each of the settings."""
    inputs = zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[2], zoo.sizes(NAME)[4]])
    for settings in SETTINGS:
        hawk_compile.optimize(model, ratio=0.6, backend="eager", **settings)
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        keep = [each.tolist() for each in hawk_compile.report(model).keep_indices]
        yield {"keep": keep, "ids": out.sequences.tolist(), "logits": out.logits[0].tolist()}
    hawk_compile.optimize(model, ratio=0.6, backend="eager", query="content")
    try:
        model(**inputs)
    except GraphError as error:
        yield {"error": str(error)}


def main(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    rank = torch.distributed.get_rank()
    rows = model.base_model.language_model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    for line in answers(model):
        # In one write: the ranks share a pipe.
        sys.stdout.write("\n" + json.dumps({"rank": rank, "rows": rows, **line}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
