"""Policy, reward model and critic around any Hugging Face backbone."""
