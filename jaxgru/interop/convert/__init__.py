"""Files of weights from one format to another, for `python -m jaxgru.interop`."""
