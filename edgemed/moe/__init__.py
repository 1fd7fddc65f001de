"""Mixtures of experts as a whole: routing statistics, merging experts into a dense model, a base
that experts share. What one layer computes is in models/ and in each runtime's package.
"""
