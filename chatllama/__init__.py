"""chatllama: SFT, reward model and PPO as four adapters on one frozen LLaMA."""

__version__ = "0.1.0"
