"""What every running model offers, whatever runs it: prefill, step and rewind. Decoding, sampling
and log-probabilities are written once on top of these, so that every engine is measured by the
same code."""
