"""Measurements, apart from serving: records, roofline, replay, plots, and compilation for absent devices."""
