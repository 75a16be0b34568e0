"""Attention kernels: one signature, one implementation per backend."""
