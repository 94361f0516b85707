"""What every room asks of the machine: what it is, which commit this is, resident memory."""
