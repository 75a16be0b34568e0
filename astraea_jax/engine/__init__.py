"""The serving loop, and what it runs on the devices."""
