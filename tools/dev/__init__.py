"""For the developers of this project; not in the wheel."""
