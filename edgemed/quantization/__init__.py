"""Fewer bits for a checkpoint's weights: grids, calibration statistics and the methods. Methods are
files in methods/, so that a new one needs no edit elsewhere.
"""
