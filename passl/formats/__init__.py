"""Files of PyTorch, safetensors and Paddle, read and written without any of them and without executing anything."""
