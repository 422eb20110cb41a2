"""Drafting on the GPU in vLLM's V2 model runner; all but the settings is imported when vLLM is about to use it."""
