"""Drafting by an exhaustive scan of each sequence: CUDA kernels and their twins on the CPU."""
