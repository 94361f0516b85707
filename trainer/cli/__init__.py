"""What trains nothing: a run is checked and planned, and what this machine has is shown."""
