"""Whether the stages that a config has fit together; which ones it has is `Config.stages`."""

from chatllama.config.errors import ConfigError
from chatllama.config.schema import Config


def check_stages(cfg: Config) -> None:
    """Raises ConfigError, with all problems, where the stages of a config do not fit together."""
    stages, problems = cfg.stages, []
    for name, section in (("sft", cfg.sft), ("reward", cfg.reward), ("ppo", cfg.ppo)):
        if name not in stages and section != type(section)():
            source = "data" if name == "ppo" else "data and no adapter"
            problems.append(
                f"{name}: it has settings but no {source}; give {name}.data, or leave the stage "
                f"out with {name}=null"
            )
    if not cfg.trained_stages:
        problems.append("no stage has data: give sft.data, reward.data or ppo.data")
    if cfg.lora is None and not cfg.sft.data:
        problems.append(
            "lora: null means SFT of all weights, and there is no sft.data; give lora the shape of "
            "the later stages' adapters, as in lora: {r: 16}"
        )
    if cfg.backbone.from_scratch is not None and not cfg.sft.data:
        problems.append("backbone.from_scratch is made by the SFT stage: give sft.data")
    from_run = any(source.adapter == "run" for source in cfg.ppo.rewards)
    if "ppo" in stages and from_run and "reward" not in stages:
        problems.append(
            "ppo.rewards: `adapter: run` is the reward model of this run, which has none: give "
            "reward.data or reward.adapter, or other terms, as in "
            "ppo.rewards: [{function: my_rewards:brevity}]"
        )
    if problems:
        raise ConfigError("the stages of the config", problems)
