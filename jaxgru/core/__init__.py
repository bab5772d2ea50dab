"""The GRU itself: parameters, one step, its derivatives, and the recurrence over a sequence.

It imports no other part of jaxgru, which exports its public names. README.md says what is where.
"""
