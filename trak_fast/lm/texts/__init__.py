"""Documents and their tokens: files.py reads rows, documents.py finds texts in them, encoding.py makes tokens."""
