import re
from pathlib import Path

import pytest

from chatllama.config.errors import ConfigError, schema_paths
from chatllama.config.loader import load_config
from chatllama.config.nearest import OTHER_NAMES
from chatllama.config.schema import Config

ROOT = "run_dir: r\nbackbone: {path: m}\n"


def refused(tmp_path: Path, *overrides: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(ROOT)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rank=8", "rank (the command line): unknown key; here that is lora.r"),
        ("lora.rank=8", "here that is lora.r"),
        ("lora.lora_alpha=8", "here that is lora.alpha"),
        ("backbone.load_in_4bit=true", "here that is backbone.quantization: nf4"),
        ("sft.num_train_epochs=3", "here that is sft.epochs"),
        ("num_train_epochs=3", "here that is sft.epochs or reward.epochs or ppo.epochs"),
        ("sft.gradient_accumulation_steps=4", "here that is sft.batch_size, of all ranks and"),
        ("kl=0.1", "here that is ppo.kl_coef"),
        ("ppo.lr=0.1", "here that is ppo.learning_rate"),
        ("fp16=true", "here that is backbone.dtype: bfloat16 (float16 needs a loss scaling"),
        ("wandb=true", "did you mean tracking.wandb?"),
        ("use_wandb=true", "here that is tracking.report_to: [wandb]"),
        ("output_dir=x", "here that is run_dir"),
        ("model=x", "here that is backbone.path"),
    ],
)
def test_names_of_other_libraries_answer_with_the_key_here(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in refused(tmp_path, override)


def test_every_answer_is_a_key_and_no_question_is() -> None:
    paths = schema_paths(Config)
    dotted = {".".join(map(str, path)) for path in paths}
    for theirs, ours in OTHER_NAMES.items():
        key = re.split("[:, ]", ours)[0]
        assert key in dotted or ("." not in key and key in {path[-1] for path in paths}), ours
        assert theirs not in Config.model_fields


@pytest.mark.parametrize("section", ["sft", "ppo", "generation"])
def test_a_message_lists_five_keys_at_most(tmp_path: Path, section: str) -> None:
    message = refused(tmp_path, f"{section}.zzzqqq=1")
    listed = message.partition("known here: ")[2].partition(" and ")[0]
    assert len(listed.split(", ")) == 5 and "configs copy reference" in message
