"""Floor 3: the four methods, and what a method is."""
