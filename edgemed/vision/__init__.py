"""From an image file to the tokens of an image: reading, DICOM, preprocessing and the float32
encoder. The device uses all of it but the encoder in torch.
"""
