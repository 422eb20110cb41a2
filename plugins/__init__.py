"""Second floor: the drafters, the contract they keep, their registry and their configuration."""
