"""The paged KV arrays on the device."""
