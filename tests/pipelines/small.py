"""A small model and a stage that trains it in seconds."""

from pipelines.training.stage import Stage
from redux.architecture import LanguageSizes, ModelSettings, TowerSizes

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
MODEL = ModelSettings(
    tower=TowerSizes(image_size=16, patch_size=4, num_hidden_layers=4, **SIZES),
    language=LanguageSizes(num_hidden_layers=2, **SIZES),
)
STEPS = 8
STAGE = Stage(
    objective="language",
    data="set",
    template="vicuna_bare",
    steps=STEPS,
    global_batch_size=8,
    micro_batch_size=2,
    learning_rate={"tower": 1e-3, "projector": 1e-3, "language": 1e-3},
    save_steps=2,
)
