"""Text and image sets for calibration, validation and distillation. Each set has a card with its
source, licence and hash, so that a result names exactly what it was made with.
"""
