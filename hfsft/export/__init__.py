"""A trained model for other readers: GGUF, Ollama and a plain architecture, each proved."""
