"""The work of trak-fast lm: documents and a model in, rows of top.jsonl and a page out."""
