"""Answers sampled from a policy, by a Hugging Face model or by vLLM."""
