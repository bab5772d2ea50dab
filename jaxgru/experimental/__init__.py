"""Code that has not been proven on its hardware yet. No other room imports it."""
