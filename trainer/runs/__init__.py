"""What a run leaves behind, and the one loop that every stage of training goes through."""
