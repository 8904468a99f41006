"""What the operators are, and what runs them. Needs numpy alone."""
