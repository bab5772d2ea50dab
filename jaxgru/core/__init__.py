"""The GRU itself: parameters, one step, its derivatives, and the recurrence over a sequence.

It imports no other part of jaxgru. Users import its names from `jaxgru`; README.md lists its files.
"""
