"""A lean RLHF trainer whose heart is group-invariant learning; docs/architecture.md is its map."""
