"""The on-disk retrieval index: build once, open anywhere, follow text through a corpus."""
