"""What the tiny architectures share: the token ids, the description of a prompt, the layout of a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

PAD, EOS, START, END_OF_TURN = 0, 1, 2, 3
IMAGE, VIDEO = 4, 5
VISION_START, VISION_END, VIDEO_START, VIDEO_END = 6, 7, 8, 9
NEWLINE, ROW_BREAK, AROUND_IMAGE, GLOBAL_IMAGE = 10, 11, 12, 13
TEMPLATE = 16  # the first of the ids that a chat template appends after the end of the turn
TILE_TAG = 24  # the first of TILES * TILES ids <row_i_col_j>
TILES = 4
AUDIO, AUDIO_START, AUDIO_END = 40, 41, 42
FIRST_TEXT = 48  # ordinary text ids are FIRST_TEXT .. VOCAB - 1
VOCAB = 160

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 32, 2, 2
PATCH = 4  # pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One row of a batch: start id, text, images, video, audio, text, end of the turn.

    `images` holds one (height, width) per image in the unit of the architecture (the modules of this package say
    which), `video` one (frames, height, width), `audio` one length per audio. `before`, `between` and `after` count
    text tokens; `between` stands between two of them. The text closes with an end-of-turn id and `tail` template
    tokens, or with nothing where `tail` is None.
    """

    images: tuple[Size, ...] = ()
    video: tuple[int, int, int] | None = None
    audio: tuple[int, ...] = ()
    before: int = 3
    between: int = 1
    after: int = 5
    tail: int | None = 2


class Architecture:
    """The tiny configuration of one architecture, and prompts laid out as its processor lays them out.

    The methods know rows; what differs between architectures is overridden, the rest is here.
    """

    name: str
    end_ids: tuple[int, ...] = (END_OF_TURN,)  # generation_config.eos_token_id, one id or several as in the real one
    image_sizes: tuple[Size, ...]  # sizes to try; the class that sets them says their unit
    video_sizes: tuple[tuple[int, int, int], ...] = ()  # empty: the architecture takes no video
    audio_sizes: tuple[tuple[int, ...], ...] = ()  # lengths of one or several audios; empty: it takes none

    def config(self, layers: int) -> PreTrainedConfig:
        raise NotImplementedError

    def image_ids(self, size: Size, count: int) -> list[int]:
        """The ids that stand for one image in a row of `count` images."""
        raise NotImplementedError

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        raise ValueError(f"{self.name} takes no video: got Row(video={size}); leave it out")

    def audio_ids(self, length: int) -> list[int]:
        if not self.audio_sizes:
            raise ValueError(f"{self.name} takes no audio: got a Row with an audio of {length}; leave it out")
        return [AUDIO_START, *[AUDIO] * length, AUDIO_END]

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        """The visual keyword arguments of a batch that has at least one image, video or audio."""
        raise NotImplementedError

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Further keyword arguments of shape [B, S] made from the padded ids."""
        return {}

    def close(self, tail: int | None) -> list[int]:
        return [] if tail is None else [END_OF_TURN, *range(TEMPLATE, TEMPLATE + tail)]

    def row_ids(self, row: Row, generator: torch.Generator) -> list[int]:
        pictures = [self.image_ids(size, len(row.images)) for size in row.images]
        if row.video is not None:
            pictures.append(self.video_ids(row.video))
        pictures += [self.audio_ids(length) for length in row.audio]
        ids = [START, *text(row.before, generator)]
        for i, picture in enumerate(pictures):
            ids += text(row.between, generator) if i else []
            ids += picture
        return ids + text(row.after, generator) + self.close(row.tail)


def text(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_TEXT, VOCAB, (count,), generator=generator).tolist()


def text_config(layers: int, **overrides: Any) -> dict[str, Any]:
    """The keyword arguments that the text configurations have in common."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END_OF_TURN,
    } | overrides


def tower_config(model_type: str, image_size: int, **overrides: Any) -> dict[str, Any]:
    """A vision transformer of (image_size / PATCH)**2 patches."""
    return {
        "model_type": model_type,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": image_size,
        "patch_size": PATCH,
    } | overrides


drawing = threading.Lock()
"""Construction draws from the generator of the whole process."""


def build(architecture: Architecture, *, seed: int, layers: int) -> PreTrainedModel:
    # Construction draws weights that `randomize` replaces or adds to.
    with drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMultimodalLM.from_config(
            architecture.config(layers), attn_implementation="sdpa", dtype=torch.float32
        )
    randomize(model, seed)
    end_ids = list(architecture.end_ids)
    model.generation_config.eos_token_id = end_ids if len(end_ids) > 1 else end_ids[0]
    model.generation_config.bos_token_id = START
    model.generation_config.pad_token_id = PAD
    return model.eval()


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter so that each one matters.

    Freshly made models have std 0.02, zero biases, unit norms and in Gemma 3 a zero projector: scores of visual tokens
    would be near equal and a wrong norm or bias would not show. The rows of the special ids are small in the output
    layer, so greedy decoding yields text ids and doesn't stop early.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    model.get_input_embeddings().weight.mul_(4)  # [VOCAB, WIDTH], to the magnitude of the visual features
    model.get_output_embeddings().weight[:FIRST_TEXT].mul_(0.05)


def batch(architecture: Architecture, rows: Sequence[Row], *, seed: int, padding_side: str) -> dict[str, Tensor]:
    """input_ids [B, S], attention_mask [B, S], then token types and visual inputs where the architecture has them."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.tensor(architecture.row_ids(row, generator)) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=PAD, padding_side=padding_side
    )
    result = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    result |= architecture.token_types(input_ids)
    if any(row.images or row.video or row.audio for row in rows):
        result |= architecture.pixels(rows, generator)
    return result
