"""Front doors: the Python API, the server command with its flags, and gRPC."""
