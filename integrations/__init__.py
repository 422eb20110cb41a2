"""Third floor: one folder a runtime, and the command line. The only floor that imports torch, transformers or vllm."""
