"""Building an index: from files to documents of tokens, and from those to segments."""
