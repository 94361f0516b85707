"""Over the vocabulary: log-probabilities, entropy, KL and the policy loss of each token."""
