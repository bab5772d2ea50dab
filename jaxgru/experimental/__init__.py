"""What has not been proven on the hardware that it is for; nothing else of jaxgru imports it."""
