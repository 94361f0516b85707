"""Built-in worlds: prompts, demonstrations, annotators and judges made from a seed."""
