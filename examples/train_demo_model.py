"""Train the demo model from scratch and write it as a checkpoint folder.

    python examples/train_demo_model.py --out hawk_compile/tools/demo/model

Three stages, in the order in which large vision-language models come about:
0. language: the text model learns to answer from scenes told in words. Each visual token is the sum of the word
   embeddings of its object's caption ("red digit 7") plus noise; first scenes with few objects, then full ones. No
   picture is drawn.
1. alignment: the vision tower learns to give each visual token of an object that sum of words, and other tokens none.
   Nothing else moves.
2. questions: everything learns to answer about pictures, with stage 1's loss kept on.
The learning sees no pruning and no HAWK score. What is written is the rounded model (bf16) with larger heads, the same
function (`widen_demo_model.py`).

One thing is done to have the question's words look at the picture, as they do in the lower layers of large models
(arXiv 2411.18620): in three steps of four the tokens after the question may not see the picture, so what the answer
needs must come by way of the question's words.

Every batch is a function of (seed, step), so a run that was stopped anywhere goes on with `--resume` as if it had not
been.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from demo_checkpoint import VOCABULARY, make_config, save_checkpoint
from demo_losses import GROUPS, QUESTIONS, alignment_loss, answer_loss, check_against_model, see, told, word_embeddings
from demo_training_state import load_state, save_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2_5_VLForConditionalGeneration
from widen_demo_model import widened

from hawk_compile.tools.demo.scenes import SIZES, TOKEN, all_questions, lay_out, make_scene, token_cover


@dataclass(frozen=True)
class Family:
    """What differs between the models that are trained this way.

    Attributes:
        make: the untrained model, of options.
        see: the vision tower's features [B, V, D] of images [B, H, W, 3].
        answer_loss: the loss and the share of right answers, of features and a batch.
        check: raises where `see` or `answer_loss` are not what the model itself computes.
    """

    make: Callable[[argparse.Namespace], Any]
    see: Callable[[Any, Tensor], Tensor]
    answer_loss: Callable[[Any, Tensor, dict[str, Tensor], bool], tuple[Tensor, Tensor]]
    check: Callable[[Any, dict[str, Tensor]], None]


def make_demo(options: argparse.Namespace) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(make_config(options.layers))


DEMO = Family(make_demo, see, answer_loss, check_against_model)


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps, with a warm-up and a half cosine of their own from the learning rate `peak`."""

    name: str
    steps: int
    peak: float


class Batches(Dataset):
    """Batch `step` of a run: pictures of one size, with `QUESTIONS` questions each and a caption for each visual
    token."""

    def __init__(self, seed: int, batch: int, stages: tuple[Stage, ...]):
        self.seed, self.batch, self.stages = seed, batch, stages

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """images uint8 [B, H, W, 3], empty ones in stage "language"; captions int64 [B, V, 3], 0 for none; token ids:
        questions [B, Q, 2], answers [B, Q]."""
        rng = np.random.default_rng([self.seed, step])
        height, width = size = SIZES[step % len(SIZES)]
        language = step < self.stages[0].steps
        few = step < self.stages[0].steps // 2
        images, captions, questions, answers = [], [], [], []
        for _ in range(self.batch):
            index = int(rng.integers(2**62))
            objects = lay_out("train", index, size, few)[1]
            things = [thing for thing in objects if thing.kind != "scribble"]
            # A token belongs to the object that covers most of it, if that is a quarter of it.
            cover = np.stack(
                [np.full(height * width // TOKEN**2, 0.25)] + [token_cover(thing.box, size) for thing in things]
            )
            words = [[0, 0, 0]] + [
                [
                    1 + group.index(word)
                    for group, word in zip(GROUPS, (thing.kind, thing.color, thing.name), strict=True)
                ]
                for thing in things
            ]
            captions.append(np.array(words)[cover.argmax(0)])
            every = all_questions(objects)
            asked = [every[i] for i in rng.permutation(len(every))[:QUESTIONS]]
            questions.append([[VOCABULARY[word] for word in question.text.split()] for question in asked])
            answers.append([VOCABULARY[question.answer] for question in asked])
            images.append(
                np.empty((height, width, 0), np.uint8) if language else make_scene("train", index, size).image
            )
        return {
            "images": torch.from_numpy(np.stack(images)),
            "captions": torch.from_numpy(np.stack(captions)),
            "questions": torch.tensor(questions),
            "answers": torch.tensor(answers),
        }


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up over 50 steps, then a half cosine to 3 % of the peak; `step` counts from the stage's start."""
    return stage.peak * min(1.0, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))


def step_loss(
    model: Any,
    family: Family,
    batch: dict[str, Tensor],
    stage: str,
    options: argparse.Namespace,
    step: int,
) -> tuple[Tensor, str]:
    """The loss of one step, and what to show of it."""
    embeddings = word_embeddings(model).weight
    by_words = np.random.default_rng([options.seed, step, 1]).random() < options.by_words
    if stage == "language":
        torch.manual_seed(options.seed * 1_000_003 + step)
        loss, right = family.answer_loss(model, told(batch["captions"], embeddings, noise=0.3), batch, by_words)
        return loss, f"{right.item():.0%} right"
    features = family.see(model.model.visual, batch["images"])
    align = alignment_loss(features, batch["captions"], embeddings)
    if stage == "alignment":
        return align, f"loss {align.item():.3f}"
    loss, right = family.answer_loss(model, features, batch, by_words)
    return loss + options.align_weight * align, f"alignment loss {align.item():.3f}, {right.item():.0%} right"


def train(options: argparse.Namespace, family: Family = DEMO) -> tuple[Any, dict[str, Any]]:
    """All stages; returns the model and a record of the run."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = family.make(options)
    nn.init.normal_(word_embeddings(model).weight, std=0.2)
    model.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    stages = (
        Stage("language", options.language_steps, 1e-3),
        Stage("alignment", options.align_steps, 1.5e-3),
        Stage("questions", options.steps, options.lr),
    )
    folder = Path(options.checkpoint or f"{options.out}.training")
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if options.resume:
        state = load_state(folder, model, optimizer)
    first, data = state["step"], Batches(options.seed, options.batch, stages)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(first, len(data)),
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=options.device != "cpu",
    )
    owners = [stage for stage in stages for _ in range(stage.steps)]
    starts = {stage: sum(other.steps for other in stages[:i]) for i, stage in enumerate(stages)}
    started = time.time() - state["seconds"]
    last_shown = (first, time.time())
    for step, batch in enumerate(loader, first):
        batch = {key: value.to(options.device, non_blocking=True) for key, value in batch.items()}
        stage = owners[step]
        if step == max(first, starts[stages[1]]):
            family.check(model, batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - starts[stage], stage)
        loss, shown = step_loss(model, family, batch, stage.name, options, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, left = step + 1, starts[stage] + stage.steps - step - 1
        state = {"step": done, "seconds": time.time() - started}
        if done % options.show_every == 0 or not left:
            rate = (done - last_shown[0]) / (time.time() - last_shown[1])
            last_shown = (done, time.time())
            print(
                f"step {done}/{len(data)}, {stage.name}: {shown}; {rate:.2f} steps/s, {left / rate / 60:.1f} min left "
                f"in this stage, {state['seconds'] / 60:.1f} min so far",
                flush=True,
            )
        if done % options.save_every == 0 or done == len(data):
            save_state(folder, model, optimizer, state)
    machine = f"{torch.get_num_threads()} CPU threads" if options.device == "cpu" else torch.cuda.get_device_name()
    record = {
        key: getattr(options, key)
        for key in (
            "seed",
            "layers",
            "language_steps",
            "align_steps",
            "steps",
            "batch",
            "lr",
            "align_weight",
            "by_words",
        )
    }
    record |= {
        "minutes": round(state["seconds"] / 60, 1),
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return model, record


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="hawk_compile/tools/demo/model", help="folder of the finished checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last training checkpoint")
    parser.add_argument("--checkpoint", help="folder of the training checkpoints (default: OUT.training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--language-steps", type=int, default=700, help="steps of stage 0")
    parser.add_argument("--align-steps", type=int, default=300, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=600, help="steps of stage 2")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--lr", type=float, default=7e-4, help="peak learning rate of stage 2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--align-weight", type=float, default=0.5, help="weight of the alignment loss in stage 2")
    parser.add_argument(
        "--by-words", type=float, default=0.75, help="share of steps in which the answer sees no picture"
    )
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--show-every", type=int, default=50)
    parser.add_argument("--no-measure", action="store_true", help="do not measure and write the model card at the end")
    return parser


def main() -> None:
    options = arguments(__doc__).parse_args()
    model, record = train(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(widened(model.cpu().bfloat16()), out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not options.no_measure:
        from measure_demo_model import write_measurements

        write_measurements(out, device=options.device)


if __name__ == "__main__":
    main()
