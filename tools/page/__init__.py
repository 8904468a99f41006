"""The page that `rankbook report` writes: what runs say about themselves, side by side, in one HTML file."""
