"""jaxgru side by side with other implementations: each script writes JSON, a table and a plot."""
