"""State that all workers share while they train, as plain data structures: no Ray, no torch."""
