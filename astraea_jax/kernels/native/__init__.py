"""Kernels for CPUs in C++, which the user's compiler builds once (:mod:`.library`)."""
