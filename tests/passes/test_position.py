"""What says where tokens stand, and what only says which are real ones."""

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from hawk_compile.passes.position import marks_padding


class Forms(nn.Module):
    """The mask cut to the length of another input, as short convolutions have it, and what is no such mask."""

    def forward(self, attention_mask: Tensor, question_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cut = attention_mask[:, -question_mask.shape[1] :].unsqueeze(2)
        places = torch.arange(attention_mask.shape[1])
        return cut, attention_mask * places, attention_mask * question_mask


def test_a_mask_that_is_cut_marks_padding_still() -> None:
    """The length that it is cut to is a number, whatever it is the length of."""
    masks, length = (torch.ones(2, 5).long(), torch.ones(2, 5).long()), Dim("length", min=2)
    program = export(Forms(), masks, dynamic_shapes=({1: length}, {1: length}))
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    (results,) = program.graph.output_node().args
    found = [marks_padding(node, inputs[0].meta["val"].shape[1]) for node in results]
    assert found == [True, False, False]
