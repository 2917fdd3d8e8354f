"""From the bytes of a picture file to a square uint8 image."""
