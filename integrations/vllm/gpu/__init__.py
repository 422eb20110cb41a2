"""Drafting on the GPU in vLLM's V2 model runner; nothing here is imported unless vLLM is about to use it."""
