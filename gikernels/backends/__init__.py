"""What runs where: the choice of a backend, compiled code, checked arguments, launches."""
