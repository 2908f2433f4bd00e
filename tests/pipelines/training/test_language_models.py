"""A language model with one table for embeddings and head trains on its chat template under every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, Qwen2Config

from pipelines.training import export
from pipelines.training.plan import StagePlan
from pipelines.training.stage import Lora
from redux import answering
from redux.answering import LlavaAnswerer
from redux.configuration import ReduxConfig
from redux.conversation import IGNORE_INDEX, IMAGE_TOKEN
from redux.model import ReduxForConditionalGeneration
from redux.settings import CMAI, VMTC
from tests.pipelines import ranks
from tests.redux.test_chat_template import CHATML, make_tokenizer

STEPS = 2
EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied_plan(new_plan: Callable[..., StagePlan], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., StagePlan]:
    """Return a function that plans a stage of a Qwen2 with a chat template; keyword arguments change the stage."""
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = make_tokenizer(CHATML)
    tokenizer.model_max_length = 256
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4}
    text_config = Qwen2Config(
        **sizes, num_key_value_heads=1, vocab_size=len(tokenizer), tie_word_embeddings=True, **special
    )
    config = ReduxConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4).to_dict(),
        text_config=text_config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vmtc=VMTC(),
        cmai=CMAI(),
        **special,
    )
    torch.manual_seed(0)
    ReduxForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(**stage: object) -> StagePlan:
        return new_plan(
            {"start": str(folder), "tokenizer": folder, "model": None, "image_tokens": config.image_seq_length},
            template="chat",
            steps=STEPS,
            save_steps=STEPS,
            **stage,
        )

    return make


def train_all(plans: list[StagePlan]) -> list[list[float]]:
    """Train each plan on this rank, and return its losses."""
    return [[step.values["loss"] for step in ranks.train_with_checkpoints(plan)] for plan in plans]


def test_readers_encode_conversations_as_the_chat_template(tied_plan: Callable[..., StagePlan]) -> None:
    plan = tied_plan()
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    batch = plan.build_reader()(0)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        text = tokenizer.decode(ids[mask == 1])
        assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n")
        learned = tokenizer.decode(labels[labels != IGNORE_INDEX])
        assert learned.endswith("<|im_end|>")
        assert learned.count("<|im_end|>") == text.count("<|im_start|>assistant\n")


@pytest.mark.slow
@pytest.mark.integration
def test_a_table_that_head_and_embeddings_share_trains_alike_under_every_stage(
    tied_plan: Callable[..., StagePlan], tmp_path: Path
) -> None:
    rates = {"projector": 1e-3, "language": 1e-2}
    plans = [tied_plan(zero_stage=zero_stage, learning_rate=rates) for zero_stage in (0, 1, 2, 3)]
    adapters = tied_plan(zero_stage=2, learning_rate=rates, lora=Lora(rank=4, alpha=8, dropout=0))
    losses = ranks.run_on_ranks(tmp_path, 2, train_all, [*plans, adapters])[0]
    assert all(other == pytest.approx(losses[0], rel=1e-5) for other in losses[1:4])

    models = []
    for plan in (*plans, adapters):
        export.export_result(plan, STEPS)
        models.append(ReduxForConditionalGeneration.from_pretrained(plan.result))
        assert models[-1].lm_head.weight is models[-1].get_input_embeddings().weight
    start = ReduxForConditionalGeneration.from_pretrained(plans[0].start)
    weights = [dict(model.named_parameters()) for model in models]
    assert not torch.allclose(weights[0][EMBEDDINGS], start.get_input_embeddings().weight, atol=1e-3)
    for name, weight in weights[0].items():
        for other in weights[1:4]:
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
    # Adapters train the linear layers alone.
    assert torch.equal(weights[4][EMBEDDINGS], start.get_input_embeddings().weight)
    query = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights[4][query], dict(start.named_parameters())[query])


@pytest.mark.integration
def test_the_result_is_asked_by_the_chat_template(tied_plan: Callable[..., StagePlan], tmp_path: Path) -> None:
    plan = ranks.train_without_ray(tied_plan(), tmp_path)
    asked = answering.load(plan.result)
    assert isinstance(asked, LlavaAnswerer)
    assert asked.template == plan.load_template()
    assert asked.tokenizer.eos_token == "<|im_end|>"
    assert asked.model.generation_config.eos_token_id == asked.tokenizer.eos_token_id
    assert asked(["Is it red?"], [None], 4).tokens[0] <= 4
