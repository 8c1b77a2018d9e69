"""The closed-form check of the installed stack: PPO on problems whose answer is known."""
