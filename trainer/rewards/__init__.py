"""What an answer scores: a reward model, functions, or a weighted sum of them."""
