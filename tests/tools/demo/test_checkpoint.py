"""The shipped checkpoint: it loads like any other, offline, and answers held-out questions."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hawk_compile.tools.demo.scenes import make_scene, pick_questions, scene_size

FOLDER = Path(str(resources.files("hawk_compile"))) / "tools" / "demo" / "model"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def chat(scene, question):
    content = [{"type": "image", "image": scene.pil()}, {"type": "text", "text": question.text}]
    return [{"role": "user", "content": content}]


def encode(processor, chats):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
    )


def answers(processor, model, pairs):
    inputs = encode(processor, [chat(scene, question) for scene, question in pairs])
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(out, skip_special_tokens=True)


def test_files():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert "video_preprocessor_config.json" in names  # vLLM asks for it
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    assert (FOLDER / "model.safetensors").stat().st_size <= 10e6


def test_ids_match(processor, model):
    ids = processor.tokenizer.convert_tokens_to_ids
    config = model.config
    assert config.model_type == "qwen2_5_vl" and model.lm_head.weight is model.get_input_embeddings().weight
    assert config.image_token_id == ids("<|image_pad|>") == processor.image_token_id
    assert config.video_token_id == ids("<|video_pad|>")
    assert config.vision_start_token_id == ids("<|vision_start|>")
    assert config.vision_end_token_id == ids("<|vision_end|>")
    assert model.generation_config.eos_token_id == ids("<|im_end|>") == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id == config.text_config.pad_token_id
    assert len(processor.tokenizer) == config.text_config.vocab_size


def test_who_names_no_precision_gets_float32(model):
    """The file holds bf16 too, and what is not exact in bf16: what lies in it is used as it is."""
    unasked = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True)
    assert unasked.dtype == torch.float32 and unasked.model.language_model.layers[0].self_attn.head_dim == 32
    stored = load_file(FOLDER / "model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.bfloat16, torch.float32}
    for name, values in unasked.named_parameters():
        in_file = name.removeprefix("model.").replace("language_model.", "model.")
        assert torch.equal(values, stored[in_file].float()) and torch.equal(values, model.get_parameter(name)), name


def test_prompt(processor):
    scene = make_scene("tune", 0, (336, 336))
    inputs = encode(processor, [chat(scene, scene.questions[0])])
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    pad = "<|image_pad|>"
    assert words.count(pad) == 144 == int(inputs["mm_token_type_ids"].sum())
    assert [word for word in words if word != pad] == [
        "<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>", *scene.questions[0].text.split(),
        "<|im_end|>", "<|im_start|>", "assistant",
    ]  # fmt: skip
    spoken = processor(
        text=processor.apply_chat_template(chat(scene, scene.questions[0]), add_generation_prompt=True),
        images=scene.pil(), return_tensors="pt",
    )  # fmt: skip
    assert {key: value.tolist() for key, value in spoken.items()} == {k: v.tolist() for k, v in inputs.items()}


def test_left_padded_batch_answers_as_single_rows(processor, model):
    pairs = [(scene, scene.questions[0]) for scene in (make_scene("tune", i) for i in range(4))]
    inputs = encode(processor, [chat(*pair) for pair in pairs])
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][:, 0].all()
    together = answers(processor, model, pairs)
    assert together == [answers(processor, model, [pair])[0] for pair in pairs]


def test_held_out_questions_are_answered(processor, model):
    pairs = pick_questions("test", 64, per_scene=4)
    by_size: dict = {}
    for pair in pairs:
        by_size.setdefault(scene_size("test", pair[0].index), []).append(pair)
    right = sum(
        answer == question.answer
        for group in by_size.values()
        for answer, (_, question) in zip(answers(processor, model, group), group, strict=True)
    )
    assert right >= 60, f"{right} of 64 right"  # 60 / 64 is the first count above 0.93


def test_head_weights(model):
    found = json.loads((FOLDER / "head_weights.json").read_text(encoding="utf-8"))
    assert len(found["weights"]) == model.config.text_config.num_attention_heads
    assert min(found["weights"]) >= 0 and sum(found["weights"]) == pytest.approx(1, abs=1e-3) and found["how"]
