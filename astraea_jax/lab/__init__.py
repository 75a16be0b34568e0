"""Measurements, apart from what serves: records, roofline, replay, plots, compilation for devices that are absent."""
