"""Whether an engine still says what its float32 source says, on text and on images. Nothing is
measured before it passed here.
"""
