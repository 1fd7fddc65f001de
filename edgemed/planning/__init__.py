"""What fits a device and how fast it would be, before anybody owns it. Every prediction states its
error on devices that were left out of the fit.
"""
