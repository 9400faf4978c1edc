"""FAISS indexes over item vectors, and the bundle that they are read from; no torch."""
