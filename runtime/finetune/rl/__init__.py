"""Learning from rewards of answers that the model samples: GRPO and PPO. Imports nothing."""
