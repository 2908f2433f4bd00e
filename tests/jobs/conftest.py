"""Fixtures of tests of the command line."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core import interrupts

WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Is there a red or a blue shape? ASSISTANT: yes, one is.\n"
)


@pytest.fixture(autouse=True)
def reset_sigint() -> Iterator[None]:
    """Reset SIGINT, which background jobs of a shell, such as the tests may be, and their children ignore."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a random CLIP and a random LLaMA with a tokenizer of LLaMA's kind, as on a hub.

    32 px in patches of 8 px: 16 patches, of which VMTC's defaults leave 8.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hub_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    size = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config={**size, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**size, "image_size": 32, "patch_size": 8},
        )
    )
    wide = {**size, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    llama = LlamaForCausalLM(LlamaConfig(**wide, vocab_size=len(hub_tokenizer)))
    folders: dict[str, Path] = {name: tmp_path_factory.mktemp(name) for name in ("tower", "language")}
    clip.save_pretrained(folders["tower"])
    llama.to(torch.bfloat16).save_pretrained(folders["language"])
    hub_tokenizer.save_pretrained(folders["language"])
    return {name: str(folder) for name, folder in folders.items()}
