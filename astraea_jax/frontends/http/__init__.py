"""The HTTP front door: the APIs that agents already speak, on FastAPI and uvicorn."""
