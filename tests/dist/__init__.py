"""What `pip install` gives a user: the wheel is built, checked and tried in fresh environments."""
