"""How fast an engine is and how much memory it takes, with the state of the machine beside each
number. A latency is never cached.
"""
