"""Ground floor: finding and counting earlier occurrences of token sequences. Knows nothing of drafting."""
