"""Over sequences: statistics of groups, and the partition that infers groups."""
