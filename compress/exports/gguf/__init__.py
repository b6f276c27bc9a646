"""GGUF files: a model in blocks of 32 weights, as llama.cpp and everything that is built on it reads them."""
