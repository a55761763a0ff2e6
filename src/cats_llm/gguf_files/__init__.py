"""Models in GGUF files, the form of llama.cpp: as plain models of transformers, their weights dequantised."""
