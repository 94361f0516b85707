"""What `gi train` does, in order: SFT, reward model, PPO and its baselines, MetaRM."""
