"""Stage 3, PPO: rollouts, rewards, updates, evaluation; health/ and servers/ stand apart."""
