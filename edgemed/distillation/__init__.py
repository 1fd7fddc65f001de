"""Training a smaller or quantized student from a teacher. Order, sampling and seeds come from the
step's number, so that a killed run ends with the same bytes.
"""
