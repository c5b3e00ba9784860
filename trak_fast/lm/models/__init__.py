"""Models of folders: folders.py finds them, loading.py opens them, ensembles.py and architectures.py refuse others."""
