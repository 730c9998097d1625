"""The HTTP server: llama.cpp's own endpoints and OpenAI's, over one engine."""
