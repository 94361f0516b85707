"""What flows through the house: prompts, pairs, and sequences in batches."""
