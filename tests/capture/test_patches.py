"""The models' own checks of their placeholders, in what is captured and elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.capture.patches import placeholder_mask_of
from tests.passes import graphs

IMAGE = 3


def prompt(features: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    return ids, torch.randn(*ids.shape, 8), torch.randn(features, 8)


class Body(nn.Module):
    """A check by an `if`, over masks as wide as the embeddings, of an argument that the mask does not need."""

    def get_placeholder_mask(
        self, ids: Tensor, embeds: Tensor, image_features: Tensor | None = None, token: int = IMAGE
    ) -> Tensor:
        mask = (ids == token)[..., None].expand_as(embeds)
        if image_features is not None and embeds[mask].numel() != image_features.numel():
            raise ValueError("placeholders and features differ in number")
        return mask


def test_features_that_serve_a_check_are_left_out_of_a_capture() -> None:
    body, method = Body(), placeholder_mask_of(Body)

    def merged(ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        return embeds.masked_scatter(method(body, ids, embeds, features, token=IMAGE), features)

    gm = graphs.captured(merged, *prompt())
    assert "masked_scatter" in [node.target for node in gm.graph.nodes]
    assert not any("assert" in str(node.target) for node in gm.graph.nodes)
    assert torch.equal(method(body, *prompt()), body.get_placeholder_mask(*prompt()))
    with pytest.raises(ValueError, match="differ in number"):
        method(body, *prompt(3))
