"""What becomes of every multimodal class of vLLM's registry: python -m tests.serving.registry

Prints the table of docs/serving.md, and exits 1 if vLLM's registry has a class that is not in it, or not any more.
"""

import sys
from dataclasses import dataclass

ENDINGS = ("ForConditionalGeneration", "ForCausalLM")
"""Of most names; left out in the table."""


@dataclass(frozen=True)
class Row:
    """Classes of one fate.

    Attributes:
        fate: what becomes of them.
        why: and why so.
        names: of vLLM's registry, without the commonest endings.
    """

    fate: str
    why: str
    names: str


def short(architecture: str) -> str:
    for ending in ENDINGS:
        architecture = architecture.removesuffix(ending)
    return architecture


COMPARED, OPEN, REFUSED = "served, compared", "not compared", "refused at start"

ROWS = (
    Row(COMPARED, "by `make test-vllm-kinds`", (
        "Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe Llava LlavaNext LlavaOnevision Mistral3 InternVL Idefics3 SmolVLM "
        "Gemma3 Gemma4 Glm4v Glm4vMoe Cohere2Vision Qwen2_5OmniModel Qwen2_5Omni Qwen3OmniMoe")),
    Row(OPEN, "transformers has no such model to compare with: its code is on the Hub, and nothing here runs that", (
        "Bagel Bee Cosmos3 DeepseekOCR DeepseekOCR2 UnlimitedOCR DotsOCR Eagle2_5_VL H2OVLChatModel InternVLChatModel "
        "InternS1 InternS1Pro Isaac KananaV Keye KeyeVL1_5 Llama_Nemotron_Nano_VL LlavaOnevision2 MiMoV2Omni MiniCPMO "
        "MiniCPMV Molmo2 NVLM_D OpenCUA OpenPanguVL Ovis Ovis2_5 Ovis2_6 Ovis2_6_Moe Phi3V Phi4ForCausalLMV Phi4MM R "
        "SkyworkR1VChatModel StepVL Step3VL")),
    Row(OPEN, "vLLM 0.32 does not read the tiny checkpoint that transformers 5.19 writes", (
        "Ernie4_5_VLMoe LightOnOCR Step3p7 QianfanOCR")),
    Row(OPEN, "vLLM itself differs from transformers, unpruned", "Aria GlmOcr Llama4 PaddleOCRVL"),
    Row(OPEN, "it needs a GPU to start", "DeepseekV4 DeepseekV41 Dots3Note MiniMaxM3Sparse"),
    Row(OPEN, "it answers, and nothing was at hand to compare with", "Exaone4_5_"),
    Row(OPEN, "not tried", (
        "CohereCompass Cosmos3Edge Gemma4Unified LlavaNextVideo MuseGlimmer")),
    Row(REFUSED, "the first layer has linear attention, a convolution or a state space, as checkpoints are published", (
        "Qwen3_5 Qwen3_5Moe Qwen4Exp InternS2Mobius InternS2Preview MiniCPMV4_6 MiniCPMV4_7 BailingMoeV3VL Glm5Next "
        "KimiK3 Lfm2Vl NemotronH_Nano_VL_V2 NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 "
        "NemotronH_Omni_Reasoning_V3")),
    Row(REFUSED, "latent attention, which all but the smallest DeepSeek-VL2 have", "KimiVL KimiK25 DeepseekVLV2"),
    Row(REFUSED, "nothing in a prompt says where its images stand", (
        "Blip2 Molmo OpenVLAForActionPrediction PaliGemma Pixtral")),
    Row(REFUSED, "its layers are not where those of other decoders are", "GLM4V Moondream3 HfMoondream"),
    Row(REFUSED, "its decoder needs more than embeddings to get to its first attention", "Gemma3n"),
    Row(REFUSED, "its features do not stand where their tokens do: layers behind get them", "Granite4Vision"),
    Row(REFUSED, "it answers in blocks", "DiffusionGemmaForBlockDiffusion"),
    Row(REFUSED, "it reads by cross-attention", "NemotronParse Whisper CohereAsr"),
    Row(REFUSED, "it takes sounds alone", (
        "AudioFlamingo3 FireRedASR2 FunASR FunAudioChat GlmAsr GraniteSpeech GraniteSpeechPlus MoonshotKimia "
        "MossTranscribeDiarize MiDashengLMModel MossAudioModel Qwen2Audio Qwen3ASR Qwen3ASRRealtimeGeneration "
        "UltravoxModel Voxtral VoxtralRealtimeGeneration")),
)  # fmt: skip


def table() -> str:
    """Markdown."""
    lines = ["| | because | classes |", "| --- | --- | --- |"]
    lines += [f"| {row.fate} | {row.why} | {', '.join(row.names.split())} |" for row in ROWS]
    return "\n".join(lines)


def wrong() -> list[str]:
    """Classes that only one of the table and vLLM's registry has."""
    from hawk_compile.serving.vllm.compat.engine import multimodal_architectures

    named = [name for row in ROWS for name in row.names.split()]
    twice = [name for name in set(named) if named.count(name) > 1]
    return sorted({*named} ^ {short(name) for name in multimodal_architectures()}) + twice


if __name__ == "__main__":
    print(table())
    if found := wrong():
        sys.exit(f"the table does not fit this vLLM's registry: {', '.join(found)}")
